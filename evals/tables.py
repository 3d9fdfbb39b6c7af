"""Tables of what methods do to models, one function per results file, as markdown."""

from __future__ import annotations

from functools import reduce
from statistics import fmean, stdev
from typing import Any

import variants

Result = dict[str, Any]


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A markdown table; all columns but the first are set to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quantization(result: Result) -> str:
    def quality(row: Result, text: str) -> list[str]:
        one = row["quality"][text]
        return [f"{one['perplexity']:.2f}", f"{one['kl']:.3f}", f"{100 * one['top1_agreement']:.1f} %"]

    rows = [
        [
            row["name"],
            *quality(row, "wikitext"),
            *quality(row, "c4"),
            f"{row['size']['bits_per_block_weight']:.2f}",
            f"{row['cpu_seconds']['steps']:.0f}",
            f"{row['cpu_seconds']['command']:.0f}",
            f"{row['peak_memory_mb']['process']:.0f}",
        ]
        for row in result["rows"]
    ]
    if rows:
        first = result["rows"][0]["quality"]
        bases = [f"{first[text]['base_perplexity']:.2f}" for text in ("wikitext", "c4")]
        rows.insert(0, ["float32", bases[0], "", "", bases[1], "", "", "32", "", "", ""])
    headings = [
        "method / scheme / calibration",
        "WikiText-2 perplexity",
        "KL",
        "top-1",
        "C4 perplexity",
        "KL",
        "top-1",
    ]
    return table([*headings, "bits per weight", "CPU s", "CPU s of the command", "peak MB"], rows)


def by_share(result: Result) -> str:
    """A table of single variants, and one of those that are measured at several shares of the blocks' parameters."""
    rows = [row for row in result["rows"] if row["name"] != "base"]
    curves = [row for row in rows if row["name"].split("/")[1] in CURVE]
    lines: dict[str, dict[str, float]] = {}
    for row in curves:
        what, share, choice = row["name"].split("/")
        lines.setdefault(f"{what}, {choice}", {})[share] = row["quality"]["perplexity"]
    cells = [
        [name, *(f"{line[share]:.1f}" if share in line else "" for share in CURVE)]
        for name, line in lines.items()
    ]
    removed = [f"{share} of the blocks' parameters removed" for share in CURVE]
    single = by_bytes({"rows": [row for row in result["rows"] if row not in curves]})
    return "\n\n".join([single, table(["what, choice", *removed], cells)])


def by_bytes(result: Result) -> str:
    """A line per variant: bytes, quality, cost."""
    listed = []
    for row in result["rows"]:
        quality = f"{row['quality']['perplexity']:.2f}"
        if row["name"] == "base":
            listed.append(["float32", "", "", quality, "", ""])
            continue
        listed.append(
            [
                row["name"],
                f"{row['size']['bytes_on_disk'] / 1e6:.1f}",
                f"{100 * row['blocks_left']:.1f} %",
                quality,
                f"{row['cpu_seconds']['steps']:.0f}",
                f"{row['peak_memory_mb']['process']:.0f}",
            ]
        )
    headings = [
        "what / how much / choice",
        "MB on disk",
        "bytes left in blocks",
        "WikiText-2 perplexity",
        "CPU s",
    ]
    return table([*headings, "peak MB"], listed)


def recovery(result: Result) -> str:
    """A line per row: what training took, and how much of the perplexity that was lost it won back, on two texts."""
    rows: dict[str, list[Result]] = {}
    for row in result["rows"]:
        rows.setdefault(variants.seeded(row["name"])[0], []).append(row)
    listed = []
    for name, seeds in rows.items():
        won = [text for judged in ("quality", "elsewhere") for text in _won_back(name, judged, rows)]
        if name == "base":
            listed.append(["float32", "", "", *won, "", ""])
            continue
        first = seeds[0]
        listed.append(
            [
                name,
                f"{(first['size']['bytes_on_disk'] + first.get('adapter_bytes', 0)) / 1e6:.1f}",
                f"{first['minutes']:g}" if "minutes" in first else "",
                *won,
                f"{mean(seeds, 'cpu_seconds', 'steps'):.0f}",
                f"{mean(seeds, 'peak_memory_mb', 'process'):.0f}",
            ]
        )
    texts = ["WikiText-2 perplexity", "of the increase gone", "C4 perplexity", "of that increase gone"]
    told = table(["what / training", "MB on disk", "minutes", *texts, "CPU s", "peak MB"], listed)
    return f"{told}{seeds_told(result)}"


def _won_back(name: str, judged: str, rows: dict[str, list[Result]]) -> tuple[str, str]:
    """The perplexity of a row on one text, and what share of the increase is gone; empty where not measured."""
    found = {
        one: [row[judged]["perplexity"] for row in seeds]
        for one, seeds in rows.items()
        if all(judged in row for row in seeds)
    }
    if name not in found:
        return "", ""
    before = found.get(f"{name.split('/')[0]}/untrained")
    if "minutes" not in rows[name][0] or "base" not in found or before is None:
        return spread(found[name], 2), ""
    start, end, base = fmean(before), fmean(found[name]), fmean(found["base"])
    return spread(found[name], 2), f"{100 * (start - end) / (start - base):.0f} %"


def pruning(result: Result) -> str:
    return f"{by_share(result)}\n\n![perplexity against what is removed](evals/results/pruning.svg)"


CURVE = ("10%", "20%", "30%")
PARETO = (
    "![bytes on disk against WikiText-2 perplexity](evals/results/pareto.svg)\n\n"
    "Drawn from the tables above by `python evals/pareto.py`."
)


def pruning_encoder(result: Result) -> str:
    rows = [
        [
            row["name"],
            f"{100 * row['blocks_left']:.1f} %",
            f"{row['cosine']['mean']:.3f}",
            f"{row['cosine']['p05']:.3f}",
            f"{row['stsb_spearman']['result']:.3f}",
            f"{row['cpu_seconds']['steps']:.0f}",
        ]
        for row in result["rows"]
    ]
    if rows:
        rows.insert(0, ["base", "", "", "", f"{result['rows'][0]['stsb_spearman']['base']:.3f}", ""])
    headings = [
        "what / choice",
        "bytes left in blocks",
        "cosine to the base",
        "of the 5 % worst",
        "STS-B Spearman",
    ]
    return table([*headings, "CPU s"], rows)


def glue(result: Result) -> str:
    """A row for each kind of model: the metrics of each task, their mean, and how much of the teacher's that is."""
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    kinds: dict[str, dict[str, list[Result]]] = {}
    for row in result["rows"]:
        kinds.setdefault(row["kind"], {}).setdefault(row["task"], []).append(row)
    score = {kind: {task: mean(rows, "score") for task, rows in of.items()} for kind, of in kinds.items()}
    whole = score.get("teacher", {})
    listed, names = [], {}
    for kind, of in kinds.items():
        cells = []
        for task in tasks:
            metrics = list(of[task][0]["metrics"]) if task in of else []
            names |= {task: ", ".join(metrics)} if metrics else {}
            seeds = [[100 * row["metrics"][name]["value"] for row in of.get(task, [])] for name in metrics]
            cells.append(" / ".join(spread(values, 1) for values in seeds))
        both = [task for task in of if task in whole]
        kept = sum(score[kind][t] for t in both) / sum(whole[t] for t in both) if both else None
        listed.append(
            [
                kind,
                *cells,
                f"{100 * sum(score[kind].values()) / len(of):.1f}",
                "" if kept is None else f"{100 * kept:.1f} %",
                f"{next(iter(of.values()))[0]['size']['bytes_on_disk'] / 1e6:.1f}",
                f"{sum(mean(rows, 'cpu_seconds', 'steps') for rows in of.values()):.0f}",
            ]
        )
    headings = ["model", *(f"{task} ({names.get(task, '')})" for task in tasks), "mean", "of the teacher's"]
    return f"{table([*headings, 'MB on disk', 'CPU s'], listed)}{seeds_told(result)}"


def seeds_told(result: Result) -> str:
    """What ± is, where rows are of several seeds."""
    several = any(variants.SEED in row["name"] for row in result["rows"])
    told = (
        "± is the standard deviation over three seeds, before it their mean; figures without are of one seed."
    )
    return f"\n\n{told}" if several else ""


def mean(rows: list[Result], *path: str) -> float:
    """Of one figure over rows."""
    return fmean(reduce(lambda found, key: found[key], path, row) for row in rows)


def spread(values: list[float], digits: int) -> str:
    """A figure, or the mean of several and their standard deviation."""
    beside = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{beside}"


def lm(result: Result) -> str:
    """A line per variant: bytes, perplexity, each task's accuracy with the paired difference, and their mean."""
    tasks = list(result["rows"][0]["lm"]["tasks"]) if result["rows"] else []
    listed = []
    for row in result["rows"]:
        cells = []
        for task in tasks:
            found = row["lm"]["tasks"][task]
            main = found["metrics"][found["main"]]
            cells.append(
                points(main) if "base" in main else f"{100 * main['value']:.1f} ± {100 * main['stderr']:.1f}"
            )
        mean = row["lm"].get("average")
        listed.append(
            [
                row["name"],
                f"{row['size']['bytes_on_disk'] / 1e6:.1f}" if "size" in row else "",
                f"{row['quality']['perplexity']:.2f}",
                *cells,
                points(mean, value=False) if mean else "",
            ]
        )
    asked = [result["rows"][0]["lm"]["tasks"][task]["questions"] for task in tasks]
    headings = ["what", "MB on disk", "WikiText-2 perplexity"]
    headings += [f"{task}, {questions} questions" for task, questions in zip(tasks, asked, strict=True)]
    told = "Accuracy in %; in brackets the difference from the base on the same questions ± its paired standard error."
    return f"{table([*headings, 'mean difference'], listed)}\n\n{told}"


def suite(result: Result) -> str:
    """A line per model and suite: perplexity, accuracies, decoding, memory, each with the base's or the difference."""
    listed = []
    for row in result["rows"]:
        text, speeds = row["perplexity"], row["benchmark"]["model"]["figures"]
        decode = next((name for name in speeds if name.startswith("decode")), None)
        answers = []
        for task, found in row["tasks"]["tasks"].items():
            main = found["metrics"][found["main"]]
            answers.append(f"{task} {points(main) if 'base' in main else format(100 * main['value'], '.1f')}")
        base = f" (base {text['base_perplexity']:.2f})" if "base_perplexity" in text else ""
        listed.append(
            [
                row["name"],
                f"{text['perplexity']:.2f}{base}",
                "; ".join(answers),
                f"{speeds[decode]['median']:.1f}" if decode else "",
                f"{speeds['peak_memory_mb']['median']:.0f}",
                f"{speeds['bytes_on_disk']['median'] / 1e6:.1f}",
                row["benchmark"]["verdict"] or "",
            ]
        )
    headings = ["suite/model", "perplexity", "accuracy in %", "decode tok/s", "peak MB", "MB on disk"]
    return table([*headings, "speed and memory against the base"], listed)


def points(found: dict[str, float], value: bool = True) -> str:
    """41.2 (-1.9 ± 0.8): percent, and the paired difference in points."""
    gap = f"{100 * found['difference']:+.1f} ± {100 * found['difference_stderr']:.1f}"
    return f"{100 * found['value']:.1f} ({gap})" if value else gap
