"""llmslim inspect"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmslim.commands.common import add_device, add_model, show
from llmslim.errors import UserError
from llmslim.flags import Parser, add_field

CALIBRATION = "calibration."
FLAGS = {"text": "--calibration", "num_samples": "--num-samples", "seq_len": "--seq-len"}


def parser(prog: str) -> Parser:
    from llmslim.recipe import Calibration

    made = Parser(
        prog,
        "Show how llmslim sees a model: blocks, heads, KV heads, widths, parameters and bytes by part, and\n"
        "what it cannot match. Reads the configuration, not the weights; compressed folders too.\n\n"
        "With --sensitivity also what each head, group of channels and block is worth on a text, block by block: the\n"
        "share of a block's output that is lost when they go, alone and when what stays is refitted.",
        "examples:\n  llmslim inspect demo\n  llmslim inspect Qwen/Qwen3-0.6B --json\n"
        "  llmslim inspect demo --sensitivity --output out/sensitivity",
    )
    add_model(made)
    made.add_argument("--json", action="store_true", help="JSON on stdout, and nothing else")
    group = made.add_argument_group("options of --sensitivity")
    group.add_argument(
        "--sensitivity", action="store_true", help="measure it; takes about a minute per 100M parameters"
    )
    for name, flag in FLAGS.items():
        add_field(group, CALIBRATION + name, Calibration.model_fields[name], flag=flag)
    group.add_argument("--seed", type=int, help="chooses the calibration windows (default: 0)")
    group.add_argument(
        "--output",
        metavar="FOLDER",
        help="also write sensitivity.json and a plot, sensitivity.svg; must not exist",
    )
    add_device(group)
    return made


def run(options: dict[str, Any]) -> None:
    from llmslim.anatomy.inspect import render
    from llmslim.inspection import inspect

    _refuse_unused(options)
    if options.get("sensitivity"):
        _sensitivity(options)
        return
    facts = inspect(options["model"], options.get("revision"))
    if options.get("json"):
        print(json.dumps(facts, indent=2))
        return
    show(render(facts))
    if facts["format"]:
        show(f"Compressed: {facts['format']} format, {facts['bits_per_weight']:.2f} bits per weight.")


def _refuse_unused(options: dict[str, Any]) -> None:
    typed = [key for key in options if key.startswith(CALIBRATION) or key in ("output", "seed", "device")]
    if typed and not options.get("sensitivity"):
        name = typed[0].removeprefix(CALIBRATION)
        raise UserError(
            f"{FLAGS.get(name, f'--{name}')} is an option of --sensitivity: give that too, or leave it out."
        )


def _sensitivity(options: dict[str, Any]) -> None:
    from llmslim.inspection import sensitivity
    from llmslim.progress import progress_for
    from llmslim.recipe import Recipe
    from llmslim.report.sensitivity import pyplot, sensitivity_plot, sensitivity_table
    from llmslim.work import check_output

    folder = Path(options["output"]) if "output" in options else None
    if folder is not None:
        pyplot()  # refused before the work, not after it
        if folder.exists():
            raise UserError(f"The output {str(folder)!r} exists already; give another --output.")
        check_output(folder, overwrite=False)  # whether it can be written
    named = {
        key.removeprefix(CALIBRATION): value for key, value in options.items() if key.startswith(CALIBRATION)
    }
    recipe = Recipe.checked(steps=(), calibration=named, seed=options.get("seed", 0))
    device = options.get("device")
    with progress_for() as progress:
        found = sensitivity(
            options["model"],
            recipe.calibration,
            seed=recipe.seed,
            revision=options.get("revision"),
            device=device,
            progress=progress,
        )
    if folder is not None:
        folder.mkdir(parents=True)
        (folder / "sensitivity.json").write_text(json.dumps(found, indent=1) + "\n")
        sensitivity_plot(found["blocks"], tuple(found["shares"]), folder / "sensitivity.svg")
    if options.get("json"):
        print(json.dumps(found, indent=2))
        return
    show(sensitivity_table(found["blocks"], tuple(found["shares"])))
    if folder is not None:
        print(f"Saved to {folder}: sensitivity.json and sensitivity.svg.")
