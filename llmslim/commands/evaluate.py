"""llmslim evaluate"""

from __future__ import annotations

import json
from typing import Any

from llmslim.commands.common import add_device, add_model, device_of, show
from llmslim.flags import Parser, add_field


def parser(prog: str) -> Parser:
    from llmslim.recipe import Evaluation

    made = Parser(
        prog,
        "Measure the perplexity of a causal language model on a text, and with --base how far it is from\n"
        "another model on the same tokens: KL divergence and agreement on the most probable token. Every\n"
        "figure has its standard error, and the protocol is printed with it.",
        "examples:\n"
        f"  {prog} demo --perplexity builtin\n"
        f"  {prog} out/demo --base demo --windows 64 --json \\\n"
        "      --perplexity Salesforce/wikitext:wikitext-2-raw-v1:test",
    )
    add_model(made)
    made.add_argument(
        "--base", metavar="MODEL", help="compare with this model: KL divergence, top-1 agreement"
    )
    fields = Evaluation.model_fields
    add_field(made, "text", fields["text"], flag="--perplexity")
    add_field(made, "seq_len", fields["seq_len"])
    add_field(made, "windows", fields["windows"])
    made.add_argument(
        "--join",
        action="store_true",
        help="join rows by a blank line, as the GPTQ papers do (default: concatenate them as they are)",
    )
    made.add_argument(
        "--stream", action="store_true", help="hold one block at a time: for models larger than memory"
    )
    made.add_argument(
        "--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: what is fast here)"
    )
    add_device(made)
    made.add_argument("--json", action="store_true", help="JSON on stdout, and nothing else")
    return made


def run(options: dict[str, Any]) -> None:
    from pydantic import ValidationError

    from llmslim.errors import UserError
    from llmslim.evaluation.run import evaluate
    from llmslim.progress import progress_for
    from llmslim.recipe import Evaluation
    from llmslim.step import explain

    given = {name: options[name] for name in ("text", "seq_len", "windows") if name in options}
    try:
        choice = Evaluation(**given, join="\n\n" if options.get("join") else "")
    except ValidationError as error:
        raise UserError(explain(error, "evaluate", Evaluation)) from error
    with progress_for() as progress:
        figures = evaluate(
            options["model"],
            choice.text,
            base=options.get("base"),
            seq_len=choice.seq_len,
            windows=choice.windows,
            join=choice.join,
            streamed=options.get("stream", False),
            revision=options.get("revision"),
            dtype=options.get("dtype"),
            device=device_of(options),
            progress=lambda done, total: progress("evaluate", done, total),
        )
    if options.get("json"):
        print(json.dumps(figures, indent=2))
    else:
        show(text_of(figures))


def text_of(figures: dict[str, Any]) -> str:
    """The figures for a person, with their protocol."""

    def line(label: str, name: str, digits: int, scale: float = 1.0, unit: str = "") -> str:
        stderr = figures.get(f"{name}_stderr")
        spread = "" if stderr is None else f" ± {scale * stderr:.{digits}f}"
        return f"{label:<20}{scale * figures[name]:.{digits}f}{spread}{unit}"

    lines = [line("perplexity", "perplexity", 3)]
    if "base_perplexity" in figures:
        lines += [
            line("  of the base", "base_perplexity", 3),
            line("nll increase", "nll_increase", 4, unit=" nats per token (paired, by window)"),
            line("KL from the base", "kl", 4, unit=" nats per token"),
            line("top-1 agreement", "top1_agreement", 2, 100.0, " %"),
        ]
    lines += [
        "",
        f"protocol: {figures['protocol']}; exp of the mean over {figures['tokens']} predicted tokens;",
        f"computed in {figures['dtype']} on {figures['device']}; ± is the standard error over windows.",
        f"data hash {figures['data_hash'][:16]}",
    ]
    return "\n".join(lines)
