"""llmslim evaluate"""

from __future__ import annotations

import json
from typing import Any

from llmslim.commands.common import add_device, add_model, device_of, show
from llmslim.flags import Parser, add_field

GLUE_ALONE = ("data", "subset")
PERPLEXITY_ALONE = {  # by the flag that sets it
    "base": "--base",
    "text": "--perplexity",
    "seq_len": "--seq-len",
    "windows": "--windows",
    "join": "--join",
    "stream": "--stream",
    "adapter": "--adapter",
}


def parser(prog: str) -> Parser:
    from llmslim.recipe import Evaluation

    made = Parser(
        prog,
        "Measure the perplexity of a causal language model on a text, and with --base how far it is from\n"
        "another model on the same tokens: KL divergence and agreement on the most probable token. Every\n"
        "figure has its standard error, and the protocol is printed with it. With --glue, score a classifier\n"
        "on GLUE tasks by their official metrics, with 95 % confidence intervals.",
        "examples:\n"
        f"  {prog} demo --perplexity builtin\n"
        f"  {prog} out/demo --base demo --windows 64 --json \\\n"
        "      --perplexity Salesforce/wikitext:wikitext-2-raw-v1:test\n"
        f"  {prog} out/sst2 --glue sst2",
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
        "--adapter", metavar="FOLDER", help="a peft adapter beside the model, such as OUTPUT/adapter"
    )
    made.add_argument(
        "--stream", action="store_true", help="hold one block at a time: for models larger than memory"
    )
    made.add_argument(
        "--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: what is fast here)"
    )
    glue = made.add_argument_group("scores of a classifier on GLUE")
    glue.add_argument(
        "--glue", metavar="TASK,...", help="of cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli"
    )
    glue.add_argument(
        "--data", metavar="FOLDER", help="holds nyu-mll/glue in the Hub's layout (default: the Hub)"
    )
    glue.add_argument(
        "--subset", type=int, metavar="N", help="the first N examples alone, for a quick look (default: all)"
    )
    add_device(made)
    made.add_argument("--json", action="store_true", help="JSON on stdout, and nothing else")
    return made


def run(options: dict[str, Any]) -> None:
    from llmslim.errors import UserError

    if "glue" in options:
        foreign = next((flag for name, flag in PERPLEXITY_ALONE.items() if name in options), None)
        if foreign:
            raise UserError(f"{foreign} is about perplexity, and --glue scores a classifier: leave one out.")
        _run_glue(options)
        return
    foreign = next((name for name in GLUE_ALONE if name in options), None)
    if foreign:
        raise UserError(f"--{foreign} is for the scores on GLUE: name the tasks with --glue, such as sst2.")
    _run_perplexity(options)


def _run_glue(options: dict[str, Any]) -> None:
    from llmslim.evaluation.glue import evaluate_glue
    from llmslim.progress import progress_for

    with progress_for() as progress:
        figures = evaluate_glue(
            options["model"],
            [name.strip() for name in options["glue"].split(",") if name.strip()],
            data=options.get("data", ""),
            subset=options.get("subset"),
            revision=options.get("revision"),
            dtype=options.get("dtype"),
            device=device_of(options),
            progress=lambda done, total: progress("evaluate", done, total),
        )
    if options.get("json"):
        print(json.dumps(figures, indent=2))
    else:
        show(glue_text(figures))


def glue_text(figures: dict[str, Any]) -> str:
    """The scores for a person, with their intervals and protocol."""
    lines = []
    for name, record in figures["tasks"].items():
        of = "" if record["examples"] == record["total"] else f" of {record['total']}"
        for metric, found in record["metrics"].items():
            value, low, high = (100 * found[key] for key in ("value", "low", "high"))
            label = f"{name} {metric.replace('_', ' ')}"
            lines.append(
                f"{label:<28}{value:6.2f}  [{low:.2f}, {high:.2f}]  {record['examples']}{of} examples"
            )
    if len(figures["tasks"]) > 1:
        lines.append(f"{'average':<28}{100 * figures['average']:6.2f}")
    where = f"computed in {figures['dtype']} on {figures['device']}."
    return "\n".join([*lines, "", f"protocol: {figures['protocol']};", where])


def _run_perplexity(options: dict[str, Any]) -> None:
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
            adapter=options.get("adapter"),
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
