"""ARC-Easy, PIQA and LAMBADA for SmolLM2-135M and for what recipes make of it, each beside the base, paired.

    python evals/lm.py [--limit 500] [--variants base 'configs/*4bit']    --list names the variants

By `llmslim evaluate --tasks` (lm-eval, zero-shot, the first questions of each task) in the type that the machine is
fast at; the base answers once, in the same way, and its answers stay in the work folder beside those of the variants.
Perplexity and the making of the variants as in recipes.py.
"""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from typing import Any

import recipes
import record
import tables
import variants
from variants import Steps

TASKS = ("arc_easy", "piqa", "lambada_openai")
CONFIGS = (
    "rtn-8bit",
    "quality-5bit",
    "gptq-4bit",
    "prune-4bit",
    "shallow-4bit",
    "low-rank-4bit",
    "tiny-edge",
)


def chosen() -> dict[str, Steps]:
    """Name -> steps: the base, a pruned model, and the recipes of 4 bits and of several steps."""
    found = recipes.recipes()
    pruned: Steps = [{"mlp": {"ratio": 0.2, "multiple_of": 64, "criterion": "output"}}]
    return {"base": [], "pruned/channels-20%": pruned} | {
        f"configs/{name}": found[f"configs/{name}"] for name in CONFIGS
    }


def measure(name: str, options: Namespace) -> dict[str, Any]:
    """Make a variant and ask it the questions."""
    steps = chosen()[name]
    folder = options.work / name.replace("/", "-").replace("%", "")
    row = variants.measure(name, steps, options, keep=folder)
    model = str(folder) if steps else options.model
    words = ["--tasks", ",".join(TASKS), "--limit", str(options.limit), "--json"]
    words += ["--keep-answers", str(options.work / "answers")]
    words += ["--data", options.data] if options.data else []
    words += ["--vs", options.model] if steps else []
    done = record.run(record.llmslim("evaluate", model, *words))
    shutil.rmtree(folder, ignore_errors=True)
    figures = json.loads(done.stdout)
    asked = record.pick(figures, "tasks", "average", "verdict", "protocol", "batch_sizes", "dtype")
    return {
        **row,
        "options": settings(options),
        "lm": asked,
        "evaluate_cpu_seconds": round(done.cpu_seconds, 1),
    }


def settings(options: Namespace) -> dict[str, Any]:
    return {**variants.settings(options), "limit": options.limit}


def main() -> None:
    parser = variants.parser(__doc__ or "", "lm")
    parser.add_argument("--limit", type=int, default=500, help="questions of each task")
    options = record.parse(parser)
    variants.each(options, list(chosen()), measure, tables.lm, settings)


if __name__ == "__main__":
    main()
