"""The command line. Verbs that change a model come from the steps: their `verb`, and flags from their fields.

stdout holds results alone; plans, progress and messages go to stderr. Exit codes: 0 done, 1 the machine could
not (memory, disk) or a defect of llmslim, 2 a request that cannot be met, 130 interrupted.
"""

from __future__ import annotations

import ast
import errno
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmslim.errors import UserError, VerificationError, nearest
from llmslim.flags import Parser


@dataclass(frozen=True)
class Verb:
    """One word of the command line.

    Attributes:
        summary: one line for `llmslim --help`.
        parser: makes the parser; imports what its flags need.
        run: does it, with what was typed.
    """

    summary: str
    parser: Callable[[str], Parser]
    run: Callable[[dict[str, Any]], None]


def verbs() -> dict[str, Verb]:
    """All verbs in the order of help; importing nothing heavy."""
    from llmslim.commands import benchmark, compare, evaluate, generate, inspect, push, run

    steps = {
        verb: Verb(summary, lambda prog, verb=verb: run.step_parser(prog, verb), run.run_step)  # type: ignore[misc]
        for verb, summary in step_verbs().items()
    }
    return {
        "inspect": Verb(
            "show a model's blocks, heads, widths, parameters and bytes", inspect.parser, inspect.run
        ),
        **steps,
        "compress": Verb("run a recipe of one or several steps", run.recipe_parser, run.run_recipe),
        "evaluate": Verb(
            "measure perplexity, task scores, and the divergence from a base", evaluate.parser, evaluate.run
        ),
        "benchmark": Verb(
            "measure speed, memory and bytes, beside another model", benchmark.parser, benchmark.run
        ),
        "generate": Verb("continue a prompt", generate.parser, generate.run),
        "compare": Verb("lay runs side by side: size, quality, speed", compare.parser, compare.run),
        "push": Verb("publish a verified checkpoint, its card and report on the Hub", push.parser, push.run),
    }


def step_verbs() -> dict[str, str]:
    """Verb -> summary of the room with most of its methods, read from the source: importing rooms imports torch."""
    homes: dict[str, Counter[Path]] = {}
    for room in sorted(Path(__file__).parent.glob("*/__init__.py")):
        for source in sorted(room.parent.glob("*.py")):
            for verb in re.findall(r'^    verb\b[^=\n]*= "(\w+)"', source.read_text("utf-8"), re.MULTILINE):
                homes.setdefault(verb, Counter())[room] += 1
    return {
        verb: room_docstring(rooms.most_common(1)[0][0]).splitlines()[0].rstrip(".")
        for verb, rooms in homes.items()
    }


def room_docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or path.parent.name


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        _dispatch(argv)
        return 0
    except (UserError, VerificationError) as error:
        if "--debug" in argv:
            raise
        return _complain(str(error), 2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        resumes = "--output" in " ".join(argv) and argv[0] in {*step_verbs(), "compress"}
        on = " The same command goes on where this one stopped." if resumes else ""
        return _complain(f"interrupted.{on}", 130)
    except BrokenPipeError:  # `llmslim inspect MODEL | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        reason = exhausted(error)
        if reason is None or "--debug" in argv:
            raise
        return _complain(reason, 1)


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if argv[0] == "--version":
        import llmslim

        print(f"llmslim {llmslim.__version__}")
        return
    name, known = argv[0], verbs()
    if name not in known:
        raise UserError(f"Unknown command {name!r}{nearest(name, known)}; there are {', '.join(known)}.")
    quiet(verbose="-v" in argv or "--verbose" in argv)
    parser = known[name].parser(f"llmslim {name}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the libraries' logs and warnings")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads to compute with")
    options = parser.parse(argv[1:])
    if "threads" in options:
        use_threads(options["threads"])
    known[name].run(options)


def overview() -> str:
    """What `llmslim --help` prints."""
    rows = [f"  {name:<10} {verb.summary}" for name, verb in verbs().items()]
    return "\n".join(
        [
            "llmslim makes a Hugging Face model smaller and faster, and proves what that cost.",
            "",
            "usage: llmslim COMMAND MODEL [options]",
            "",
            "commands:",
            *rows,
            "",
            "MODEL is a Hub id, a folder, a .gguf file, or demo. Try:",
            "  llmslim inspect demo",
            "  llmslim quantize demo --method gptq --bits 4 --output smollm2-4bit",
            "  llmslim generate smollm2-4bit 'The capital of France is'",
            "",
            "`llmslim COMMAND --help` explains a command; `llmslim --version` tells the version.",
        ]
    )


def quiet(verbose: bool) -> None:
    """Silence the libraries' logs, warnings and bars (before they are imported), unless asked not to."""
    if verbose:
        return
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # peft imports it, and it tells of kernels it lacks
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def use_threads(number: int) -> None:
    if number < 1:
        raise UserError(f"--threads {number} is too few: it takes at least 1.")
    import torch

    os.environ["OMP_NUM_THREADS"] = str(number)  # for the processes that a run starts
    torch.set_num_threads(number)


def exhausted(error: BaseException) -> str | None:
    """What ran out, if that is what the error means."""
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return (
            "the disk is full. Free some space and give the same command again: it goes on where it stopped."
        )
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if memory or "can't allocate memory" in text:
        return (
            "memory ran out. Fewer --num-samples or a shorter --seq-len need less (--plan tells how much), "
            "and `evaluate --stream` holds one block at a time."
        )
    return None


def _complain(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
