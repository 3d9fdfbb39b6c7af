"""Token eviction: layers that drop tokens for good, so that a cache is short as well as packed.

A token's fate is decided once, when it is older than the window: it is dropped, or quantized and kept for ever. So
codes are never rewritten, and each KV head keeps its own tokens. Positions stay those of the whole text. What was
evicted does not come back: `crop` is exact within the tokens that are still as they were given (what is evicted stays
so) and refuses more; beam search and the other changes of the batch are exact, each sequence has its own tokens.

transformers' masks count all tokens that were seen; `Watched.mask` turns them into those of the tokens held. Older
tokens are taken to be visible to every query unless they are padding, as in causal attention. The first tokens of a
left-padded sequence are padding, so that its own first tokens are no sink.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmslim.errors import UserError
from llmslim.kvcache.runtime.layer import KVLayer, View

OBSERVED = 32
"""Queries whose attention `snapkv` judges by, the last ones (SnapKV, arXiv 2404.14469)."""
POOLED = 5
"""Neighbouring tokens that share what they received, so that words stay whole (SnapKV)."""


@dataclass(frozen=True)
class Watched:
    """What attention gets of a layer that evicts: it tells the layer when the queries have looked."""

    view: View
    layer: EvictingLayer

    def held(self) -> tuple[Tensor, Tensor] | tuple[View, View]:
        """Keys and values to look at, as of any layer."""
        return (self.view, self.view) if self.view.sink is not None or self.view.pages else self.view.tail

    def mask(self, mask: Tensor | None, queries: int) -> Tensor | None:
        """Of the tokens held [batch, heads or 1, queries, held], from that of all seen [batch, 1, queries, seen]."""
        held, seen = self.view.tokens, self.layer.length
        if held == seen:
            return mask
        if mask is None:
            if queries == 1:
                return None
            mask = torch.ones(1, 1, queries, seen, dtype=torch.bool, device=self.view.tail[0].device)
            mask = mask.tril(seen - queries)
        if mask.dtype != torch.bool:
            raise UserError("kv_cache: evict takes attention masks of True and False, not scores to add.")
        sink = self.view.sink[0].shape[2] if self.view.sink else 0
        tail = self.view.tail[0].shape[2]
        middle = self.layer.middle_mask(mask[..., sink : seen - tail], held - sink - tail)
        parts = [mask[..., :sink], middle, mask[..., seen - tail :]]
        heads = max(part.shape[1] for part in parts)
        return torch.cat([part.expand(len(middle), heads, -1, -1) for part in parts], -1)

    def settle(self, query: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        """The queries [batch, heads, q, D] have looked; the layer may now drop and quantize."""
        self.layer.settle(query, mask, scaling)


class EvictingLayer(KVLayer):
    """A layer of full attention that drops tokens older than the window.

    Attributes:
        evicted: tokens dropped so far, of each head.
    """

    def reset(self) -> None:
        super().reset()
        self.evicted = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.packed():
            raise UserError(
                "A KV cache that evicts tokens needs llmslim's attention: use it within kv_cache(model, ...), or call "
                'model.set_attn_implementation("llmslim") first.'
            )
        watched = Watched(self._append(key_states, value_states), self)
        return watched, watched

    def settle(self, query: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        """Evict, then quantize what stays."""
        raise NotImplementedError

    def middle_mask(self, seen: Tensor, held: int) -> Tensor:
        """Mask of the packed tokens [batch, heads or 1, q, held], from that of all seen between sink and tail."""
        raise NotImplementedError

    def crop(self, tokens_to_remove: int) -> None:
        there = self.tail[0].shape[2] if self.tail is not None else 0
        if self.evicted and -tokens_to_remove > there:
            raise UserError(
                f"{-tokens_to_remove} tokens cannot be taken back: tokens before the last {there} were evicted for "
                "good; take back fewer, or use a cache without evict."
            )
        super().crop(tokens_to_remove)


class Streaming(EvictingLayer):
    """The first tokens and the last share of all (attention sinks, StreamingLLM, arXiv 2309.17453).

    The paper renumbers the positions of the tokens held; here they stay, so that a text has its model's limit.
    """

    def settle(self, query: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        assert self.settings.keep is not None
        least = self.settings.sink + self.settings.window
        surplus = self.length - self.evicted - max(math.ceil(self.settings.keep * self.length), least)
        if surplus >= self.settings.block:
            self._fill_sink()
            self.evicted += self._drop(surplus)
        self._quantize()

    def middle_mask(self, seen: Tensor, held: int) -> Tensor:
        return seen[..., seen.shape[-1] - held :]


class Thinning(EvictingLayer):
    """Of the tokens that leave the window each KV head keeps the share with the highest `scores`, in their order."""

    def reset(self) -> None:
        super().reset()
        self.real: Tensor | None = None  # of packed tokens [batch, KV heads, tokens]; None: none is padding

    def scores(self, keys: Tensor, count: int, real: Tensor | None, scaling: float | None) -> Tensor:
        """Of the first `count` of some keys [batch, KV heads, n, D] that reach to the last query: [..., count]."""
        raise NotImplementedError

    def settle(self, query: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        assert self.tail is not None and self.settings.keep is not None
        self.sharing = query.shape[1] // self.tail[0].shape[1]  # query heads of a KV head
        block, share = self.settings.block, self.settings.keep
        kept = math.floor(share * max(0, self._old) / block + 1e-9) * block
        if not kept:
            return
        leaving = min(self._old, math.ceil(kept / share - 1e-9))
        self._fill_sink()
        real = None if mask is None else _real(mask)[..., -self.tail[0].shape[2] :]
        scores = self.scores(self.tail[0], leaving, real, scaling)
        if real is not None:
            scores = scores.masked_fill(~real[..., :leaving], -torch.inf)
        chosen = scores.topk(kept, dim=-1).indices.sort(-1).values
        keys, values = self._take(leaving)
        if real is not None or self.real is not None:
            self._note(real, chosen)
        self._store(_gather(keys, chosen), _gather(values, chosen))
        self.evicted += leaving - kept

    def _note(self, real: Tensor | None, chosen: Tensor) -> None:
        """Which packed tokens are no padding, while there is any."""
        batch, heads, _ = chosen.shape
        new = torch.ones_like(chosen, dtype=torch.bool)
        if real is not None:
            new = real.expand(batch, heads, -1).gather(2, chosen)
        if self.real is None:
            if bool(new.all()):
                return
            self.real = new.new_ones(batch, heads, sum(page.tokens for page in self.pages))
        self.real = torch.cat([self.real, new], 2)

    def middle_mask(self, seen: Tensor, held: int) -> Tensor:
        batch, _, queries, _ = seen.shape
        if self.real is None:
            return seen.new_ones(batch, 1, queries, held)
        return self.real.repeat_interleave(self.sharing, 1)[:, :, None].expand(-1, -1, queries, -1)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.real is not None:
            self.real = self.real[..., : sum(page.tokens for page in self.pages)]

    def _map(self, change: Any) -> None:
        super()._map(change)
        if self.real is not None:
            self.real = change(self.real)

    @property
    def nbytes(self) -> int:
        return super().nbytes + (self.real.numel() if self.real is not None else 0)


class KNorm(Thinning):
    """Keys of small L2 norm stay: they are those that get attention (arXiv 2406.11430, eq. of section 3)."""

    def scores(self, keys: Tensor, count: int, real: Tensor | None, scaling: float | None) -> Tensor:
        return -keys[:, :, :count].float().norm(dim=-1)


class SnapKV(Thinning):
    """Tokens that the last queries attend to stay (SnapKV, arXiv 2404.14469; in kind H2O's, arXiv 2306.14048).

    H2O adds up what all queries ever paid, which takes the whole attention matrix; SnapKV the last `OBSERVED` ones,
    before the model answers. Here they judge whenever tokens leave the window, while the model answers too. What a
    query pays is taken relative to the tokens that are not packed yet: all of them, for a prompt given at once.
    """

    def reset(self) -> None:
        super().reset()
        self.queries: Tensor | None = None  # the last ones [batch, heads, up to OBSERVED, D]

    def settle(self, query: Tensor, mask: Tensor | None, scaling: float | None) -> None:
        count = max(1, min(OBSERVED, self.settings.window))
        last = query[:, :, -count:]
        if self.queries is not None and last.shape[2] < count:
            last = torch.cat([self.queries, last], 2)[:, :, -count:]
        self.queries = last.clone()
        super().settle(query, mask, scaling)

    def scores(self, keys: Tensor, count: int, real: Tensor | None, scaling: float | None) -> Tensor:
        assert self.queries is not None
        paid = attention_received(self.queries, keys, real, scaling)[..., :count]
        return F.avg_pool1d(paid, POOLED, 1, POOLED // 2)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.queries is not None:
            self.queries = None  # of tokens that are gone

    def _map(self, change: Any) -> None:
        super()._map(change)
        if self.queries is not None:
            self.queries = change(self.queries)

    @property
    def nbytes(self) -> int:
        queries = self.queries.numel() * self.queries.element_size() if self.queries is not None else 0
        return super().nbytes + queries


EVICTING: dict[str, type[EvictingLayer]] = {"streaming": Streaming, "knorm": KNorm, "snapkv": SnapKV}


def attention_received(
    queries: Tensor, keys: Tensor, real: Tensor | None, scaling: float | None = None
) -> Tensor:
    """The softmax weights that keys [batch, KV heads, n, D] get from queries [batch, heads, o, D], summed [.., n].

    Args:
        queries: of the last o of the n tokens.
        real: which tokens are no padding, bool [batch, 1, n].
    """
    batch, kv_heads, n, dim = keys.shape
    count = queries.shape[2]
    rows = queries.float().reshape(batch, kv_heads, -1, dim) * (dim**-0.5 if scaling is None else scaling)
    scores = (rows @ keys.float().transpose(-1, -2)).view(batch, kv_heads, -1, count, n)
    seen = torch.ones(count, n, dtype=torch.bool, device=keys.device).tril(n - count)[None, None]
    if real is not None:
        seen = seen & real[:, :, None]
    weights = scores.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
    return weights.nan_to_num(0.0).sum((2, 3))  # a query of padding sees nothing


def _real(mask: Tensor) -> Tensor:
    """Which tokens the last query may look at, bool [batch, 1, seen]: in causal attention all but padding."""
    if mask.dtype != torch.bool:
        raise UserError("kv_cache: evict takes attention masks of True and False, not scores to add.")
    return mask[:, :1, -1]


def _gather(x: Tensor, chosen: Tensor) -> Tensor:
    return x.gather(2, chosen[..., None].expand(-1, -1, -1, x.shape[-1]))
