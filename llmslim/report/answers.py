"""What was gained, what it cost, whether to trust it: the first screen of a report, in a few words each."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from llmslim.report import figures

TELLING = (
    2.0  # percent of perplexity: an interval that reaches further says too little for "no measurable loss"
)
SURE = 1.96  # standard errors on either side of a 95 % interval


@dataclass(frozen=True)
class Answer:
    """A question, its answer in a few words, what supports that, and whether it is good (None: neither)."""

    question: str
    short: str
    lines: tuple[str, ...]
    good: bool | None = None


def answers(report: dict[str, Any]) -> tuple[Answer, Answer, Answer]:
    """Gained, cost, trust; of a report that measured less, what it has."""
    return _gained(report), _cost(report), _trust(report)


def interval(estimate: dict[str, Any], digits: int, scale: float = 1.0, unit: str = "") -> str:
    """'0.110 [0.100, 0.120]': a mean and its 95 % interval, or the mean alone where nothing tells its error."""
    value, stderr = scale * estimate["value"], estimate.get("stderr")
    told = f"{value:.{digits}f}{unit}"
    if stderr is None:
        return told
    spread = SURE * scale * stderr
    return f"{told} [{value - spread:.{digits}f}, {value + spread:.{digits}f}]"


def increase(quality: dict[str, Any]) -> tuple[float, float, float] | None:
    """The relative increase of perplexity in percent with its 95 % interval, from paired differences.

    None where it was not measured. Both ends are the value where one window alone was measured.
    """
    rise = (quality or {}).get("nll_increase")
    if not rise or not math.isfinite(rise["value"]):
        return None
    spread = SURE * (rise["stderr"] or 0.0)
    low, middle, high = (_percent(rise["value"] + delta) for delta in (-spread, 0.0, spread))
    return middle, low, high


def blocks(report: dict[str, Any]) -> list[tuple[int, float]]:
    """The largest relative output error in each block, by its number; empty when no step looked at inputs."""
    found: dict[int, float] = {}
    for row in report["linears"]:
        number = re.search(r"\.(\d+)\.", f"{row['name']}.")
        if row.get("output_error") is not None and number:
            found[int(number[1])] = max(found.get(int(number[1]), 0.0), row["output_error"])
    return sorted(found.items())


def _gained(report: dict[str, Any]) -> Answer:
    base, result = (report["size"][side] for side in ("base", "result"))
    smaller = base["bytes_on_disk"] / max(1, result["bytes_on_disk"])
    sizes = f"{base['bytes_on_disk'] / 1e6:,.1f} MB on disk became {result['bytes_on_disk'] / 1e6:,.1f} MB."
    bits = f"{base['bits_per_weight']:.2f} bits per weight became {result['bits_per_weight']:.2f}."
    short = f"{smaller:.2f}x smaller" if smaller >= 1 else f"{1 / smaller:.2f}x larger"
    lines = (sizes, bits, figures.memory(report), _speed(report))
    return Answer("What did I gain?", short, lines, smaller > 1)


def _speed(report: dict[str, Any]) -> str:
    """What `benchmark --save` found, base and result in turns; else what the run measured once at its end."""
    kept = (report.get("benchmark") or {}).get("verdict", "").rstrip(".")
    return f"In turns with the base: {kept}." if kept else figures.verdict(report)


def _cost(report: dict[str, Any]) -> Answer:
    question, quality = "What did it cost?", report["quality"]
    rise = increase(quality or {})
    glue = report.get("glue") or {}
    if rise is None and "verdict" in glue:
        return _cost_on_glue(question, glue)
    if rise is None:
        reason = next((told for told in figures.skipped(report) if told.startswith("quality")), "")
        if quality and "perplexity" in quality:
            reason = "the perplexity of the result is not finite"
        return Answer(
            question, "not measured" if quality is None or "skipped" in quality else "all of it", (reason,)
        )
    middle, low, high = rise
    sure = quality["nll_increase"]["stderr"] is not None
    base, result = quality["base_perplexity"], quality["perplexity"]
    lines = [
        f"Perplexity {base['value']:.2f} became {result['value']:.2f}"
        + (f"; 95 % interval of the change {low:+.1f} to {high:+.1f} %, paired by window." if sure else "."),
        f"KL from the base {interval(quality['kl'], 4)} nats per token.",
        f"The likeliest token is the base's at {interval(quality['top1_agreement'], 1, 100.0, ' %')} of positions.",
    ]
    if scores := (report.get("tasks") or {}).get("verdict"):
        lines.append(f"On tasks: {scores.rstrip('.')}.")
    if sure and low <= 0 <= high:
        telling = high < TELLING
        short = "no measurable loss" if telling else "too few windows to tell"
        return Answer(question, short, tuple(lines), True if telling else None)
    worse = f"perplexity {middle:+.1f} %" if middle < 1000 else f"perplexity {middle / 100 + 1:,.3g} times"
    return Answer(question, worse, tuple(lines), middle < 0)


def _cost_on_glue(question: str, glue: dict[str, Any]) -> Answer:
    """Of a classifier, which was scored beside its base."""
    from llmslim.evaluation.paired import NO_LOSS, TOO_FEW

    found = [metric["verdict"] for task in glue["tasks"].values() for metric in task["metrics"].values()]
    lines = (f"On GLUE: {glue['verdict'].rstrip('.')}.",)
    if all(told.startswith(NO_LOSS) for told in found):
        return Answer(question, NO_LOSS, lines, True)
    if all(told.startswith((NO_LOSS, TOO_FEW)) for told in found):
        return Answer(question, TOO_FEW, lines)
    gap = 100 * (glue["average"] - glue["base_average"])
    return Answer(question, f"GLUE {gap:+.1f} points", lines, gap > 0)


def _trust(report: dict[str, Any]) -> Answer:
    question, found = "Can I trust it?", report["verification"]
    checks = found["checks"]
    if not found["ok"]:
        word = "not verified" if found["ok"] is None else "verification failed"
        return Answer(question, word, tuple(check["detail"] for check in checks if not check["ok"]), False)
    error = found.get("max_error")
    same = "" if error is None else f"; the largest difference of outputs from what was made is {error:.2g}"
    lines = [f"Loaded again in a fresh process: {len(checks)} checks passed{same}."]
    quality = report["quality"] or {}
    if "perplexity" in quality:
        told = quality["perplexity"]
        if "windows" in told:
            sized = f"{told['windows']} windows of {told['seq_len']} tokens"
            lines.append(f"Measured on {sized} of {told['text']}.")
    if told := (report.get("glue") or {}).get("protocol"):
        lines.append(f"Scored on {told}.")
    count = len(report["notes"])
    lines.append(
        "No fallbacks or warnings." if not count else f"{count} fallbacks and warnings, listed below."
    )
    return Answer(question, "verified", tuple(lines), True)


def _percent(rise: float) -> float:
    return 100.0 * math.expm1(min(rise, 700.0))
