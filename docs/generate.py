"""Write the pages of docs/ that follow from the code, the recipes and the committed results.

scripts/docs             write them
scripts/docs --check     exit 1 when a page differs, or is one too many
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path[:0] = [str(ROOT), str(ROOT / "evals"), str(DOCS)]

import decisions  # noqa: E402
import render  # noqa: E402

from llmslim.commands.run import STEP, step_parser  # noqa: E402
from llmslim.flags import default_text  # noqa: E402
from llmslim.step import ROOMS, STEPS, Step, load_steps  # noqa: E402

NEEDS = {
    "prune": "prune before you quantize",
    "factorize": "factorize before you quantize",
    "share": "share before you quantize, train afterwards",
}
SAID: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 8, "group_size": "channel"},
    "gptq": {"bits": 4, "group_size": 64},
    "autoround": {"bits": 4, "group_size": 64},
    "bnb": {"bits": 4},
    "qat": {"bits": 2, "group_size": 64},
    "mlp": {"ratio": 0.25, "criterion": "output"},
    "heads": {"ratio": 0.33},
    "layers": {"ratio": 0.1},
    "experts": {"ratio": 0.25},
    "width": {"ratio": 0.1},
    "kv_groups": {"kv_heads": 1},
    "student": {"layers": 20},
    "wanda": {"sparsity": 0.5},
    "sparsegpt": {"pattern": "2:4"},
    "magnitude": {"sparsity": 0.5},
    "taylor": {"sparsity": 0.5},
    "snip": {"sparsity": 0.5},
    "grasp": {"sparsity": 0.5},
    "random": {"sparsity": 0.5},
    "rewind": {"source": "demo"},
    "svd": {"ratio": 0.1, "update": True},
    "asvd": {"ratio": 0.1},
    "svd_llm": {"ratio": 0.1, "allocation": "error"},
    "share": {"unique_blocks": 22, "delta_rank": 64},
    "response": {"alpha": 0.5, "max_minutes": 10},
    "features": {"max_minutes": 10},
    "relations": {"max_minutes": 10},
    "full": {"max_minutes": 10},
    "lora": {"max_minutes": 15},
    "scales": {"max_minutes": 12},
    "finetune": {"glue": "sst2"},
}
"""What the example of a method sets; the rest stays at its defaults."""
MODELS = {
    "experts": "Qwen/Qwen3-30B-A3B",
    "rewind": "out/wanda",
    "full": "out/mlp",
    "lora": "out/gptq",
    "scales": "out/qat",
    "response": "out/layers",
    "features": "out/layers",
    "relations": "out/layers",
}
"""What the example of a method starts from, if not the demo model."""
HEAD = "<!-- Made by scripts/docs from {source}: change that, not this. -->"


def pages() -> dict[str, str]:
    """Every generated page by its path below docs/."""
    load_steps()
    made = {f"methods/{kind}.md": method_page(kind, STEPS[kind]) for kind in sorted(STEPS)}
    made["methods/README.md"] = methods_index()
    made["recipes.md"] = recipes_page()
    made["choosing.md"] = with_tables((DOCS / "choosing.md").read_text("utf-8"))
    return made


# --- methods ------------------------------------------------------------------------------------------------


def methods_index() -> str:
    parts = ["# Methods", HEAD.format(source="the classes of the methods")]
    parts.append("What each does, with which paper, is in [README](../../README.md#methods) in one table.")
    by_room = sorted(STEPS.values(), key=lambda cls: ROOMS.index(cls.__module__.split(".")[1]))
    for verb in dict.fromkeys(cls.verb for cls in by_room):  # whatever was imported first
        kinds = sorted(kind for kind, cls in STEPS.items() if cls.verb == verb)
        lines = [f"- [`{kind}`]({kind}.md): {prose(first_line(STEPS[kind]))}" for kind in kinds]
        parts.append(f"## {verb}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def method_page(kind: str, cls: type[Step]) -> str:
    """A method's page, from its class, README's row and the measured rows with a step of that name."""
    source = Path(inspect.getfile(cls)).relative_to(ROOT).as_posix()
    parts = [f"# `{kind}`", HEAD.format(source=source), prose(inspect.cleandoc(cls.__doc__ or ""))]
    parts.append("\n".join(facts(kind, cls, source)))
    parts.append(f"## Example\n\n{example(kind, cls)}")
    parts.append(f"## Options\n\n{options_table(cls)}")
    parts.append(f"## Measured\n\n{measured(kind)}")
    return "\n\n".join(parts) + "\n"


def first_line(cls: type[Step]) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def facts(kind: str, cls: type[Step], source: str) -> list[str]:
    """What a reader asks first: where it is, whether it reads a text, what it leaves."""
    step = cls()
    calibration = "none" if not step.needs_calibration else "reads a text (`--calibration`)"
    lines = [
        f"- Verb: `llmslim {cls.verb}`" + (f"; {NEEDS[cls.verb]}." if cls.verb in NEEDS else "."),
        f"- Class: `llmslim.{cls.__name__}` in [{source}](../../{source}).",
        f"- Calibration: {calibration}.",
        f"- Format written: {readme_formats()[kind]} ([formats](../formats.md)).",
    ]
    if copies := getattr(step, "survey_copies", 0):
        beside = ", and the teacher" if getattr(step, "distills", False) and step.keeps_other else ""
        lines.append(f"- Memory: the whole model, {copies} times its weights in float32 at the peak{beside}.")
    papers = dict.fromkeys(re.findall(r"arXiv:([\d.]+\d)", cls.__doc__ or ""))
    if papers:
        lines.append(
            "- Papers: " + ", ".join(f"[arXiv:{p}](https://arxiv.org/abs/{p})" for p in papers) + "."
        )
    return lines


def readme_formats() -> dict[str, str]:
    """The last column of README's table of methods, by method."""
    table = (ROOT / "README.md").read_text("utf-8").split("\n## Methods\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): row[-1].strip() for row in rows}


def example(kind: str, cls: type[Step]) -> str:
    """The same step as a command, as a recipe and in Python; tests/test_docs.py reads all three."""
    said, model, output = SAID.get(kind, {}), MODELS.get(kind, "demo"), f"out/{kind}"
    method = "" if kind == cls.verb else f" --method {kind}"
    flags = "".join(f" {decisions.flag(name, value)}" for name, value in said.items())
    entry = yaml.safe_dump(said, default_flow_style=True, sort_keys=False, width=1000).strip()
    arguments = ", ".join(f"{name}={literal(value)}" for name, value in said.items())
    texts = cls(**said).needs_calibration
    text = "\ncalibration: {text: builtin, num_samples: 32, seq_len: 512}" if texts else ""
    return (
        f"```sh\npython -m llmslim {cls.verb} {model}{method}{flags} --output {output}\n```\n\n"
        f"As a step of a recipe:\n\n```yaml\nsteps:\n  - {kind}: {entry}{text}\n```\n\n"
        f'From Python:\n\n```python\nimport llmslim\n\nllmslim.compress(\n    "{model}",\n'
        f'    [llmslim.{cls.__name__}({arguments})],\n    output="{output}",\n)\n```'
    )


def literal(value: Any) -> str:
    """A value as formatted Python has it."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def options_table(cls: type[Step]) -> str:
    """A row for each field: flag, key of a recipe, type, default, description."""
    flags = {action.dest: action.option_strings for action in step_parser("llmslim", cls.verb)._actions}
    rows = []
    for name, field in cls.model_fields.items():
        default = default_text(field.get_default(call_default_factory=True)) or "none"
        words = ", ".join(f"`{word}`" for word in flags[STEP + name])
        kind = type_text(field.annotation) + bounds(field.metadata)
        rows.append([f"`{name}`", words, kind, f"`{default}`", prose(field.description or "")])
    lines = [["key", "flag", "type", "default", "meaning"], ["---"] * 5, *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def type_text(annotation: Any) -> str:
    """A field's type in words: 'whole number', '`a` or `b`'."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{word}`" for word in inside)
    if origin in (Union, UnionType):
        return " or ".join(type_text(part) for part in inside if part is not type(None))
    if origin is tuple:
        return f"list of {type_text(inside[0])}"
    if origin is dict:
        return "mapping of names to options"
    names = {int: "whole number", float: "number", str: "text", bool: "on or off"}
    return names.get(annotation) or (
        type_text(inside[0]) if inside else getattr(annotation, "__name__", "value")
    )


def bounds(metadata: list[Any]) -> str:
    """A field's limits: ', at least 0'."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = [
        f"{said} {getattr(limit, key):g}"
        for limit in metadata
        for key, said in words.items()
        if hasattr(limit, key)
    ]
    return "".join(f", {text}" for text in found)


def prose(text: str) -> str:
    """A docstring as Markdown: papers are links, and indices of formulas no emphasis."""
    parts = re.split(r"(`[^`]*`)", text)
    for index in range(0, len(parts), 2):
        part = re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", parts[index])
        parts[index] = re.sub(r"(?<![A-Za-z0-9\\])_|\*(?! )", lambda found: chr(92) + found[0], part)
    return "".join(parts)


def measured(kind: str) -> str:
    """The committed rows with a step of that name, in the tables that README has."""
    parts = []
    for name, (title, section) in render.SECTIONS.items():
        path = ROOT / "evals" / "results" / f"{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text("utf-8"))
        rows = result["rows"] if name == kind else rows_of(result["rows"], kind)  # a file of the method's own
        if any(row["name"] != "base" for row in rows):
            tables = [part for part in section({**result, "rows": rows}).split("\n\n") if worth(part)]
            parts.append("\n\n".join([f"**{title}**", *tables, f"Measured on {render.where(result)}"]))
    return "\n\n".join(parts) or "Not among the committed results (`evals/results`)."


def rows_of(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Those with the step, the base, and what the trained ones started from."""
    chosen = [row for row in rows if kind in kinds_of(row)]
    starts = {f"{row['name'].split('/')[0]}/untrained" for row in chosen}
    return [row for row in rows if row in chosen or row["name"] in starts | {"base"}]


def kinds_of(row: dict[str, Any]) -> set[str]:
    steps = row.get("steps") or row.get("recipe") or []
    return {kind for step in steps if isinstance(step, dict) for kind in step}


def worth(part: str) -> bool:
    """Whether a paragraph of a section says something here: no pictures, no table of the base alone."""
    lines = part.splitlines()
    empty = part.startswith("|") and all(line.startswith("| float32") for line in lines[2:])
    return not part.startswith("![") and not empty


# --- recipes and the choice ---------------------------------------------------------------------------------


def recipes_page() -> str:
    parts = ["# Recipes", HEAD.format(source="configs/ and evals/results")]
    parts.append(
        "A recipe is a list of steps that run in order. Each of these is run on a tiny model by the tests, and "
        "with its first line as the command. `key=value` behind a recipe changes one value of it: "
        "`gptq.bits=3`, `calibration.text=mine.txt`. How the steps of a recipe fit together is in "
        "[README](../README.md#use-it)."
    )
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        comment, _, body = path.read_text("utf-8").partition("\n\n")
        command, *words = [line.lstrip("#").strip() for line in comment.splitlines()]
        said = " ".join(words).strip()
        figure = decisions.recipe_figure(path.stem)
        parts.append(
            f"## {path.stem}\n\n{said}\n\n```sh\n{command}\n```\n\n```yaml\n{body.strip()}\n```\n\n{figure}"
        )
    return "\n\n".join(parts) + "\n"


def with_tables(text: str) -> str:
    """A page with its generated tables between their markers."""
    for name, table in decisions.TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"docs/choosing.md needs the lines {begin} and {end}, once each.")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table()}\n{end}{rest.split(end)[1]}"
    return text


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="scripts/docs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--check", action="store_true")
    check = made.parse_args(argv).check
    wanted = pages()
    stray = [path for path in (DOCS / "methods").glob("*.md") if f"methods/{path.name}" not in wanted]
    differ = [name for name, text in wanted.items() if not is_text(DOCS / name, text)]
    if check and (differ or stray):
        names = ", ".join([*differ, *(f"methods/{path.name}" for path in stray)])
        print(f"docs/ is not what the code says ({names}): run scripts/docs.", file=sys.stderr)
        return 1
    for name in differ:
        (DOCS / name).parent.mkdir(exist_ok=True)
        (DOCS / name).write_text(wanted[name], "utf-8")
    for path in stray:
        path.unlink()
    return 0


def is_text(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text("utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
