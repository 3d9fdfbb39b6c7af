"""The kinds of KV caches that `kv_cache.py` compares, and what they are tried on.

`full` is attended to by transformers' sdpa. METHOD-B has B bits everywhere; METHOD-autoB gives each layer its own bits,
B in the mean, by their sensitivity on a built-in text. `quanto` is transformers' QuantizedCache with that backend
(optimum-quanto), which is not of this project's environment.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

CHUNK = 128
"""Tokens of a text that are read at once, so that those after read quantized what is older."""


def cache_of(kind: str, model: Any, known: Path | None = None) -> Any:
    """A new cache of that kind for the model, whose attention is set to what reads it.

    Args:
        known: the work folder, where the bits of layers that `auto` found stay.
    """
    from transformers.cache_utils import DynamicCache, QuantizedCache

    from llmslim.kvcache.runtime.cache import NAME, KVCache

    method, _, bits = kind.partition("-")
    model.set_attn_implementation("sdpa" if method in ("full", "quanto") else NAME)
    if method == "full":
        return DynamicCache(config=model.config)
    if method == "quanto":
        config = model.config
        return QuantizedCache("quanto", config, nbits=int(bits), q_group_size=64, residual_length=128)
    if bits.startswith("auto"):
        assert known is not None
        return KVCache(model.config, method=method, bits=layer_bits(kind, known))
    return KVCache(model.config, method=method, bits=int(bits))


def layer_bits(kind: str, folder: Path) -> list[int]:
    """What each layer gets within the budget in the kind's name, by the built-in text as `--kv-bits auto` has it."""
    kept = folder / f"{kind}.json"
    if not kept.exists():
        from llmslim.kvcache.allocation import within
        from llmslim.kvcache.settings import KVSettings

        method, _, budget = kind.partition("-auto")
        model, tokenizer = demo("float32")
        found = within(float(budget), model, tokenizer, KVSettings.of(method=method))
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found.layer_bits))
    return list(json.loads(kept.read_text()))


def demo(dtype: str) -> Any:
    import llmslim

    return llmslim.load("demo", dtype=dtype)


def wikitext(options: Namespace) -> str:
    prefix = f"{Path(options.data).absolute()}/" if options.data else ""
    return f"{prefix}Salesforce/wikitext:wikitext-2-raw-v1"
