"""Flags and choices that several verbs share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmslim.errors import UserError
from llmslim.flags import Parser, number_or_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmslim.kvcache.settings import KVSettings

MODEL = "a Hub id, a folder, a .gguf file, or demo"


def add_model(parser: Parser) -> None:
    """MODEL and what finds it."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a Hub model")


def add_device(parser: Any) -> None:
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ... (default: the GPU if there is one, else the CPU)",
    )


def add_adapter(parser: Any) -> None:
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="a peft adapter beside the model, such as OUTPUT/adapter"
    )


def add_save(parser: Any) -> None:
    parser.add_argument(
        "--save",
        action="store_true",
        help="keep the figures in the report of MODEL, the output of a run; with --base",
    )


def check_save(options: dict[str, Any]) -> None:
    """Before measuring: whether there is a report to keep figures in, and a base to compare with.

    Raises:
        UserError: there is not.
    """
    if not options.get("save"):
        return
    from llmslim.report.card import is_hub_id
    from llmslim.report.schema import read_report

    base = read_report(Path(options["model"]))["base"]
    named = options.get("base")
    spec = base.get("spec", base["model"])
    # a path of another machine, or typed in another folder: it cannot be told
    gone = spec != "demo" and not is_hub_id(spec) and not Path(spec).expanduser().exists()
    if named is None or not (gone or any(_same(named, known) for known in (base["model"], spec))):
        told = "" if named is None else f", not {named!r}"
        raise UserError(
            f"--save keeps figures beside those of {base['model']!r}, which the run started from: name it with "
            f"--base{told}."
        )
    for name in ("adapter", *(key for key in options if key.startswith("kv_"))):
        if name in options:
            raise UserError(
                f"--save keeps figures of the model as it is in {options['model']}: leave out "
                f"--{name.replace('_', '-')}, or --save."
            )


def _same(named: str, known: str) -> bool:
    """Whether two words name one model: they are the same, or of the same folder."""
    if named == known:
        return True
    one, other = Path(named).expanduser(), Path(known).expanduser()
    return one.exists() and other.exists() and one.samefile(other)


def saved(options: dict[str, Any], name: str, record: dict[str, Any]) -> None:
    """Keep figures in the report if that was asked for."""
    if not options.get("save"):
        return
    from llmslim.report.card import add_to_report

    add_to_report(Path(options["model"]), name, record)
    print(f"Kept in {options['model']}/report.html (.md, .json).", file=sys.stderr)


def add_kv_cache(parser: Any) -> None:
    """The flags of a quantized KV cache."""
    group = parser.add_argument_group("a quantized KV cache, for long texts")
    group.add_argument(
        "--kv-bits",
        type=number_or_text,
        metavar="N|auto",
        help="keep keys and values in 2, 3, 4 or 8 bits; auto: each layer in its own, measured first (default: as "
        "they are)",
    )
    group.add_argument(
        "--kv-value-bits",
        type=int,
        metavar="N",
        help="bits of the values, where --kv-bits are those of the keys, which need more (default: the same)",
    )
    group.add_argument(
        "--kv-budget",
        type=float,
        metavar="X",
        help="mean bits of the layers with --kv-bits auto, such as 3.0",
    )
    group.add_argument(
        "--kv-method",
        metavar="kivi|token|rotated|pca",
        help="keys per channel and values per token, both per token, both rotated, or keys in their principal "
        "components, measured first, and values rotated, which is best at 2 bits (default: kivi)",
    )
    group.add_argument(
        "--kv-evict",
        metavar="streaming|knorm|snapkv",
        help="drop older tokens for good: the oldest, keys of large norm, or those least attended to (default: none)",
    )
    group.add_argument(
        "--kv-keep", type=float, metavar="X", help="share of the tokens that stays with --kv-evict"
    )


def kv_settings(options: dict[str, Any]) -> tuple[KVSettings | None, float | None]:
    """What was asked of the KV cache, and the budget of mean bits that its layers are to share.

    Raises:
        UserError: a kind without bits, or values that there are not.
    """
    from llmslim.kvcache.allocation import check_budget
    from llmslim.kvcache.settings import KVSettings

    names, budget = ("bits", "value_bits", "method", "evict", "keep"), options.get("kv_budget")
    fields = {name: options[f"kv_{name}"] for name in names if f"kv_{name}" in options}
    if (fields.get("bits") == "auto") != (budget is not None):
        raise UserError("--kv-bits auto and --kv-budget go together, such as --kv-budget 3.0.")
    if budget is not None:
        check_budget(budget)
        del fields["bits"]
        if "value_bits" in fields:
            raise UserError("--kv-bits auto finds the bits of values too: leave out --kv-value-bits.")
        return KVSettings.of(**fields), budget
    if not fields:
        return None, None
    if "bits" not in fields and not fields.keys() & {"method", "value_bits"}:
        fields["bits"] = 16  # eviction alone
    if "bits" not in fields:
        given = "--kv-method" if "method" in fields else "--kv-value-bits"
        raise UserError(f"{given} says how a KV cache is quantized: give --kv-bits too, such as --kv-bits 4.")
    return KVSettings.of(**fields), None


def kv_attach(
    model: PreTrainedModel, tokenizer: Any, settings: KVSettings | None, budget: float | None
) -> None:
    """Give the model such a KV cache, with what must be measured before, such as bits within a budget."""
    if settings is None:
        return
    from llmslim.kvcache.allocation import fitted, told
    from llmslim.kvcache.runtime.cache import attach
    from llmslim.progress import progress_for

    with progress_for() as progress:
        settings = fitted(
            settings, budget, model, tokenizer, lambda done, total: progress("kv_cache", done, total)
        )
    if budget is not None:
        print(f"KV cache: {told(settings)} bits of keys/values, layer by layer.", file=sys.stderr)
    attach(model, settings)


def tell(options: dict[str, Any], figures: dict[str, Any], text: Callable[[dict[str, Any]], Any]) -> None:
    """Figures on stdout: with --json as they are, else in the words of `text`."""
    if options.get("json"):
        print(json.dumps(figures, indent=2))
    else:
        show(text(figures))


def show(renderable: Any, *, to_stderr: bool = False) -> None:
    """Print a rich table or text; 100 columns where there is no terminal."""
    from rich.console import Console

    console = Console(stderr=to_stderr)
    if not console.is_terminal:
        console = Console(file=sys.stderr if to_stderr else sys.stdout, width=100)
    if isinstance(renderable, str):  # which names files: "[draft]" in it is no markup
        console.print(renderable, markup=False, emoji=False, highlight=False, soft_wrap=True)
    else:
        console.print(renderable)
