"""The kinds of KV caches that `kv_cache.py` compares, and what they are tried on.

`full` is attended to by transformers' sdpa. METHOD-B has B bits everywhere; METHOD-K/V has K of keys and V of values;
METHOD-autoB gives the keys and the values of each layer bits of their own, B in the mean, by their sensitivity on the
first 2,048 tokens of WikiText-2 validation, in windows of 1,024. Components of `pca` are of the first 16,384 there, in
windows of 2,048, with `@builtin` of what `--kv-method pca` takes by itself, 1,024 tokens of Python's documentation.
`quanto` is transformers' QuantizedCache with that
backend (optimum-quanto), which is not of this project's environment.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

CHUNK = 128
"""Tokens of a text that are read at once, so that those after read quantized what is older."""


def cache_of(kind: str, model: Any, options: Namespace) -> Any:
    """A new cache of that kind for the model, whose attention is set to what reads it.

    Args:
        options: of the script; in the work folder the bits of layers stay that `auto` found.
    """
    from transformers.cache_utils import DynamicCache, QuantizedCache

    from llmslim.kvcache.runtime.cache import NAME, KVCache
    from llmslim.kvcache.settings import KVSettings

    method, _, bits = kind.partition("-")
    bits, _, text = bits.partition("@")
    model.set_attn_implementation("sdpa" if method in ("full", "quanto") else NAME)
    if method == "full":
        return DynamicCache(config=model.config)
    if method == "quanto":
        config = model.config
        return QuantizedCache("quanto", config, nbits=int(bits), q_group_size=64, residual_length=128)
    if bits.startswith("auto"):
        return KVCache(model.config, method=method, bits=layer_bits(kind, options))
    keys, _, values = bits.partition("/")
    settings = KVSettings.of(method=method, bits=int(keys), value_bits=int(values or keys))
    return KVCache(model.config, with_measured(settings, text, options) if method == "pca" else settings)


def with_measured(settings: Any, text: str, options: Namespace) -> Any:
    """The settings with the components of the keys, which stay in the work folder."""
    from llmslim.kvcache.allocation import fitted
    from llmslim.kvcache.components import fit_kv_components
    from llmslim.kvcache.store import read_setting, write_setting
    from llmslim.loaders.texts import sample

    kept = Path(options.work) / f"components{text}"
    if not kept.is_dir():
        kept.mkdir(parents=True)
        model, tokenizer = demo("float32")
        if text:
            found = fitted(settings, None, model, tokenizer)
        else:
            windows = sample(f"{wikitext(options)}:validation", tokenizer, 8, 2048).tokens
            found = fit_kv_components(model, windows, settings=settings)
        write_setting(kept, found)
    stored = read_setting(kept)
    assert stored is not None
    return settings.model_copy(update={"components": stored.components})


def layer_bits(kind: str, options: Namespace) -> list[list[int]]:
    """What each layer gets within the budget in the kind's name, as the step `kv_cache` finds it."""
    kept = Path(options.work) / f"{kind}.json"
    if not kept.exists():
        from llmslim.kvcache.allocation import allocate_kv_bits
        from llmslim.loaders.texts import sample

        method, _, budget = kind.partition("-auto")
        model, tokenizer = demo("float32")
        text = sample(f"{wikitext(options)}:validation", tokenizer, 2, 1024)
        found = allocate_kv_bits(model, text.tokens, float(budget), method=method)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found.layer_bits))
    return list(json.loads(kept.read_text()))


def demo(dtype: str) -> Any:
    import llmslim

    return llmslim.load("demo", dtype=dtype)


def wikitext(options: Namespace) -> str:
    prefix = f"{Path(options.data).absolute()}/" if options.data else ""
    return f"{prefix}Salesforce/wikitext:wikitext-2-raw-v1"
