"""The report of a finished checkpoint in its three forms, and README.md, the model card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmslim.errors import UserError
from llmslim.files import write_atomically
from llmslim.report import figures
from llmslim.report.html import report_page
from llmslim.report.index import model_index
from llmslim.report.loading import auto_class, loading
from llmslim.report.markdown import report_markdown
from llmslim.report.schema import SCHEMA_VERSION, read_report
from llmslim.report.waterfall import steps_plot

if TYPE_CHECKING:
    from llmslim.loaders.models import ModelFiles


def write_report(folder: Path, report: dict[str, Any], base_files: ModelFiles) -> None:
    """Write report.json, report.md, report.html and README.md, the model card, into the folder of a checkpoint.

    And steps.svg, if steps were measured.

    Args:
        folder: holds the checkpoint's config.json already.
        report: as `pipeline.compress` makes it; a plot that could not be drawn is added to its notes.
        base_files: of the model it was made from; its card tells the license.
    """
    picture = None
    if report["steps"]:
        try:
            steps_plot(report, folder / "steps.svg")
            picture = "steps.svg"
        except UserError as error:  # the run is done: nothing else is lost
            report["notes"].append({"where": "steps.svg", "what": f"not drawn. {error}"})
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    card = model_card(report, config, _license(base_files.folder), picture)
    (folder / "README.md").write_text(card, "utf-8")
    _write_pages(folder, report, picture)


def add_to_report(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Keep what was measured later ("tasks", "glue", "benchmark") in the report of a run, in all forms but the card.

    Raises:
        UserError: the folder is no run.
    """
    report = {**read_report(folder), name: record, "schema_version": SCHEMA_VERSION}
    write_atomically(folder / "report.json", json.dumps(report, indent=2) + "\n")
    _write_pages(folder, report, "steps.svg" if (folder / "steps.svg").is_file() else None)


def _write_pages(folder: Path, report: dict[str, Any], picture: str | None) -> None:
    title = f"{Path(report['base']['model']).name}, {figures.what_was_done(report)}"
    shared = [
        _measurements(report),
        *_steps(report, picture),
        _fallbacks(report),
        _repeat(report),
        _environment(report),
    ]
    (folder / "report.md").write_text(report_markdown(report, title, shared), "utf-8")
    (folder / "report.html").write_text(report_page(report, command(report)), "utf-8")


def model_card(
    report: dict[str, Any], config: dict[str, Any], licensed: dict[str, Any], picture: str | None = None
) -> str:
    """The model card: YAML for the Hub, then what was done, what it cost, and how to load and repeat it.

    Args:
        licensed: the fields of the Hub's YAML about the license.
        picture: file beside the card that shows what each step left.
    """
    base = report["base"]["model"]
    sections = [
        f"---\n{_yaml(_front_matter(report, config, licensed))}---",
        f"# {Path(base).name}, {figures.what_was_done(report)}",
        f"Made from [`{base}`](https://huggingface.co/{base})" if is_hub_id(base) else f"Made from `{base}`",
    ]
    sections[-1] += f" by llmslim {report['llmslim']}, stored in the {report['format']} format."
    return (
        "\n\n".join(
            [
                *sections,
                loading(report["format"], config),
                _measurements(report),
                *_steps(report, picture),
                _fallbacks(report),
                _repeat(report),
                _environment(report),
            ]
        ).rstrip()
        + "\n"
    )


def is_hub_id(name: str) -> bool:
    """Whether a name can be a Hub id (owner/name) and is no folder here."""
    return (
        re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
        and not name.startswith(".")
        and not Path(name).exists()
    )


def _front_matter(report: dict[str, Any], config: dict[str, Any], licensed: dict[str, Any]) -> dict[str, Any]:
    kinds = [next(iter(step)) for step in report["recipe"]["steps"]]
    matter: dict[str, Any] = {"library_name": "transformers"}
    if is_hub_id(report["base"]["model"]):
        packed = any("bits" in row for row in report["linears"])  # the Hub knows no word for pruned
        relation = "quantized" if packed else "finetune"
        matter |= {"base_model": report["base"]["model"], "base_model_relation": relation}
    matter |= licensed
    if auto_class(config) == "AutoModelForCausalLM":
        matter["pipeline_tag"] = "text-generation"
    widths = sorted({f"{row['bits']}-bit" for row in report["linears"] if "bits" in row})
    form = [] if report["format"] == "plain" else [report["format"]]
    matter["tags"] = list(dict.fromkeys(["llmslim", *kinds, *widths, *form]))
    if index := model_index(report, f"{Path(report['base']['model']).name}, {figures.what_was_done(report)}"):
        matter["model-index"] = index
    return matter


def _measurements(report: dict[str, Any]) -> str:
    lines = ["## What it cost", "", "| | base | result | change |", "|---|---:|---:|---:|"]
    lines += [f"| {row.label} | {row.base} | {row.result} | {row.change} |" for row in figures.rows(report)]
    lines += ["", *figures.chosen(report), figures.run_line(report), figures.verdict(report)]
    quality = report["quality"]
    if quality and "perplexity" in quality:
        lines.append(
            f"Perplexity: {quality['perplexity']['protocol']}; ± is the standard error over windows."
        )
    lines += [f"Scores: {told}" for told in figures.protocols(report)]
    lines += [
        f"{reason[0].upper()}{reason[1:]}." for reason in (*figures.pruned(report), *figures.skipped(report))
    ]
    if worst := figures.worst_linears(report):
        lines += ["", "Largest relative output errors on the calibration text:", ""]
        lines += [f"- `{name}`: {error:.3g}" for name, error in worst]
    return "\n".join(lines)


def _steps(report: dict[str, Any], picture: str | None) -> list[str]:
    lines = figures.steps(report)
    if not lines:
        return []
    rows = ["## After each step", "", f"| | {' | '.join(figures.STEP_HEADINGS)} |", "|---|---:|---:|---:|"]
    rows += [f"| {' | '.join((line.label, *line.cells))} |" for line in lines]
    rows += ["", f"![size and perplexity after each step]({picture})"] if picture else []
    return ["\n".join(rows)]


def _fallbacks(report: dict[str, Any]) -> str:
    if not report["notes"]:
        return "## Fallbacks\n\nNone."
    listed = "\n".join(f"- {note}" for note in figures.notes(report, count=20))
    return f"## Fallbacks\n\n{len(report['notes'])} notes:\n\n{listed}"


def _repeat(report: dict[str, Any]) -> str:
    recipe = _yaml(report["recipe"])
    text = ""
    if report["calibration"]:
        text = (
            f"\n\nCalibration: {report['calibration']['protocol']}. SHA-256 of its tokens: "
            f"`{report['calibration']['data_hash']}`."
        )
    return (
        f"## Repeat it\n\nSave as `recipe.yaml`:\n\n```yaml\n{recipe}```\n\n```\n{command(report)}\n```{text}"
    )


def command(report: dict[str, Any]) -> str:
    """The command that makes the same again, from recipe.yaml."""
    base, revision = report["base"], report["base"].get("revision")
    spec = base["spec"] if base["spec"] == "demo" or is_hub_id(base["spec"]) else "MODEL"
    at = f" --revision {revision}" if revision else ""
    return f"llmslim compress {spec} recipe.yaml{at} --output FOLDER"


def _environment(report: dict[str, Any]) -> str:
    machine = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"## Made on\n\n{machine['platform']}, {machine['device']} ({machine['cpu']}), "
        f"{machine['threads']} threads, computing in {machine['compute_dtype']}; Python {machine['python']}, "
        f"{versions}. All figures, with the error of every Linear, are in `report.json`; `report.html` draws them."
    )


def _yaml(value: Any) -> str:
    """As it reads best: no escapes, and no text (a path, say) broken over two lines."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1_000)


def _license(folder: Path) -> dict[str, Any]:
    """The license that the base's own card or configuration names, in the fields of the Hub's YAML.

    A name that the Hub has no identifier for becomes `other` with that name beside it.
    """
    card = folder / "README.md"
    head: Any = {}
    if card.is_file():
        front = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text("utf-8", errors="replace"), re.DOTALL)
        try:
            head = yaml.safe_load(front[1]) if front else {}
        except yaml.YAMLError:
            head = {}
    if not isinstance(head, dict) or not isinstance(head.get("license"), str):
        head = {"license": json.loads((folder / "config.json").read_text("utf-8")).get("license")}
    name = head["license"]
    if not isinstance(name, str) or not name.strip():
        return {}
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        return {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-")}
    beside = {key: head[key] for key in ("license_name", "license_link") if isinstance(head.get(key), str)}
    return {"license": name, **beside}
