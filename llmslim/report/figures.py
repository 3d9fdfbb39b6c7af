"""The figures of a report, base against result, in the words that the table and the model card share."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from llmslim.report.schema import measured

SAME = 0.05  # a speed within 5% of the base's is called no faster


@dataclass(frozen=True)
class Row:
    """One figure: of the base, of the result, and what the two come to ("" where there is nothing to say)."""

    label: str
    base: str
    result: str
    change: str = ""


def rows(report: dict[str, Any]) -> list[Row]:
    """The measured figures that the report has; what was skipped is in `skipped`."""
    quality = [*_quality(_measured(report["quality"])), *_glue(report)]
    tasks = _tasks(_measured(report.get("tasks")))
    return [*_sizes(report["size"]), *quality, *tasks, *_speeds(report["speed"])]


def _glue(report: dict[str, Any]) -> list[Row]:
    """Metrics of both, or of the result alone, in percent with 95 % intervals, and the paired difference."""
    from llmslim.evaluation.paired import shift

    made = []
    for label, _, found in _glue_metrics(report):
        base, change = "", ""
        if "base" in found:
            base = _percent(found["base"], found["base_low"], found["base_high"])
            change = shift(*(found[f"difference{end}"] for end in ("", "_low", "_high")))
        made.append(Row(label, base, _percent(found["value"], found["low"], found["high"]), change))
    return made


def _glue_metrics(report: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Label, task and metric of what was scored on GLUE; the label tells whether the data have chosen a checkpoint."""
    trained = [step["finetune"] for step in report["recipe"]["steps"] if "finetune" in step]
    choosing = {step.get("glue") for step in trained if step.get("choose_on_validation")}
    return [
        (
            f"{name} {metric.replace('_', ' ')}"
            + " (of the data that chose the checkpoint)" * (name in choosing),
            record,
            found,
        )
        for name, record in _measured(report.get("glue")).get("tasks", {}).items()
        for metric, found in record["metrics"].items()
    ]


def _percent(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _tasks(record: dict[str, Any]) -> list[Row]:
    """The main metric of each task, and the paired difference; its verdict stands with the scores."""
    from llmslim.evaluation.paired import spread

    made = []
    for name, task in record.get("tasks", {}).items():
        if main := task["metrics"].get(task["main"]):
            told = (main.get("difference"), main.get("difference_stderr"), main.get("share", True))
            change = "" if told[1] is None else spread(*told)
            made.append(Row(name, f"{main['base']:.3f}", f"{main['value']:.3f}", change))
    return made


def what_was_done(report: dict[str, Any]) -> str:
    """The steps in words: 'gptq with 4 bits'."""
    said = []
    for step in report["recipe"]["steps"]:
        kind, fields = next(iter(step.items()))
        scheme = [f"{fields['bits']} bits"] if "bits" in fields else []
        if "group_size" in fields:
            size = fields["group_size"]
            scheme.append(f"groups of {size}" if isinstance(size, int) else f"one scale per {size}")
        if "symmetric" in fields:
            scheme.append("symmetric" if fields["symmetric"] else "asymmetric")
        said.append(f"{kind} ({', '.join(scheme)})" if scheme else kind)
    runs = [(what, len(list(same))) for what, same in itertools.groupby(said)]
    return ", then ".join(what if count == 1 else f"{what} in {count} rounds" for what, count in runs)


@dataclass(frozen=True)
class StepLine:
    """What a step of the recipe left; perplexity is None where there is none."""

    label: str
    bytes: int
    perplexity: float | None
    cells: tuple[str, str, str]


STEP_HEADINGS = ("size on disk", "perplexity", "change")
"""Of the cells of a `StepLine`; the change is that of the perplexity from the line before."""


def steps(report: dict[str, Any]) -> list[StepLine]:
    """The base and what each step left of it, in order; empty when the steps were not measured."""
    if not report["steps"]:
        return []
    first = _measured(report["steps"][0]["quality"])
    measured = [("base", report["size"]["base"], first.get("base_perplexity"))]
    for number, row in enumerate(report["steps"], 1):
        measured.append(
            (f"{number}. {row['step']}", row["size"], _measured(row["quality"]).get("perplexity"))
        )
    lines: list[StepLine] = []
    for label, size, perplexity in measured:
        value = perplexity["value"] if perplexity else None
        before = lines[-1].perplexity if lines else None
        change = f"{100 * (value / before - 1):+.1f} %" if value and before else ""
        told = _spread(perplexity, 2) if perplexity else "-"
        cells = (f"{size['bytes_on_disk'] / 1e6:,.1f} MB", told, change)
        lines.append(StepLine(label, size["bytes_on_disk"], value, cells))
    return lines


TASK_HEADINGS = ("task", "base", "result", "difference")


def tasks(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Scores by `TASK_HEADINGS`, if there are any: the chief metric of each task of lm-eval, all metrics of GLUE's."""
    rows = []
    for name, record in ((report.get("tasks") or {}).get("tasks") or {}).items():
        found = record["metrics"].get(record["main"])
        if found is None or "base" not in found:
            continue
        sides = ((found["base"], found["base_stderr"]), (found["value"], found["stderr"]))
        told = [
            f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}" for value, stderr in sides
        ]
        gap = found.get("verdict") or f"{found['difference']:+.3f}"
        asked = f", {record['questions']} questions" if "questions" in record else ""
        rows.append((f"{name} ({record['main']}){asked}", *told, gap))
    for (label, record, found), row in zip(_glue_metrics(report), _glue(report), strict=True):
        asked = f", {record['examples']} examples"
        rows.append((f"{label}{asked}", row.base or "-", row.result, found.get("verdict", "")))
    return rows


def protocols(report: dict[str, Any]) -> list[str]:
    """How scores on tasks were measured, in words."""
    told = (
        ("tasks", "± is the standard error; differences are paired by question"),
        ("glue", "the scores are in percent"),
    )
    found = [(_measured(report.get(name)).get("protocol"), reading) for name, reading in told]
    return [f"{protocol}. {reading[0].upper()}{reading[1:]}." for protocol, reading in found if protocol]


SPEED_HEADINGS = ("", "base", "result", "ratio")


def lengths(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Speed and memory by batch and length, by `SPEED_HEADINGS`, if they were kept (`benchmark --save`)."""
    record = report.get("benchmark") or {}
    if not record:
        return []
    from llmslim.evaluation.speed import label

    rows = []
    for name, row in (record["comparison"] or {}).items():
        sides = [record[side]["figures"][name]["median"] for side in ("base", "model")]
        scale = 1e6 if name == "bytes_on_disk" else 1
        told = [f"{value / scale:,.1f}{_unit(name)}" for value in sides]
        rows.append((label(name), *told, "within noise" if row["within_noise"] else f"{row['ratio']:.2f}x"))
    return rows


def _unit(name: str) -> str:
    """Of a figure of `evaluation.speed`; rates are tokens per second."""
    named = {"bytes_on_disk": " MB", "peak_memory_mb": " MB", "load_seconds": " s"}
    return named.get(name, " ms" if "_ms_" in name else "/s")


def skipped(report: dict[str, Any]) -> list[str]:
    """What was not measured, and why."""
    reasons = []
    for name, title in (("quality", "quality"), ("speed", "speed")):
        record = report[name]
        if record is None:
            reasons.append(f"{title} was not measured: it was switched off")
        elif "skipped" in record:
            reasons.append(f"{title} was not measured: {record['skipped']}")
    if "skipped" in (report.get("glue") or {}):
        reasons.append(f"GLUE was not measured: {report['glue']['skipped'].rstrip('.')}")
    if "skipped" in (report.get("tasks") or {}):
        reasons.append(f"tasks were not measured: {report['tasks']['skipped']}")
    for side in ("base", "result"):
        record = (report["speed"] or {}).get(side, {})
        if "skipped" in record:
            reasons.append(f"speed of the {side} was not measured: {record['skipped']}")
    return reasons


def pruned(report: dict[str, Any]) -> list[str]:
    """Which blocks are gone, and what zeros gain; empty when nothing is."""
    rows = [row for row in report["linears"] if row.get("what") == "block"]
    gone = [row["name"] for row in rows if not row["kept"]]
    blocks = [f"{len(gone)} of {len(rows)} blocks are gone: {', '.join(gone)}"] if gone else []
    return [*blocks, *zeros(report)]


def chosen(report: dict[str, Any]) -> list[str]:
    """What targets and rounds of the recipe came to."""
    return [f"{told}." for told in (report["plan"] or {}).get("chosen", ())]


def zeros(report: dict[str, Any]) -> list[str]:
    """What pruned single weights gain and what they do not; empty when there are none."""
    merged: dict[
        str, dict[str, Any]
    ] = {}  # what several rounds, or pruning and then quantizing, left of each
    for row in report["linears"]:
        merged[row["name"]] = {**merged.get(row["name"], {}), **row}
    rows = [row for row in merged.values() if "sparsity" in row]
    gains = (
        (False, "Linears are zero: the file is smaller for it; memory and speed are a dense model's, since no kernel "
         "here skips zeros"),
        (True, "quantized Linears are zero: file, memory and speed are as without them, since a zero takes as many "
         "bits as any weight and no kernel here skips it"),
    )  # fmt: skip
    said = []
    for packed, gain in gains:
        chosen = [
            (row["shape"][0] * row["shape"][1], row["sparsity"]) for row in rows if ("bits" in row) == packed
        ]
        if chosen:
            share = sum(size * sparsity for size, sparsity in chosen) / sum(size for size, _ in chosen)
            said.append(f"{share:.0%} of the weights of {len(chosen)} {gain}")
    return said


def verdict(report: dict[str, Any]) -> str:
    """In one sentence, whether the result is faster; empty when that was not measured."""
    said = []
    for kind in ("decode", "prefill"):
        base, result = (rate(report["speed"], side, kind) for side in ("base", "result"))
        if base and result:
            said.append(f"{kind} is {_speed_word(result / base)}")
    if not said:
        return ""
    reason = ""
    if _figure(report["speed"], "result", "compiled_kernel") is False:
        reason = (
            " The compiled kernel for packed weights was not built, so torch's slower routes were measured: "
            "install llmslim with pip where there is a C compiler."
        )
    return f"On this machine {' and '.join(said)}.{reason}"


def memory(report: dict[str, Any]) -> str:
    """In one sentence, what a fresh process takes to run either; empty when that was not measured."""
    base, result = (_figure(report["speed"], side, "peak_memory_mb") for side in ("base", "result"))
    return f"{base:,.0f} MB of memory when run became {result:,.0f} MB." if base and result else ""


def worst_linears(report: dict[str, Any], count: int = 3) -> list[tuple[str, float]]:
    """The weights whose outputs moved most: (name, ||(W - W_q) X||^2 / ||W X||^2)."""
    known = [
        (row["name"], row["output_error"]) for row in report["linears"] if row.get("output_error") is not None
    ]
    return sorted(known, key=lambda entry: -entry[1])[:count]


def notes(report: dict[str, Any], count: int = 3) -> list[str]:
    """The first few notes, and how many there are in all."""
    listed = [f"{note['where']}: {note['what']}" for note in report["notes"][:count]]
    more = len(report["notes"]) - len(listed)
    return [*listed, f"... and {more} more in report.json"] if more > 0 else listed


def run_line(report: dict[str, Any]) -> str:
    """Memory and time of the run."""
    from llmslim.work import duration

    run = report["run"]
    cpu = sum(run["cpu_seconds"].values()) if isinstance(run["cpu_seconds"], dict) else run["cpu_seconds"]
    planned = report["plan"].get("peak_memory") if report.get("plan") else None
    plan = f" (planned {planned / 1e6:,.0f} MB)" if planned else ""
    resumed = "; resumed after an interruption" if run["resumed"] else ""
    return (
        f"The run held at most {run['peak_memory_mb']:,.0f} MB{plan} and took "
        f"{duration(run['wall_seconds'])}, {duration(cpu)} of CPU for the steps{resumed}."
    )


def _sizes(size: dict[str, Any]) -> list[Row]:
    base, result = size["base"], size["result"]
    smaller = base["bytes_on_disk"] / max(1, result["bytes_on_disk"])
    made = [Row("size on disk", *_megabytes(base, result, "bytes_on_disk"), f"{smaller:.2f}x smaller")]
    for label, name in (
        ("bits per weight, all", "bits_per_weight"),
        ("bits per weight, blocks", "bits_per_block_weight"),
    ):
        made.append(Row(label, f"{base[name]:.2f}", f"{result[name]:.2f}"))
    if "unique_parameters" in result:  # reports of earlier versions have none
        made.append(_parameters("parameters", base, result, "unique_parameters"))
        if result["effective_parameters"] != result["unique_parameters"]:
            label = "parameters, each use"
            made.append(_parameters(label, base, result, "effective_parameters"))
    return made


def _parameters(label: str, base: dict[str, Any], result: dict[str, Any], name: str) -> Row:
    change = f"{100 * (result[name] / base[name] - 1):+.1f} %" if result[name] != base[name] else ""
    return Row(label, f"{base[name] / 1e6:,.1f} M", f"{result[name] / 1e6:,.1f} M", change)


def _megabytes(base: dict[str, Any], result: dict[str, Any], name: str) -> tuple[str, str]:
    return f"{base[name] / 1e6:,.1f} MB", f"{result[name] / 1e6:,.1f} MB"


def _quality(quality: dict[str, Any]) -> list[Row]:
    if not quality:
        return []
    base, result = quality["base_perplexity"], quality["perplexity"]
    change = f"{100 * (result['value'] / base['value'] - 1):+.1f} %"
    agreement = {key: None if v is None else 100 * v for key, v in quality["top1_agreement"].items()}
    return [
        Row("perplexity", _spread(base, 2), _spread(result, 2), change),
        Row("KL from the base (nats)", "", _spread(quality["kl"], 4)),
        Row("top-1 agreement", "", _spread(agreement, 1) + " %"),
    ]


def _spread(estimate: dict[str, Any], digits: int) -> str:
    stderr = estimate.get("stderr")
    return f"{estimate['value']:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _speeds(speed: dict[str, Any] | None) -> list[Row]:
    made = []
    for kind in ("decode", "prefill"):
        base, result = (rate(speed, side, kind) for side in ("base", "result"))
        if base or result:
            change = _speed_word(result / base) if base and result else ""
            made.append(Row(f"{kind}, tokens/s", _or_dash(base, ".1f"), _or_dash(result, ".1f"), change))
    for label, name, form in (
        ("memory when run", "peak_memory_mb", ",.0f"),
        ("load time", "load_seconds", ".1f"),
    ):
        base, result = (_figure(speed, side, name) for side in ("base", "result"))
        if base or result:
            unit = " MB" if name == "peak_memory_mb" else " s"
            made.append(
                Row(label, _or_dash(base, form, unit), _or_dash(result, form, unit), _ratio(base, result))
            )
    return made


def rate(speed: dict[str, Any] | None, side: str, kind: str) -> float | None:
    """Tokens per second of a side, "decode" or "prefill"; None where that was not measured."""
    record = _figure(speed, side, kind)
    return record["tokens_per_second"] if record else None


def _figure(speed: dict[str, Any] | None, side: str, name: str) -> Any:
    return (_measured(speed).get(side) or {}).get(name)


def _measured(record: dict[str, Any] | None) -> dict[str, Any]:
    """The record, or nothing if it says that it was skipped."""
    return measured(record) or {}


def _speed_word(ratio: float) -> str:
    if ratio >= 1 + SAME:
        return f"{ratio:.2f}x the base's"
    return f"no faster ({ratio:.2f}x)" if ratio >= 1 - SAME else f"slower ({ratio:.2f}x)"


def _ratio(base: float | None, result: float | None) -> str:
    return f"{result / base:.2f}x" if base and result else ""


def _or_dash(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
