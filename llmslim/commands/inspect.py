"""llmslim inspect"""

from __future__ import annotations

import json
from typing import Any

from llmslim.commands.common import add_model, show
from llmslim.flags import Parser


def parser(prog: str) -> Parser:
    made = Parser(
        prog,
        "Show how llmslim sees a model: blocks, heads, KV heads, widths, parameters and bytes by part, and\n"
        "what it cannot match. Reads the configuration, not the weights; compressed folders too.",
        "examples:\n  llmslim inspect demo\n  llmslim inspect Qwen/Qwen3-0.6B --json",
    )
    add_model(made)
    made.add_argument("--json", action="store_true", help="JSON on stdout, and nothing else")
    return made


def run(options: dict[str, Any]) -> None:
    from llmslim.anatomy.inspect import render
    from llmslim.inspection import inspect

    facts = inspect(options["model"], options.get("revision"))
    if options.get("json"):
        print(json.dumps(facts, indent=2))
        return
    show(render(facts))
    if facts["format"]:
        show(f"Compressed: {facts['format']} format, {facts['bits_per_weight']:.2f} bits per weight.")
