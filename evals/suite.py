"""A standard suite on any model, beside a base: perplexity and divergence, lm-eval's tasks, speed and memory.

    python evals/suite.py quick MODEL [--vs BASE] [--data FOLDER]

The suites are suites/quick.yaml (minutes for a model of 135M), standard.yaml (half an hour) and full.yaml (hours);
each part runs in processes of its own, and a row goes to results/suite.json under the name SUITE/MODEL.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import record
import tables
import yaml

SUITES = sorted(path.stem for path in Path(__file__).with_name("suites").glob("*.yaml"))


def suite(name: str) -> dict[str, Any]:
    """What a suite asks for: version, perplexity, tasks, benchmark."""
    return yaml.safe_load(Path(__file__).with_name("suites").joinpath(f"{name}.yaml").read_text("utf-8"))


def commands(asked: dict[str, Any], model: str, base: str | None, data: str = "") -> dict[str, list[str]]:
    """The words of `llmslim` for each part."""
    text, tasks, speed = (dict(asked[part]) for part in ("perplexity", "tasks", "benchmark"))
    beside = ["--vs", base] if base else []
    place = f"{Path(data).absolute()}/" if data else ""
    numbers = {
        name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in speed.items()
    }
    return {
        "perplexity": [
            *("evaluate", model, *beside, "--perplexity", place + text["text"]),
            *("--windows", str(text["windows"]), "--seq-len", str(text["seq_len"]), "--json"),
        ],
        "tasks": [
            *("evaluate", model, *beside, "--tasks", ",".join(tasks["names"]), "--json"),
            *(["--limit", str(tasks["limit"])] if "limit" in tasks else []),
            *(["--data", data] if data else []),
        ],
        "benchmark": [
            *("benchmark", model, *beside, "--json"),
            *(
                word
                for name, value in numbers.items()
                for word in (f"--{name.replace('_', '-')}", str(value))
            ),
        ],
    }


def measure(options: Namespace) -> dict[str, Any]:
    """A row: what was asked, and what each part told."""
    asked = suite(options.suite)
    words = commands(asked, options.model, options.vs, options.data)
    told = {part: json.loads(record.run(record.llmslim(*said)).stdout) for part, said in words.items()}
    name = options.name or f"{options.suite}/{Path(options.model).name}"
    return {"name": name, "suite": asked, "model": options.model, "base": options.vs, **told}


def main() -> None:
    made = record.parser(__doc__ or "", "suite")
    made.add_argument("suite", choices=SUITES)
    made.add_argument("model")
    made.add_argument("--vs", metavar="BASE", help="compare with this model")
    made.add_argument("--name", help="of the row (default: SUITE/MODEL)")
    shared = record.ROOT.parent / "shared" / "data"
    made.add_argument(
        "--data", default=str(shared) if shared.is_dir() else "", help="folder of data sets (the Hub)"
    )
    options = record.parse(made)
    result = record.opened(options)
    record.put(result, measure(options), options.output)
    print(tables.suite(result))


if __name__ == "__main__":
    main()
