"""Attention that reads a packed cache block by block, with one running softmax (FlashAttention's, arXiv 2205.14135).

The cache is never written out: besides itself it takes the memory of `TOKENS` tokens in float32. Grouped heads
share what is read. Registered with transformers as the attention implementation "llmslim".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmslim.errors import UserError
from llmslim.kvcache.runtime import native
from llmslim.kvcache.runtime.eviction import Watched
from llmslim.kvcache.runtime.layer import View

NAME = "llmslim"
TOKENS = 512
"""Tokens that are unpacked at once."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | View | Watched,
    value: Tensor | View | Watched,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [batch, heads, q, D] -> output [batch, q, heads, D].

    Args:
        key, value: a `View` of a cache, or tensors [batch, KV heads, n, D] where nothing is packed; `Watched` where
            the cache evicts by what queries look at.
        attention_mask: bool (True: look at it) or added to the scores, [batch or 1, heads or 1, q, n].
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: a score per head that takes part in the softmax and in nothing else [heads].
    """
    if isinstance(key, Watched):
        keys, values = key.held()
        mask = key.mask(attention_mask, query.shape[2])
        seen = attention(
            module, query, keys, values, mask, dropout, scaling, softcap, s_aux, is_causal, **kwargs
        )
        key.settle(query, attention_mask, scaling)
        return seen
    if kwargs.get("position_bias") is not None:
        raise UserError(
            f"{type(module).__name__} adds a position bias, which a quantized cache does not read."
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if isinstance(key, Tensor) and isinstance(value, Tensor):
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
            )
        segments: Iterator[tuple[Tensor, Tensor]] = iter([(key, value)])
        if attention_mask is None and causal and query.shape[2] > 1:
            attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            attention_mask = attention_mask.tril(key.shape[2] - query.shape[2])[None, None]
    else:
        segments = iter([])
    if dropout:
        raise UserError(
            "A quantized KV cache is for inference: call model.eval() first, which turns dropout off."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, View) and s_aux is None and native.serves(query, key, attention_mask):
        out = native.attend(query, key, attention_mask, scale, softcap)
    else:
        segments = read(key) if isinstance(key, View) else segments
        out = attend(query, segments, attention_mask, scale, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def read(view: View) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values [batch, KV heads, up to TOKENS, D] in the order of the tokens, each unpacked when asked for."""
    if view.sink is not None:
        yield view.sink
    step = max(1, TOKENS // view.settings.block)
    for page in view.pages:
        for first in range(0, page.blocks, step):
            yield view.read(page, first, min(first + step, page.blocks))
    yield view.tail


def attend(
    query: Tensor,
    segments: Iterator[tuple[Tensor, Tensor]],
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v over segments of keys and values, in float32 -> as the query.

    With m the greatest score so far, a segment of scores s adds exp(s - m) to the sum and exp(s - m) v to the
    output, after both were multiplied by exp(old m - m). A query that may look at nothing gives 0.
    """
    batch, heads, length, _ = query.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    rows, start, state = query.to(exact) * scale, 0, None
    for keys, values in segments:
        kv_heads, count = keys.shape[1], keys.shape[2]
        if not count:
            continue
        # the queries of the heads that share keys are rows of one matrix
        scores = rows.reshape(batch, kv_heads, -1, rows.shape[-1]) @ keys.to(exact).transpose(-1, -2)
        scores = scores.view(batch, heads, length, count)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask is not None:
            part = mask[..., start : start + count]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        start += count
        if state is None:
            state = _begin(query, values.shape[-1], exact, s_aux)
        top, total, out = state
        greatest = torch.maximum(top, scores.amax(-1, keepdim=True))
        base = greatest.clamp(min=torch.finfo(exact).min)  # nothing seen yet: exp(-inf - base) is 0
        weights, fade = torch.exp(scores - base), torch.exp(top - base)
        seen = weights.view(batch, kv_heads, -1, count) @ values.to(exact)
        state = greatest, total * fade + weights.sum(-1, keepdim=True), out * fade + seen.view_as(out)
    assert state is not None
    _, total, out = state
    return (out / total.where(total > 0, 1)).to(query.dtype)


def _begin(
    query: Tensor, value_dim: int, exact: torch.dtype, s_aux: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Greatest score, sum of weights, output: of nothing, or of the score that has no value."""
    batch, heads, length, _ = query.shape
    top = query.new_full((batch, heads, length, 1), -torch.inf, dtype=exact)
    out = query.new_zeros((batch, heads, length, value_dim), dtype=exact)
    if s_aux is None:
        return top, torch.zeros_like(top), out
    return s_aux.to(exact).reshape(1, -1, 1, 1).expand_as(top), torch.ones_like(top), out


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
