"""llmslim generate"""

from __future__ import annotations

from typing import Any

from llmslim.commands.common import (
    add_adapter,
    add_device,
    add_kv_cache,
    add_model,
    kv_attach,
    kv_settings,
)
from llmslim.flags import Parser

_OPTIONS = ("max_new_tokens", "chat", "temperature", "seed")


def parser(prog: str) -> Parser:
    made = Parser(
        prog,
        "Continue a prompt; the continuation is streamed to stdout. Greedy, so the same every time, unless\n"
        "--temperature is given.",
        "examples:\n"
        "  llmslim generate demo 'The capital of France is' --max-new-tokens 20\n"
        "  llmslim generate out/demo 'Name three primes.' --chat --temperature 0.7\n"
        "  llmslim generate demo 'A long story:' --kv-bits 4\n"
        "  llmslim generate out/demo 'The capital of France is' --adapter out/demo/adapter",
    )
    add_model(made)
    made.add_argument("prompt", metavar="PROMPT", help="the text to continue, or with --chat a message")
    made.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens to generate (default: 40)")
    made.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    made.add_argument(
        "--temperature", type=float, metavar="X", help="sample at this temperature (default: 0)"
    )
    made.add_argument("--seed", type=int, metavar="N", help="of the sampling (default: 0)")
    add_adapter(made)
    made.add_argument("--dtype", metavar="TYPE", help="to compute in (default: what is fast here)")
    add_kv_cache(made)
    add_device(made)
    return made


def run(options: dict[str, Any]) -> None:
    from llmslim.checkpoint.load import load_model
    from llmslim.evaluation.run import check_adapter
    from llmslim.generation import generate
    from llmslim.loaders.models import find, find_device
    from llmslim.recovery.lora import with_adapter

    settings, budget = kv_settings(options)
    adapter = options.get("adapter")
    files = find(options["model"], options.get("revision"))
    if adapter is not None:
        check_adapter(adapter, files, streamed=False)
    device = find_device(options.get("device"))
    model, tokenizer = load_model(files, options.get("dtype"), device), files.tokenizer()
    kv_attach(model, tokenizer, settings, budget)
    if adapter is not None:
        model = with_adapter(model, adapter)
    given = {name: options[name] for name in _OPTIONS if name in options}
    generate(model, tokenizer, options["prompt"], lambda piece: print(piece, end="", flush=True), **given)
    print()
