"""Quantized KV caches of SmolLM2-135M: perplexity, bytes, memory, speed and text, beside the full cache.

    python evals/kv_cache.py [--variants 'quality/*']    --list names the variants
    python evals/kv_cache.py --plot                      draw evals/results/kv_cache.svg and kv_needle.svg, and stop

- quality/METHOD-BITS: perplexity and KL divergence in float32 over 4 windows of 2,048 tokens of WikiText-2 test, read
  in chunks of 128 tokens, so that all but the newest 128 tokens and the first 4 are read quantized; along the
  sequence, the mean KL divergence and increase of the loss of every 256 tokens. `quality/full` comes first.
- tokenwise/KIND: the same for the last 256 tokens of the windows, which come one at a time, as in `generate`: the C
  code reads the cache then, and 64 tokens more are read quantized in the mean than in chunks. To be held against the
  last 256 of quality/KIND.
- needle/KIND: whether a number is found again in a long text, by length and depth; see kv_needle.py.
- memory/KIND: a fresh process fills a cache of 8,000 tokens with random keys and values, layer by layer, and decodes
  16 tokens in bfloat16: bytes that the cache holds, and how far that raised the peak of the process's memory.
- speed/KIND: one process decodes 8 tokens at 8,000 with each of the full and the quantized cache, in turns; medians. In
  bfloat16, or in float32 where the CPU has no bfloat16, which is what `llmslim.load` takes there.
- length/KIND: bytes and median milliseconds per token at 1,000, 2,000, 4,000 and 8,000 tokens, as in speed/KIND.
- text/kivi-8: 20 prompts of WikiText-2 in one padded batch, 256 tokens each, greedy, float32: how many are as with the
  full cache before the first that differs.

Kinds of caches are explained in kv_kinds.py.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import record
import tables_cost
import variants
from kv_kinds import CHUNK, cache_of, demo, wikitext
from kv_needle import needle
from kv_plots import curves, heat_maps

if TYPE_CHECKING:
    from torch import Tensor

CONTEXT, LENGTHS = 8000, (1000, 2000, 4000, 8000)
WINDOW, STRETCH = 2048, 256  # of a text, and of what is told along it
METHODS = ("kivi", "rotated", "token")
AUTO = ("rotated-auto2.18", "kivi-auto3")
KINDS = (
    "full",
    "kivi-8",
    "kivi-4",
    "kivi-2",
    "rotated-4",
    "rotated-2",
    "rotated-3/2",
    "pca-2",
    *AUTO,
    "quanto-4",
    "quanto-2",
)
QUALITY = [
    "full",
    *(f"{method}-{bits}" for bits in (8, 4, 3, 2) for method in METHODS),
    "rotated-3/2",
    "pca-3",
    "pca-2",
    "pca-2@builtin",
    *AUTO,
    "quanto-4",
    "quanto-2",
]
FEW = ("kivi-4", "kivi-2", "rotated-4", "rotated-2", "pca-2")
NAMES = [
    *(f"quality/{kind}" for kind in QUALITY),
    *(f"tokenwise/{kind}" for kind in ("kivi-8", *FEW)),
    *(f"needle/{kind}" for kind in ("full", *FEW)),
    *(f"memory/{kind}" for kind in KINDS),
    *(f"speed/{kind}" for kind in KINDS[1:]),
    *(f"length/{kind}" for kind in ("kivi-8", *FEW)),
    "text/kivi-8",
]


def quality(kind: str, options: Namespace) -> dict[str, Any]:
    """Perplexity with such a cache; of the full one the logits stay in the work folder, to compare with."""
    import torch
    from safetensors.torch import save_file

    losses, differences, logits = [], [], {}
    full = whole(options) if kind != "full" and kept(options).exists() else None
    for number, window, found in read(kind, options, [CHUNK] * (WINDOW // CHUNK)):
        losses.append(float(losses_of(found, window).mean()))
        if kind == "full":
            logits[number] = found
        if full is not None:
            differences.append(difference(found, full[number], window))
    if kind == "full":
        kept(options).parent.mkdir(parents=True, exist_ok=True)
        save_file(logits, kept(options))
    mean = sum(losses) / len(losses)
    figures = {"perplexity": float(torch.tensor(mean).exp()), "data_hash": texts(options).data_hash}
    if not differences:
        return figures
    kl, more = (torch.stack(one).mean(0) for one in zip(*differences, strict=True))
    figures |= {"kl": float(kl.mean()), "kl_by_position": along(kl), "loss_increase_by_position": along(more)}
    return figures


def tokenwise(kind: str, options: Namespace) -> dict[str, Any]:
    """KL divergence and increase of the loss of the last tokens, which come one at a time."""
    import torch

    full, differences = whole(options), []
    before = WINDOW - STRETCH
    for number, window, found in read(kind, options, [CHUNK] * (before // CHUNK) + [1] * STRETCH):
        differences.append(difference(found[before:], full[number][before:], window[before:]))
    kl, more = (float(torch.stack(one).mean()) for one in zip(*differences, strict=True))
    return {"kl": kl, "loss_increase": more, "data_hash": texts(options).data_hash}


def texts(options: Namespace) -> Any:
    from llmslim.loaders.texts import sample

    _, tokenizer = demo("float32")
    return sample(f"{wikitext(options)}:test", tokenizer, options.quality_windows, WINDOW)


def kept(options: Namespace) -> Path:
    return Path(options.work) / "full.safetensors"


def whole(options: Namespace) -> dict[str, Tensor]:
    """What the full cache predicts, as log-probabilities [tokens, vocabulary] of each window."""
    from safetensors.torch import load_file

    if not kept(options).exists():
        sys.exit(
            f"{kept(options)} is not there: run --variants quality/full --again first, with the same --work."
        )
    return load_file(kept(options))


def read(kind: str, options: Namespace, sizes: Sequence[int]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each window's number, tokens and log-probabilities [tokens, vocabulary], read in parts of these sizes."""
    import torch

    model, _ = demo("float32")
    for number, window in enumerate(texts(options).tokens):
        cache, parts = cache_of(kind, model, options), []
        with torch.no_grad():
            for tokens in window.split(list(sizes)):
                parts.append(model(input_ids=tokens[None], past_key_values=cache, use_cache=True).logits[0])
        yield str(number), window, torch.cat(parts).log_softmax(-1)


def losses_of(found: Tensor, window: Tensor) -> Tensor:
    """-log p of each token but the first, [tokens - 1]."""
    return -found[:-1].gather(1, window[1:, None])[:, 0]


def difference(found: Tensor, full: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """KL(full || found) [tokens], and how much greater the losses are [tokens - 1]."""
    kl = (full.exp() * (full - found)).sum(-1)
    return kl, losses_of(found, window) - losses_of(full, window)


def along(values: Tensor) -> list[float]:
    """The mean of every STRETCH tokens."""
    return [float(part.mean()) for part in values.split(STRETCH)]


def filled(kind: str, model: Any, tokens: int, options: Namespace) -> Any:
    """A cache of random keys and values, in the model's type, filled in chunks as a prompt would."""
    import torch

    config = model.config
    cache = cache_of(kind, model, options)
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
    step(model, filled(kind, model, 64, options))  # what the first call allocates is not the cache's
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what loading left free is given back, else the cache would take that unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of loading, is forgotten (Linux)
    before = resident("VmRSS")
    cache = filled(kind, model, CONTEXT, options)
    held = bytes_of(cache)
    for _ in range(16):
        step(model, cache)
    return {"cache_bytes": held, "peak_growth_mb": resident("VmHWM") - before}


def bytes_of(cache: Any) -> int | None:
    """What a cache holds; None where that is not known (quanto)."""
    from transformers.cache_utils import QuantizedCache

    if isinstance(cache, QuantizedCache):
        return None
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def resident(what: str) -> float:
    """VmRSS, what this process holds now, or VmHWM, its peak; in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e6


def speed(kind: str, options: Namespace) -> dict[str, Any]:
    """Milliseconds per token with the full cache and with this one."""
    model, _ = demo(record.fast_type())
    caches = {name: filled(name, model, CONTEXT, options) for name in ("full", kind)}
    ms = decoded(model, caches, options)
    ratio = ms["full"] / ms[kind]
    return {
        "full_ms": ms["full"],
        "ms": ms[kind],
        "ratio": ratio,
        "rounds": options.rounds,
        "dtype": record.fast_type(),
    }


def length(kind: str, options: Namespace) -> dict[str, Any]:
    """Bytes and milliseconds per token of the full cache and of this one, at each of LENGTHS."""
    model, _ = demo(record.fast_type())
    figures: dict[str, list[Any]] = {"full_bytes": [], "bytes": [], "full_ms": [], "ms": []}
    for tokens in LENGTHS:
        caches = {name: filled(name, model, tokens, options) for name in ("full", kind)}
        held = {name: bytes_of(cache) for name, cache in caches.items()}
        ms = decoded(model, caches, options)
        for name, found in zip(figures, (held["full"], held[kind], ms["full"], ms[kind]), strict=True):
            figures[name].append(found)
    return {"lengths": LENGTHS, **figures, "rounds": options.rounds, "dtype": record.fast_type()}


def decoded(model: Any, caches: dict[str, Any], options: Namespace) -> dict[str, float]:
    """Median milliseconds per token with each of the caches, of 8 tokens a round, in turns."""
    times: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(options.rounds + 1):
        for name, cache in caches.items():
            cache_of(name, model, options)  # sets the attention
            for _ in range(8):
                begun = time.perf_counter()
                step(model, cache)
                if turn:  # the first turn warms up
                    times[name].append(time.perf_counter() - begun)
    return {name: 1000 * statistics.median(found) for name, found in times.items()}


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
            past_key_values=cache_of(name, model, options),
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


WORKERS = {
    "quality": quality,
    "tokenwise": tokenwise,
    "needle": needle,
    "memory": memory,
    "speed": speed,
    "length": length,
    "text": text,
}


def main() -> None:
    parser = variants.parser(__doc__ or "", "kv_cache")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality-windows", type=int, default=4)
    parser.add_argument("--plot", action="store_true", help="draw the results file, and stop")
    parser.add_argument("--one", help="measure this in this process, and print JSON")
    options = record.parse(parser)
    if options.one:
        what, _, kind = options.one.partition("/")
        print(json.dumps(WORKERS[what](kind, options)))
        return
    if options.plot:
        result = json.loads(options.output.read_text("utf-8"))
        curves(result, options.output.with_name("kv_cache.svg"))
        heat_maps(result, options.output.with_name("kv_needle.svg"))
        return
    variants.each(options, NAMES, measure, tables_cost.kv_cache)


if __name__ == "__main__":
    main()
