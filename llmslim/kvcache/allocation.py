"""Bits of keys and values per layer by measured sensitivity: a budget of mean bits, spent where predictions suffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmslim.errors import UserError
from llmslim.kvcache.components import fit_kv_components
from llmslim.kvcache.settings import KVSettings
from llmslim.loaders.texts import sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHOICES = (2, 3, 4, 8)
"""Bits that the keys or the values of a layer may get."""
MEASURED_TOKENS = 2048
"""Of the text that the layers are measured on, its first windows."""
BUILTIN_TOKENS = 1024
"""Of the built-in text, one window, for verbs that were given no other."""
CHUNK = 128
"""Tokens at a time, so that those after read the keys of those before quantized."""


def allocate_kv_bits(
    model: PreTrainedModel,
    tokens: Tensor,
    budget: float = 3.0,
    progress: Callable[[int, int], object] = lambda done, total: None,
    *,
    settings: KVSettings | None = None,
    **fields: Any,
) -> KVSettings:
    """Settings with the bits of each layer, for `kv_cache(model, settings=...)`.

    Args:
        tokens: of a text like those to come, int64 [windows, seq]; the first 2,048 tokens are measured, or one window.
        budget: mean bits per stored number, scales and what stays as it is apart; 2 to 8.
        progress: called with the runs that are done and all, which are layers x 2 per window.
        settings: in place of what follows.
        method, group_size, window, sink, evict, keep: see `KVSettings`.

    Raises:
        UserError: a budget out of reach, or windows too short for any token to be read quantized.
    """
    settings = KVSettings.of(**fields) if settings is None else settings
    check_budget(budget)
    return with_bits(settings, shared_out(*measure(model, tokens, settings, progress), budget))


def fitted(
    settings: KVSettings,
    budget: float | None,
    model: PreTrainedModel,
    tokenizer: Any,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> KVSettings:
    """The settings with all that must be measured before a cache can be made, on a built-in text.

    That are the components of keys, of method `pca`, and the bits of each layer, where there is a budget of them.
    """
    if settings.method != "pca" and budget is None:
        return settings
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = sample("builtin", tokenizer, 1, min(BUILTIN_TOKENS, most or BUILTIN_TOKENS), seed=0).tokens
    if settings.method == "pca":
        settings = fit_kv_components(model, tokens, progress, settings=settings)
    if budget is not None:
        settings = allocate_kv_bits(model, tokens, budget, progress, settings=settings)
    return settings


def measured_windows(windows: int, seq_len: int) -> int:
    """How many windows of a text are measured."""
    return min(windows, max(1, MEASURED_TOKENS // seq_len))


def with_bits(settings: KVSettings, bits: Sequence[int | Sequence[int]]) -> KVSettings:
    """The same settings with these bits of each layer, or bits of its keys and its values."""
    kept = {name: getattr(settings, name) for name in settings.model_fields_set - {"bits", "value_bits"}}
    return KVSettings.of(**{**kept, "layer_bits": list(bits)})


def check_budget(budget: float) -> None:
    """Refuse a budget that no bits meet, or that all meet."""
    if not CHOICES[0] <= budget <= CHOICES[-1]:
        raise UserError(
            f"A budget of {budget:g} bits is out of reach: layers get 2, 3, 4 or 8, such as 3.0 in the mean."
        )


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokens: Tensor,
    settings: KVSettings,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> tuple[Tensor, Tensor]:
    """What quantizing the keys alone, or the values alone, of one layer costs.

    Of layer l: the mean over tokens of KL(p || p_l), in nats, where p predicts with the whole cache as it is and p_l
    with the keys (or values) of layer l in 2 bits; counted from the first token that reads quantized ones. Nothing is
    evicted.

    Returns:
        Damage of keys and of values [layers, 2], float64; numbers of each that a layer held at the end, int64
        [layers, 2].
    """
    from llmslim.kvcache.runtime.cache import KVCache
    from llmslim.kvcache.runtime.layer import KVLayer

    settings = settings.model_copy(update={"evict": None, "keep": None})
    first = settings.sink + settings.window + settings.block
    windows = tokens[: measured_windows(*tokens.shape)]
    if windows.shape[1] <= first:
        raise UserError(
            f"Windows of {windows.shape[1]} tokens are too short to measure a KV cache on: the first {first} are read "
            "as they are; take longer windows, or a smaller window or group of the cache."
        )

    def run(window: Tensor, bits: Sequence[Sequence[int]]) -> tuple[Tensor, list[KVLayer]]:
        """Log-probabilities [tokens that are counted, vocabulary], and the layers of the cache."""
        cache = KVCache(model.config, with_bits(settings, bits))
        ids = window.to(model.device)[None]
        for part in ids[:, :first].split(CHUNK, 1):
            model(input_ids=part, past_key_values=cache, use_cache=True)
        parts = ids[:, first:].split(CHUNK, 1)
        logits = [model(input_ids=part, past_key_values=cache, use_cache=True).logits[0] for part in parts]
        return torch.cat(logits).float().log_softmax(-1), [
            one for one in cache.layers if isinstance(one, KVLayer)
        ]

    layers = sum(isinstance(one, KVLayer) for one in KVCache(model.config, settings).layers)
    plain, least = [(16, 16)] * layers, ((CHOICES[0], 16), (16, CHOICES[0]))
    damage = torch.zeros(layers, len(least), dtype=torch.float64)
    sizes = torch.zeros(layers, len(least), dtype=torch.int64)
    total = len(windows) * damage.numel()
    for number, window in enumerate(windows):
        whole, held = run(window, plain)
        sizes += torch.tensor([_numbers(one) for one in held])
        for layer in range(layers):
            for which, bits in enumerate(least):
                progress(number * damage.numel() + layer * len(least) + which, total)
                found, _ = run(window, [*plain[:layer], bits, *plain[layer + 1 :]])
                damage[layer, which] += float((whole.exp() * (whole - found)).sum(-1).mean()) / len(windows)
    progress(total, total)
    return damage, sizes


def shared_out(damage: Tensor, sizes: Tensor, budget: float) -> list[tuple[int, int]]:
    """Bits of the keys and of the values of each layer within the budget, by what `measure` returns.

    Of more bits than were measured the damage is expected: a bit halves the error, and the divergence goes with the
    square of it.
    """
    rows = [[one * 4.0 ** (CHOICES[0] - bits) for bits in CHOICES] for one in damage.flatten().tolist()]
    bits = allocate(rows, sizes.flatten().tolist(), budget)
    return list(zip(bits[::2], bits[1::2], strict=True))


def told(settings: KVSettings) -> str:
    """The bits in a word: `4`, or of each layer, such as `3/2, 2, 4/2` where keys and values differ."""
    layers = settings.layer_bits or ((settings.bits, settings.of_values),)
    pairs = [one if isinstance(one, tuple) else (one, one) for one in layers]
    return ", ".join(f"{keys}" if keys == values else f"{keys}/{values}" for keys, values in pairs)


def allocate(
    damage: Sequence[Sequence[float]], sizes: Sequence[int], budget: float, choices: Sequence[int] = CHOICES
) -> list[int]:
    """The bits of each part with the least summed damage whose mean, weighed by size, is within the budget; exact.

    A dynamic programme over the parts: of all ways to give those so far their bits it keeps the ways that no other
    beats in both cost and damage.

    Args:
        damage: of each part with each of the choices.
        sizes: numbers that each part stores.
    """
    ways: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for row, size in zip(damage, sizes, strict=True):
        longer = [
            (cost + size * bits, lost + more, (*chosen, bits))
            for cost, lost, chosen in ways
            for bits, more in zip(choices, row, strict=True)
        ]
        ways = []
        for way in sorted(longer):
            if not ways or way[1] < ways[-1][1]:
                ways.append(way)
    limit = budget * sum(sizes) * (1 + 1e-9)
    return list([way for way in ways if way[0] <= limit][-1][2])


def _numbers(layer: Any) -> tuple[int, int]:
    """Numbers of the keys and of the values that a layer holds."""
    keys, values = layer.tail
    rows = keys.shape[0] * keys.shape[1] * (layer.length - layer.forgotten)
    return rows * keys.shape[-1], rows * values.shape[-1]
