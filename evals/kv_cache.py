"""Quantized KV caches of SmolLM2-135M: perplexity, bytes, memory, speed and text, beside the full cache.

    python evals/kv_cache.py [--variants 'quality/*']    --list names the variants

- quality/METHOD-BITS: perplexity and KL divergence in float32 over 4 windows of 2,048 tokens of WikiText-2 test, read
  in chunks of 128 tokens, so that all but the newest 128 tokens and the first 4 are read quantized.
- memory/KIND: a fresh process fills a cache of 8,000 tokens with random keys and values, layer by layer, and decodes
  16 tokens in bfloat16: bytes that the cache holds, and how far that raised the peak of the process's memory.
- speed/KIND: one process decodes 8 tokens at 8,000 with each of the full and the quantized cache, in turns; medians.
- text/kivi-8: 20 prompts of WikiText-2 in one padded batch, 256 tokens each, greedy, float32: how many are as with the
  full cache before the first that differs.

METHOD-autoB gives each layer its own bits, B in the mean, by their sensitivity on a built-in text. `full` is attended
to by transformers' sdpa. `quanto` is transformers' QuantizedCache with that backend (optimum-quanto), which is not of
this project's environment.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import record
import render
import variants

CONTEXT, CHUNK, WINDOW = 8000, 128, 2048
METHODS = ("kivi", "rotated", "token")
AUTO = ("rotated-auto2.3", "kivi-auto3")
KINDS = ("full", "kivi-8", "kivi-4", "kivi-2", "rotated-4", "rotated-2", *AUTO, "quanto-4", "quanto-2")
QUALITY = [
    "full",
    *(f"{method}-{bits}" for bits in (8, 4, 3, 2) for method in METHODS),
    *AUTO,
    "quanto-4",
    "quanto-2",
]
NAMES = [
    *(f"quality/{kind}" for kind in QUALITY),
    *(f"memory/{kind}" for kind in KINDS),
    *(f"speed/{kind}" for kind in KINDS[1:]),
    "text/kivi-8",
]


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


def quality(kind: str, options: Namespace) -> dict[str, Any]:
    """Perplexity with such a cache; of the full one the logits stay in the work folder, to compare with."""
    import torch
    from safetensors.torch import load_file, save_file

    from llmslim.loaders.texts import sample

    model, tokenizer = demo("float32")
    text = sample(f"{wikitext(options)}:test", tokenizer, options.quality_windows, WINDOW)
    kept = options.work / "full.safetensors"
    full = load_file(kept) if kept.exists() and kind != "full" else None
    losses, divergence, logits = [], [], {}
    with torch.no_grad():
        for number, window in enumerate(text.tokens):
            cache, parts = cache_of(kind, model, options.work), []
            for tokens in window.split(CHUNK):
                parts.append(model(input_ids=tokens[None], past_key_values=cache, use_cache=True).logits[0])
            found = torch.cat(parts).log_softmax(-1)
            losses.append(float(torch.nn.functional.nll_loss(found[:-1], window[1:])))
            if kind == "full":
                logits[str(number)] = found
            if full is not None:
                wanted = full[str(number)]
                divergence.append(float((wanted.exp() * (wanted - found)).sum(-1).mean()))
    if kind == "full":
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file(logits, kept)
    mean = sum(losses) / len(losses)
    figures = {"perplexity": float(torch.tensor(mean).exp()), "data_hash": text.data_hash}
    return figures | ({"kl": sum(divergence) / len(divergence)} if divergence else {})


def filled(kind: str, model: Any, tokens: int, known: Path | None = None) -> Any:
    """A cache of random keys and values, in the model's type, filled in chunks as a prompt would."""
    import torch

    config = model.config
    cache = cache_of(kind, model, known)
    shape = (1, config.num_key_value_heads, tokens, config.hidden_size // config.num_attention_heads)
    generator = torch.Generator().manual_seed(0)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, generator=generator, dtype=model.dtype) for _ in range(2))
        cache.update(keys, values, layer, {})
    return cache


def step(model: Any, cache: Any) -> None:
    import torch

    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True, logits_to_keep=1)


def memory(kind: str, options: Namespace) -> dict[str, Any]:
    model, _ = demo("bfloat16")
    step(model, filled(kind, model, 64, options.work))  # what the first call allocates is not the cache's
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what loading left free is given back, else the cache would take that unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of loading, is forgotten (Linux)
    before = resident("VmRSS")
    cache = filled(kind, model, CONTEXT, options.work)
    held = getattr(cache, "nbytes", None)
    if kind == "full":
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    for _ in range(16):
        step(model, cache)
    return {"cache_bytes": held, "peak_growth_mb": resident("VmHWM") - before}


def resident(what: str) -> float:
    """VmRSS, what this process holds now, or VmHWM, its peak; in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e6


def speed(kind: str, options: Namespace) -> dict[str, Any]:
    """Seconds per token with the full cache and with this one, in turns."""
    model, _ = demo("bfloat16")
    caches = {name: filled(name, model, CONTEXT, options.work) for name in ("full", kind)}
    times: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(options.rounds + 1):
        for name, cache in caches.items():
            cache_of(name, model, options.work)  # sets the attention
            for _ in range(8):
                begun = time.perf_counter()
                step(model, cache)
                if turn:  # the first turn warms up
                    times[name].append(time.perf_counter() - begun)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return {
        "full_ms": 1000 * seconds["full"],
        "ms": 1000 * seconds[kind],
        "ratio": seconds["full"] / seconds[kind],
        "rounds": options.rounds,
    }


def text(kind: str, options: Namespace) -> dict[str, Any]:
    import torch

    from llmslim.loaders.rows import load_rows

    model, tokenizer = demo("float32")
    rows = [row.strip() for row in load_rows(f"{wikitext(options)}:test") if len(row.split()) > 60][:20]
    prompts = [" ".join(row.split()[:40]) for row in rows]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    written = {}
    for name in ("full", kind):
        out = model.generate(
            **batch,
            past_key_values=cache_of(name, model, options.work),
            do_sample=False,
            min_new_tokens=256,
            max_new_tokens=256,
            pad_token_id=tokenizer.eos_token_id,
        )
        written[name] = out[:, batch["input_ids"].shape[1] :]
    differ = written["full"] != written[kind]
    first = torch.where(differ.any(1), differ.int().argmax(1), differ.shape[1])
    return {
        "prompts": len(prompts),
        "equal_before_first": float(first.float().mean()) / differ.shape[1],
        "whole": int((~differ.any(1)).sum()),
    }


def wikitext(options: Namespace) -> str:
    prefix = f"{Path(options.data).absolute()}/" if options.data else ""
    return f"{prefix}Salesforce/wikitext:wikitext-2-raw-v1"


def measure(name: str, options: Namespace) -> dict[str, Any]:
    """One row, in a process of its own."""
    command = [
        sys.executable,
        str(Path(__file__)),
        "--one",
        name,
        "--work",
        str(options.work),
        "--data",
        options.data,
    ]
    command += ["--rounds", str(options.rounds), "--quality-windows", str(options.quality_windows)]
    figures = json.loads(record.run(command).stdout.splitlines()[-1])
    return {"name": name, "options": variants.settings(options), **figures}


def main() -> None:
    parser = variants.parser(__doc__ or "", "kv_cache")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality-windows", type=int, default=4)
    parser.add_argument("--one", help="measure this in this process, and print JSON")
    options = record.parse(parser)
    if options.one:
        what, _, kind = options.one.partition("/")
        worker = {"quality": quality, "memory": memory, "speed": speed, "text": text}[what]
        print(json.dumps(worker(kind, options)))
        return
    variants.each(options, NAMES, measure, render.kv_cache)


if __name__ == "__main__":
    main()
