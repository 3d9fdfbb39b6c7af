"""llmslim benchmark"""

from __future__ import annotations

from typing import Any

from llmslim.commands.common import add_model, add_save, check_save, saved, tell
from llmslim.flags import Parser


def parser(prog: str) -> Parser:
    made = Parser(
        prog,
        "Measure the speed of a model (prefill, decoding, time to the first token), its load time, the peak\n"
        "memory of a fresh process and its bytes on disk; with --vs another model in turns with it. Every\n"
        "figure is the median of the rounds, with the smallest and largest beside it, and differences that\n"
        "are no larger than that spread are called noise. Energy is told where the CPU counts it.",
        f"examples:\n  {prog} demo\n  {prog} out/demo --vs demo --batches 1,4 --lengths 32,512 --json",
    )
    add_model(made)
    made.add_argument("--vs", "--base", dest="base", metavar="MODEL", help="compare with this model")
    made.add_argument("--batches", metavar="N,N,...", help="sequences at a time (default: 1)")
    made.add_argument("--lengths", metavar="N,N,...", help="tokens of the prompts (default: 32,512)")
    made.add_argument(
        "--new-tokens", type=int, metavar="N", help="decoding steps after a prompt (default: 32)"
    )
    made.add_argument("--rounds", type=int, metavar="N", help="fresh processes of each model (default: 3)")
    made.add_argument("--repeats", type=int, metavar="N", help="timed runs in a process (default: 2)")
    made.add_argument(
        "--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: what is fast here)"
    )
    add_save(made)
    made.add_argument("--json", action="store_true", help="JSON on stdout, and nothing else")
    return made


def run(options: dict[str, Any]) -> None:
    from llmslim.evaluation.speed import Settings, compare_speed
    from llmslim.progress import progress_for

    check_save(options)
    given: dict[str, Any] = {
        name: options[name] for name in ("new_tokens", "repeats", "dtype") if name in options
    }
    given |= {name: _numbers(options[name], name) for name in ("batches", "lengths") if name in options}
    with progress_for() as progress:
        record = compare_speed(
            options["model"],
            options.get("base"),
            Settings(**given),
            rounds=options.get("rounds", 3),
            revision=options.get("revision"),
            progress=lambda done, total: progress("benchmark", done, total),
        )
    saved(options, "benchmark", record)
    tell(options, record, benchmark_text)


def _numbers(text: str, name: str) -> tuple[int, ...]:
    from llmslim.errors import UserError

    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise UserError(
            f"--{name} takes whole numbers with commas between, such as 1,4, not {text!r}."
        ) from error


def benchmark_text(record: dict[str, Any]) -> str:
    """The figures for a person: a line each, the base's and the ratio beside them."""
    from llmslim.evaluation.speed import label

    base, comparison = record["base"], record["comparison"] or {}
    lines = []
    for name, figure in sorted(record["model"]["figures"].items(), key=lambda item: "_b" not in item[0]):
        told = f"{label(name):<34}{_figure(name, figure)}"
        if base and name in comparison:
            row = comparison[name]
            ratio = "within noise" if row["within_noise"] else f"{row['ratio']:.2f}x"
            told += f"  base {_figure(name, base['figures'][name])}  {ratio}"
        lines.append(told)
    kinds = {side["dtype"] for side in (record["model"], base) if side}
    return "\n".join(
        [
            *lines,
            "",
            *([f"verdict: {record['verdict']}", ""] if record["verdict"] else []),
            f"median (smallest-largest) of {record['rounds']} rounds in fresh processes; tokens per second but where",
            f"a unit stands; {record['new_tokens']} new tokens; {record['threads']} threads; "
            f"{' and '.join(sorted(kinds))}",
            f"on {record['model']['device']}; energy {record['energy']}.",
        ]
    )


def _figure(name: str, figure: dict[str, float]) -> str:
    """12.3 (11.9-12.8), bytes in MB."""
    if name == "bytes_on_disk":
        return f"{figure['median'] / 1e6:.1f} MB"
    unit = {"load_seconds": " s", "peak_memory_mb": " MB"}.get(name, " ms" if "_ms_" in name else "")
    digits = 2 if figure["median"] < 10 else 1
    low, high = f"{figure['min']:.{digits}f}", f"{figure['max']:.{digits}f}"
    return f"{figure['median']:.{digits}f}{unit} ({low}-{high})"
