"""What a comparison takes of the reports of runs, and why figures of some are not of a kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import fmean
from typing import Any

from llmslim.report import figures

HEADINGS = ("run", "MB", "bits", "perplexity", "KL", "top-1", "decode/s", "prefill/s", "made by")


@dataclass(frozen=True)
class Run:
    """What a comparison needs of a run, or of the base of some; None for what was not measured."""

    name: str
    made_by: str
    bytes: int
    bits: float
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    kl: float | None = None
    agreement: float | None = None
    decode: float | None = None
    prefill: float | None = None
    scores: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)  # by task: value, stderr
    mean_score: float | None = None  # of the tasks that all scored runs have

    def label(self, best: bool) -> str:
        """The name; one that no other beats has a star."""
        return f"{self.name}\u00a0*" if best else self.name

    def cells(self, best: bool) -> tuple[str, ...]:
        """Of the table, by `HEADINGS`."""
        return (
            self.label(best),
            f"{self.bytes / 1e6:,.1f}",
            f"{self.bits:.2f}",
            _or_dash(self.perplexity, ",.2f", self.perplexity_stderr),
            _or_dash(self.kl, ".4f"),
            "-" if self.agreement is None else f"{self.agreement:.1%}",
            _or_dash(self.decode, ".1f"),
            _or_dash(self.prefill, ".1f"),
            self.made_by,
        )


def runs_of(names: Sequence[str], reports: Sequence[dict[str, Any]], with_base: bool) -> tuple[Run, ...]:
    """The runs, behind their base if that is asked for, with mean scores over the tasks that all scored ones have."""
    runs = [_run(name, report, "result") for name, report in zip(names, reports, strict=True)]
    if with_base:
        runs.insert(0, _base(reports))
    scored = [run.scores.keys() for run in runs if run.scores]
    shared = [name for name in next(iter(scored), ()) if all(name in other for other in scored)]
    return tuple(
        replace(run, mean_score=fmean(run.scores[name][0] for name in shared))
        if run.scores and shared
        else run
        for run in runs
    )


def task_table(runs: Sequence[Run], best: frozenset[int]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Headings and rows of the scores on tasks; no rows where none was scored, no mean of one."""
    names = list(dict.fromkeys(name for run in runs for name in run.scores))
    several = len(names) > 1
    rows = []
    for index, run in enumerate(runs):
        found = [run.scores.get(name, (None, None)) for name in names] + [(run.mean_score, None)] * several
        rows.append((run.label(index in best), *(_or_dash(value, ".3f", stderr) for value, stderr in found)))
    return ["run", *names] + ["mean"] * several, rows if names else []


def caveats(names: Sequence[str], reports: Sequence[dict[str, Any]]) -> list[str]:
    """Why figures of the runs are not of a kind."""
    told = []
    for what, of in (
        ("base models", lambda report: report["base"]["model"]),
        ("texts of the perplexity", _text),
        ("machines or settings of the speed", _machine),
        ("questions of the tasks", lambda report: (report.get("tasks") or {}).get("protocol", "")),
        ("examples of GLUE", lambda report: _examples(report.get("glue") or {})),
    ):
        values = {name: of(report) for name, report in zip(names, reports, strict=True)}
        different = dict.fromkeys(value for value in values.values() if value)
        if len(different) > 1:
            listing = "; ".join(
                f"{value}: {', '.join(name for name, other in values.items() if other == value)}"
                for value in different
            )
            told.append(f"The {what} differ, so those figures cannot be compared across them ({listing}).")
    return told


def _run(name: str, report: dict[str, Any], side: str) -> Run:
    quality = report["quality"] if report["quality"] and "perplexity" in report["quality"] else {}
    perplexity = quality.get("perplexity" if side == "result" else "base_perplexity", {})
    result = side == "result"
    return Run(
        name,
        figures.what_was_done(report) if result else report["base"]["model"],
        report["size"][side]["bytes_on_disk"],
        report["size"][side]["bits_per_weight"],
        perplexity.get("value"),
        perplexity.get("stderr"),
        quality["kl"]["value"] if quality and result else None,
        quality["top1_agreement"]["value"] if quality and result else None,
        figures.rate(report["speed"], side, "decode"),
        figures.rate(report["speed"], side, "prefill"),
        _scores(report, side),
    )


def _scores(report: dict[str, Any], side: str) -> dict[str, tuple[float, float | None]]:
    """Value and standard error of a side by task; GLUE's scores have none.

    Of lm-eval's tasks, the chief metrics that are shares of 1, so that a mean of them says something; without groups,
    whose tasks are there themselves.
    """
    value, stderr = ("base", "base_stderr") if side == "base" else ("value", "stderr")
    mains = {
        name: record["metrics"].get(record["main"], {})
        for name, record in (report.get("tasks") or {}).get("tasks", {}).items()
        if "group" not in record
    }
    found = {name: (main[value], main[stderr]) for name, main in mains.items() if main.get("share")}
    glue, score = (report.get("glue") or {}).get("tasks", {}), "score" if side == "result" else "base_score"
    return found | {name: (record[score], None) for name, record in glue.items() if score in record}


def _base(reports: Sequence[dict[str, Any]]) -> Run:
    """The base that the runs have in common: each figure from the first report that has it."""
    sides = [_run("base", report, "base") for report in reports]
    found = {one.name: [getattr(side, one.name) for side in sides] for one in fields(Run)}
    first: dict[str, Any] = {
        name: next((value for value in values if value is not None), None) for name, values in found.items()
    }
    return Run(**first | {"scores": {name: one for side in sides[::-1] for name, one in side.scores.items()}})


def _text(report: dict[str, Any]) -> str:
    found = (report["quality"] or {}).get("perplexity") or {}
    return (
        f"{found['protocol']} [{found['data_hash'][:8]}]"
        if found.get("data_hash")
        else found.get("protocol", "")
    )


def _examples(glue: dict[str, Any]) -> str:
    """Which ones a classifier was scored on; "" where it was not."""
    if "tasks" not in glue:
        return ""
    subset = glue.get("subset")
    return "all" if subset is None else f"the first {subset} of each split"


def _machine(report: dict[str, Any]) -> str:
    if figures.rate(report["speed"], "result", "prefill") is None:
        return ""
    machine = report["environment"]
    return f"{machine['device']} ({machine['cpu']}), {machine['threads']} threads"


def _or_dash(value: float | None, form: str, stderr: float | None = None) -> str:
    spread = "" if stderr is None else f" ± {stderr:{form}}"
    return "-" if value is None else f"{value:{form}}{spread}"
