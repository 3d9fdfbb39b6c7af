"""evaluate(): perplexity of a model on a text, and its divergence from a base, as one flat record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmslim.checkpoint.load import load_model
from llmslim.checkpoint.reader import CheckpointReader
from llmslim.errors import UserError
from llmslim.evaluation.divergence import Comparison, compare
from llmslim.evaluation.perplexity import PerplexityResult, perplexity, require_causal
from llmslim.evaluation.stream import streamed_scores
from llmslim.kvcache.allocation import fitted, told
from llmslim.kvcache.settings import KVSettings
from llmslim.loaders.heads import require_positions, require_vocabulary
from llmslim.loaders.models import ModelFiles, find, find_device, resolve_dtype
from llmslim.loaders.texts import TextSample, sample

Progress = Callable[[int, int], None]

KV_CHUNK = 128
"""Tokens at a time where a KV cache is measured."""


def evaluate(
    model: str,
    text: str,
    *,
    base: str | None = None,
    seq_len: int = 512,
    windows: int = 16,
    join: str = "",
    streamed: bool = False,
    adapter: str | None = None,
    kv_cache: KVSettings | None = None,
    kv_budget: float | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Measure a causal language model.

    Args:
        model: a Hub id, a folder, a .gguf file, or "demo".
        base: compare with this one, token by token.
        join: what stands between the rows of the text.
        streamed: hold one block of a model at a time.
        adapter: folder of a peft adapter that the model has beside its weights; not streamed.
        kv_cache: run the model, not the base, in chunks of `KV_CHUNK` tokens, each of which reads those before from a
            quantized KV cache.
        kv_budget: mean bits of that cache; those of each layer are measured first, on a built-in text.
        dtype: to compute in; what is fast on the device when None, "auto" as stored.

    Returns:
        perplexity, nll and their `_stderr`, the protocol (windows, seq_len, bos, join, data_hash, ...), and
        with a base its perplexity, nll_increase, kl and top1_agreement, each with `_stderr`.

    Raises:
        UserError: for what cannot be evaluated.
    """
    device = find_device(device)
    if kv_cache is not None and streamed:
        raise UserError("A streamed model has no KV cache: leave --stream out, or --kv-bits.")
    files, other = find(model, revision), find(base) if base is not None else None
    if adapter is not None:
        check_adapter(adapter, files, streamed)
    whole = CheckpointReader(files).model_skeleton()
    require_causal(whole)
    require_positions("seq_len", seq_len, whole, files.spec)
    chosen = resolve_dtype(dtype, files, device)
    tokens = sample(text, files.tokenizer(), windows, seq_len, join=join, builtin_part="test")
    require_vocabulary(tokens.tokens, whole, files.spec)
    figures: dict[str, Any] = {"model": model, "base": base, "streamed": streamed}
    if adapter is not None:
        figures["adapter"] = adapter
    figures |= {"dtype": str(chosen).removeprefix("torch."), "device": str(device)}
    if streamed:
        measured = _streamed(files, other, tokens, chosen, device, progress)
    else:
        measured, kv_cache = _whole(
            files, other, tokens, chosen, device, progress, adapter, kv_cache, kv_budget
        )
    if kv_cache is not None:
        figures["kv_cache"] = kv_figures(kv_cache)
    return {**figures, **_flat(measured)}


def kv_figures(settings: KVSettings) -> dict[str, Any]:
    """What a report says of a quantized KV cache: its settings, the bits in words, and how it was read."""
    return {**settings.model_dump(), "told": told(settings), "chunk": KV_CHUNK}


def check_adapter(adapter: str, files: ModelFiles, streamed: bool) -> None:
    """Refuse an adapter that cannot be put beside the model of these files."""
    from llmslim.recovery._base import require_base

    if streamed:
        raise UserError("An adapter is put beside a whole model: leave --stream out, or --adapter.")
    require_base(Path(adapter), files)


def _whole(
    files: ModelFiles,
    base: ModelFiles | None,
    text: TextSample,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    adapter: str | None = None,
    kv_cache: KVSettings | None = None,
    kv_budget: float | None = None,
) -> tuple[PerplexityResult | Comparison, KVSettings | None]:
    """The figures, and the KV cache with the bits that were found."""
    model, kv_cache = prepared(files, dtype, device, adapter, kv_cache, kv_budget, progress)
    chunk = KV_CHUNK if kv_cache is not None else None
    if base is None:
        return perplexity(model, text, progress, chunk), kv_cache
    return compare(model, load_model(base, dtype, device), text, progress, chunk), kv_cache


def prepared(
    files: ModelFiles,
    dtype: torch.dtype,
    device: torch.device,
    adapter: str | None = None,
    kv_cache: KVSettings | None = None,
    kv_budget: float | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[Any, KVSettings | None]:
    """A model with what is put beside it: an adapter, a quantized KV cache with what was measured for it."""
    model = load_model(files, dtype, device)
    if kv_cache is not None:
        from llmslim.kvcache.runtime.cache import attach

        kv_cache = fitted(kv_cache, kv_budget, model, files.tokenizer(), progress)
        attach(model, kv_cache)
    if adapter is None:
        return model, kv_cache
    from llmslim.recovery.lora import with_adapter

    return with_adapter(model, adapter), kv_cache


def _streamed(
    files: ModelFiles,
    base: ModelFiles | None,
    text: TextSample,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> PerplexityResult | Comparison:
    scores = streamed_scores(files, text.tokens, device, dtype, base, progress)
    return PerplexityResult.of(scores.nll, text) if base is None else Comparison.of(scores, text)


def _flat(measured: PerplexityResult | Comparison) -> dict[str, Any]:
    """One level, each figure beside its standard error."""
    result = measured.perplexity if isinstance(measured, Comparison) else measured
    record = result.to_dict()
    flat = {"perplexity": record.pop("value"), "perplexity_stderr": record.pop("stderr"), **record}
    if isinstance(measured, Comparison):
        flat |= {
            "base_perplexity": measured.base_perplexity.value,
            "base_perplexity_stderr": measured.base_perplexity.stderr,
        }
        for name in ("nll_increase", "kl", "top1_agreement"):
            estimate = getattr(measured, name)
            flat |= {name: estimate.value, f"{name}_stderr": estimate.stderr}
    return flat
