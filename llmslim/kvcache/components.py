"""What a quantized cache measures of a model before it can be used: the principal components of its keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmslim.errors import UserError
from llmslim.kvcache.settings import KVSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST = 1e-3
"""Of the largest standard deviation: what a component has at least, so that the basis can be inverted."""


def fit_kv_components(
    model: PreTrainedModel,
    tokens: Tensor,
    progress: Callable[[int, int], object] = lambda done, total: None,
    *,
    settings: KVSettings | None = None,
    **fields: Any,
) -> KVSettings:
    """Settings of method `pca` with the components of the keys, for `kv_cache(model, settings=...)`.

    Args:
        tokens: of a text like those to come, int64 [windows, seq]; some thousand tokens are enough.
        progress: called with the windows that are done and all.
        settings: in place of what follows.
        bits, value_bits, group_size, window, sink, layer_bits: see `KVSettings`.

    Raises:
        UserError: windows too short for a block.
    """
    settings = KVSettings.of(**{**fields, "method": "pca"}) if settings is None else settings
    return with_components(settings, measure_components(model, tokens, settings, progress))


def with_components(settings: KVSettings, components: list[Tensor]) -> KVSettings:
    """The same settings with the components of each layer."""
    kept = {name: getattr(settings, name) for name in settings.model_fields_set}
    return KVSettings.of(**{**kept, "components": tuple(components)})


@torch.no_grad()
def measure_components(
    model: PreTrainedModel,
    tokens: Tensor,
    settings: KVSettings,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[Tensor]:
    """The principal components of the keys of each attention layer and head, over tokens less their block's mean.

    Returns:
        Of each layer, float32 [KV heads, D, D]: columns are the components times their standard deviation, the largest
        first.
    """
    from llmslim.kvcache.runtime.cache import KVCache
    from llmslim.kvcache.runtime.layer import KVLayer

    windows, seq_len = tokens.shape
    if seq_len < settings.sink + settings.block:
        raise UserError(
            f"Windows of {seq_len} tokens are too short to measure the keys on: the first {settings.sink} stay as they "
            f"are, and a block has {settings.block}; take longer windows, or a smaller group of the cache."
        )
    plain = KVSettings(bits=16, window=seq_len, sink=0)
    sums: list[Tensor | float] = []
    for number, window in enumerate(tokens):
        progress(number, windows)
        cache = KVCache(model.config, plain)
        inside = model.base_model  # no logits are asked for
        inside(input_ids=window[None].to(model.device), past_key_values=cache, use_cache=True)
        held = [layer.tail[0] for layer in cache.layers if isinstance(layer, KVLayer) and layer.tail]
        sums = sums or [0.0] * len(held)
        sums = [
            total + moment(keys, settings.sink, settings.block)
            for total, keys in zip(sums, held, strict=True)
        ]
    progress(windows, windows)
    return [principal(total) for total in sums if isinstance(total, Tensor)]


def moment(keys: Tensor, first: int, block: int) -> Tensor:
    """sum x x^T, x the keys [1, heads, tokens, D] from `first` on less the mean of their block; float64 [heads, D, D].

    What is left over behind the last whole block is left out; the keys of a sliding layer may be fewer than a block,
    which then is one.
    """
    keys = keys[0, :, min(first, max(0, keys.shape[2] - block)) :].double()
    block = min(block, keys.shape[1])
    blocks = keys[:, : keys.shape[1] // block * block].unflatten(1, (-1, block))
    rest = (blocks - blocks.mean(2, keepdim=True)).flatten(1, 2)
    return rest.mT @ rest


def principal(moment: Tensor) -> Tensor:
    """Eigenvectors of each matrix [heads, D, D] times the roots of their eigenvalues, the largest first; float32.

    Scaled so that the variances have the mean 1: only their proportions count.
    """
    values, vectors = torch.linalg.eigh(moment)
    sizes = values.flip(-1).clamp(min=0).sqrt()
    sizes = sizes.clamp(min=LEAST * float(sizes.max()) or 1.0)
    sizes = sizes / sizes.square().mean(-1, keepdim=True).sqrt()
    return (vectors.flip(-1) * sizes[:, None]).float()
