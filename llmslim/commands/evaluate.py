"""llmslim evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmslim.commands.common import (
    add_adapter,
    add_device,
    add_kv_cache,
    add_model,
    add_save,
    check_save,
    kv_settings,
    saved,
    tell,
)
from llmslim.flags import Parser, add_field

KINDS = {  # what is measured, by the flag that asks for it; perplexity when none does
    "text": ("--perplexity", "perplexity"),
    "glue": ("--glue", "the scores of a classifier on GLUE"),
    "tasks": ("--tasks", "the scores on lm-eval's tasks"),
}
ALONE = {  # which kinds a flag is for
    "base": ("text", "glue", "tasks"),
    "adapter": ("text", "tasks"),
    "seq_len": ("text",),
    "windows": ("text",),
    "join": ("text",),
    "stream": ("text",),
    "data": ("glue", "tasks"),
    "subset": ("glue",),
    "limit": ("tasks",),
    "num_fewshot": ("tasks",),
    "chat_template": ("tasks",),
    "batch_size": ("tasks",),
    "keep_answers": ("tasks",),
    "save": ("glue", "tasks"),
    "kv_bits": ("text", "tasks"),
    "kv_value_bits": ("text", "tasks"),
    "kv_method": ("text", "tasks"),
    "kv_budget": ("text", "tasks"),
    "kv_evict": ("text", "tasks"),
    "kv_keep": ("text", "tasks"),
}


def parser(prog: str) -> Parser:
    from llmslim.recipe import Evaluation

    made = Parser(
        prog,
        "Measure the perplexity of a causal language model on a text, and with --base how far it is from\n"
        "another model on the same tokens: KL divergence and agreement on the most probable token. Every\n"
        "figure has its standard error, and the protocol is printed with it. With --tasks, score the model on\n"
        "tasks of lm-eval, and with --base the base on the same questions. With --glue, score a classifier on\n"
        "GLUE tasks by their official metrics, with 95 % confidence intervals, and with --base another one on\n"
        "the same examples.",
        "examples:\n"
        f"  {prog} demo --perplexity builtin\n"
        f"  {prog} out/demo --base demo --windows 64 --json \\\n"
        "      --perplexity Salesforce/wikitext:wikitext-2-raw-v1:test\n"
        f"  {prog} out/demo --base demo --tasks arc_easy,piqa,lambada_openai --limit 500\n"
        f"  {prog} out/sst2 --glue sst2\n"
        f"  {prog} out/sst2-half --base out/sst2 --glue sst2 --save",
    )
    add_model(made)
    made.add_argument(
        "--base",
        "--vs",
        metavar="MODEL",
        help="compare with this model: KL divergence, top-1 agreement; scores question by question",
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
    add_adapter(made)
    made.add_argument(
        "--stream", action="store_true", help="hold one block at a time: for models larger than memory"
    )
    made.add_argument(
        "--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: what is fast here)"
    )
    made.add_argument(
        "--data",
        metavar="FOLDER",
        help="holds the data sets of --tasks or --glue in the Hub's layout, such as FOLDER/baber/piqa (default: "
        "the Hub)",
    )
    add_save(made)
    _add_tasks(made.add_argument_group("scores on tasks of lm-eval"))
    add_kv_cache(made)
    _add_glue(made.add_argument_group("scores of a classifier on GLUE"))
    add_device(made)
    made.add_argument("--json", action="store_true", help="JSON on stdout, and nothing else")
    return made


def _add_tasks(lm: Any) -> None:
    lm.add_argument(
        "--tasks",
        metavar="TASK,...",
        help="names of tasks or groups, such as arc_easy,piqa,lambada_openai, or .yaml files that define one",
    )
    lm.add_argument(
        "--limit", type=int, metavar="N", help="the first N questions of each task alone (default: all)"
    )
    lm.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="solved examples before each question (default: what the task says)",
    )
    lm.add_argument("--chat-template", action="store_true", help="ask as the user of a chat")
    lm.add_argument(
        "--batch-size", type=int, metavar="N", help="sequences at a time (default: what fits into memory)"
    )
    lm.add_argument(
        "--keep-answers",
        metavar="FOLDER",
        help="keep each model's answers there: after a kill, or beside another model, none is asked for twice",
    )


def _add_glue(glue: Any) -> None:
    glue.add_argument(
        "--glue", metavar="TASK,...", help="of cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli"
    )
    glue.add_argument(
        "--subset", type=int, metavar="N", help="the first N examples alone, for a quick look (default: all)"
    )


def run(options: dict[str, Any]) -> None:
    kind = _kind(options)
    {"text": _run_perplexity, "glue": _run_glue, "tasks": _run_tasks}[kind](options)


def _kind(options: dict[str, Any]) -> str:
    """What is to be measured.

    Raises:
        UserError: two things at once, or a flag that is about another.
    """
    from llmslim.errors import UserError

    asked = [kind for kind in KINDS if kind in options]
    if len(asked) > 1:
        flags = " and ".join(KINDS[kind][0] for kind in asked)
        raise UserError(f"{flags} are different measurements: ask for one at a time.")
    chosen = asked[0] if asked else "text"
    for name, kinds in ALONE.items():
        if name in options and chosen not in kinds:
            flag = "--" + name.replace("_", "-")
            about = " or ".join(f"{KINDS[kind][1]} ({KINDS[kind][0]})" for kind in kinds)
            raise UserError(f"{flag} is about {about}: leave it out, or ask for that.")
    return chosen


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _run_tasks(options: dict[str, Any]) -> None:
    from llmslim.evaluation.lm import evaluate_tasks
    from llmslim.progress import progress_for

    check_save(options)
    given = {name: options[name] for name in ("limit", "num_fewshot", "batch_size") if name in options}
    settings, budget = kv_settings(options)
    with progress_for() as progress:
        figures = evaluate_tasks(
            options["model"],
            _names(options["tasks"]),
            base=options.get("base"),
            data=options.get("data", ""),
            chat_template=options.get("chat_template", False),
            adapter=options.get("adapter"),
            kv_cache=settings,
            kv_budget=budget,
            keep_answers=Path(options["keep_answers"]) if "keep_answers" in options else None,
            revision=options.get("revision"),
            dtype=options.get("dtype"),
            device=options.get("device"),
            progress=progress,
            **given,
        )
    saved(options, "tasks", figures)
    tell(options, figures, tasks_text)


def kv_text(figures: dict[str, Any]) -> list[str]:
    """Lines about a quantized KV cache that the model had."""
    if "kv_cache" not in figures:
        return []
    cache = figures["kv_cache"]
    lines = [
        f"KV cache            {cache['told']} bits ({cache['method']}), read in chunks of {cache['chunk']}"
    ]
    if cache["evict"]:
        lines.append(f"tokens evicted      all but {cache['keep']:g} ({cache['evict']})")
    return lines


def tasks_text(figures: dict[str, Any]) -> str:
    """The scores for a person: of the model, of the base, and the difference in words."""
    lines = []
    for name, record in figures["tasks"].items():
        of = f"{record['questions']} of {record['total']} questions" if "questions" in record else "group"
        lines.append(f"{name} ({of})")
        for metric, found in record["metrics"].items():
            told = [f"  {metric:<12}{_score(found['value'], found['stderr'])}"]
            if "base" in found:
                told.append(f"base {_score(found['base'], found['base_stderr'])}")
            lines.append("  ".join([*told, *([found["verdict"]] if "verdict" in found else [])]))
    if figures.get("average"):
        mean = figures["average"]
        gap = 100 * mean["difference"], 100 * mean["difference_stderr"]
        lines.append(f"average difference of the first accuracies: {gap[0]:+.2f} ± {gap[1]:.2f} points")
    lines += kv_text(figures)
    if "verdict" in figures:
        lines += ["", f"verdict: {figures['verdict']}"]
    return "\n".join(
        [
            *lines,
            "",
            f"protocol: {figures['protocol']};",
            f"computed in {figures['dtype']} on {figures['device']}; ± is the standard error over questions, and of a",
            "difference that over what changed question by question.",
        ]
    )


def _score(value: float, stderr: float | None) -> str:
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def _run_glue(options: dict[str, Any]) -> None:
    from llmslim.evaluation.glue import evaluate_glue
    from llmslim.progress import progress_for

    check_save(options)
    with progress_for() as progress:
        figures = evaluate_glue(
            options["model"],
            _names(options["glue"]),
            base=options.get("base"),
            data=options.get("data", ""),
            subset=options.get("subset"),
            revision=options.get("revision"),
            dtype=options.get("dtype"),
            device=options.get("device"),
            progress=lambda done, total: progress("evaluate", done, total),
        )
    saved(options, "glue", figures)
    tell(options, figures, glue_text)


def glue_text(figures: dict[str, Any]) -> str:
    """The scores for a person, with their intervals and protocol: of the model, of the base, and what lies between."""

    def line(label: str, *value: float, sign: str = "") -> str:
        told, low, high = (f"{100 * one:{sign}.2f}" for one in value)
        return f"{label:<28}{told:>6}  [{low}, {high}]"

    lines = []
    for name, record in figures["tasks"].items():
        of = "" if record["examples"] == record["total"] else f" of {record['total']}"
        for metric, found in record["metrics"].items():
            label = f"{name} {metric.replace('_', ' ')}"
            own = line(label, found["value"], found["low"], found["high"])
            lines.append(f"{own}  {record['examples']}{of} examples")
            if "base" in found:
                gap = (found[f"difference{end}"] for end in ("", "_low", "_high"))
                lines.append(line("  of the base", found["base"], found["base_low"], found["base_high"]))
                lines.append(line("  difference", *gap, sign="+"))
    if len(figures["tasks"]) > 1:
        lines.append(f"{'average':<28}{100 * figures['average']:6.2f}")
        if "base_average" in figures:
            lines.append(f"{'  of the base':<28}{100 * figures['base_average']:6.2f}")
    if "verdict" in figures:
        lines += ["", f"verdict: {figures['verdict']}"]
    where = f"computed in {figures['dtype']} on {figures['device']}."
    return "\n".join([*lines, "", f"protocol: {figures['protocol']};", where])


def _run_perplexity(options: dict[str, Any]) -> None:
    from llmslim.evaluation.run import evaluate
    from llmslim.progress import progress_for
    from llmslim.recipe import Evaluation
    from llmslim.step import checked

    given: dict[str, Any] = {
        name: options[name] for name in ("text", "seq_len", "windows") if name in options
    }
    choice = checked(Evaluation, "evaluate", {**given, "join": "\n\n" if options.get("join") else ""})
    settings, budget = kv_settings(options)
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
            kv_cache=settings,
            kv_budget=budget,
            revision=options.get("revision"),
            dtype=options.get("dtype"),
            device=options.get("device"),
            progress=lambda done, total: progress("evaluate", done, total),
        )
    tell(options, figures, text_of)


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
    lines += kv_text(figures)
    lines += [
        "",
        f"protocol: {figures['protocol']}; exp of the mean over {figures['tokens']} predicted tokens;",
        f"computed in {figures['dtype']} on {figures['device']}; ± is the standard error over windows.",
        f"data hash {figures['data_hash'][:16]}",
    ]
    return "\n".join(lines)
