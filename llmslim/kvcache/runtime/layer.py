"""One layer of a quantized cache: first tokens, packed pages, and the recent tokens as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from llmslim.errors import UserError
from llmslim.kvcache.codec import Codec, Parts, codecs
from llmslim.kvcache.settings import KVSettings

Pair = tuple[Tensor, Tensor]
"""Keys and values [batch, heads, tokens, head_dim], as the model gave them."""

ENCODED = 512
"""Tokens that are quantized at once."""


@dataclass(frozen=True)
class Page:
    """Whole blocks, one after another. After a crop the last one has tokens that do not count any more.

    Attributes:
        keys, values: what the codecs made of them, [batch, heads, blocks, ...].
        tokens: how many count.
    """

    keys: Parts
    values: Parts
    tokens: int

    @property
    def blocks(self) -> int:
        return self.keys[0].shape[2]

    def map(self, change: Callable[[Tensor], Tensor]) -> Page:
        """The same tokens with every tensor changed."""
        return Page(tuple(map(change, self.keys)), tuple(map(change, self.values)), self.tokens)

    def cut(self, first: int, last: int, tokens: int) -> Page:
        """Blocks first .. last - 1, of which so many tokens count, in memory of their own."""
        page = self.map(lambda part: part[:, :, first:last].clone())
        return Page(page.keys, page.values, tokens)


@dataclass(frozen=True)
class View:
    """All that a query may look at, in the order of the tokens: what attention gets in place of tensors."""

    sink: Pair | None
    pages: tuple[Page, ...]
    tail: Pair
    codecs: tuple[Codec, Codec]
    settings: KVSettings

    @property
    def tokens(self) -> int:
        sink = self.sink[0].shape[2] if self.sink else 0
        return sink + sum(page.tokens for page in self.pages) + self.tail[0].shape[2]

    def dense(self) -> Pair:
        """All keys and all values written out, in the model's type: the plain path, and the reference."""
        like = self.tail[0]
        pairs = [self.sink] if self.sink else []
        pairs += [self.read(page, 0, page.blocks) for page in self.pages]
        pairs.append(self.tail)
        keys, values = zip(*pairs, strict=True)
        return torch.cat([k.to(like.dtype) for k in keys], 2), torch.cat(
            [v.to(like.dtype) for v in values], 2
        )

    def read(self, page: Page, first: int, last: int) -> Pair:
        """Keys and values of the tokens that count in some blocks of a page."""
        block = self.settings.block
        tokens = min(page.tokens, last * block) - first * block
        keys = self.codecs[0].decode(tuple(part[:, :, first:last] for part in page.keys))
        values = self.codecs[1].decode(tuple(part[:, :, first:last] for part in page.values))
        return keys[:, :, :tokens], values[:, :, :tokens]


class KVLayer(CacheLayerMixin):
    """Stores a token as it is until it is older than the window and its group is whole, then quantizes it, once.

    A query of the same call still sees its own tokens as they were. A sliding layer forgets whole blocks that no
    query to come can see, and has no sink.

    Args:
        settings: how to store.
        packed: whether attention takes a `View`; it gets dense keys and values else.
        sliding_window: how far back a query sees, itself included.
        limit: most tokens that the model has positions for.
    """

    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        settings: KVSettings,
        packed: Callable[[], bool] = lambda: False,
        sliding_window: int | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.packed, self.limit = settings, packed, limit
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        self.sink: Pair | None = None
        self.pages: list[Page] = []
        self.tail: Pair | None = None
        self.length = self.forgotten = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads, dim = key_states.shape[1], key_states.shape[-1]
        for basis in self.settings.components:
            # by the keys: of a pruned model the config may have other numbers
            if basis.shape != (heads, dim, dim):
                raise UserError(
                    f"kv_cache: components are of {basis.shape[0]} KV heads of {basis.shape[1]} channels, and a layer "
                    f"of this model has {heads} of {dim}: measure them for this model."
                )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.codecs = codecs(self.settings, key_states.shape[-1], value_states.shape[-1], self.device)
        self.tail = (key_states[:, :, :0], value_states[:, :, :0])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        view = self._append(key_states, value_states)
        self._quantize()
        if not self.record_past:
            self._forget()
        if view.sink is None and not view.pages:
            return view.tail
        return (view, view) if self.packed() else view.dense()

    def _append(self, keys: Tensor, values: Tensor) -> View:
        """What the queries of these tokens may look at, which is all that there is with them."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        assert self.tail is not None
        self._check(keys, values)
        self.tail = _join(self.tail, (keys, values)) if self.tail[0].shape[2] else (keys, values)
        self.length += keys.shape[2]
        return View(self.sink, tuple(self.pages), self.tail, self.codecs, self.settings)

    def _check(self, keys: Tensor, values: Tensor) -> None:
        """Refuse tokens of another model or batch, and more than there are positions for."""
        assert self.tail is not None
        for new, held in zip((keys, values), self.tail, strict=True):
            (batch, heads, _, dim), (held_batch, held_heads, _, held_dim) = new.shape, held.shape
            if (batch, heads, dim) != (held_batch, held_heads, held_dim):
                raise UserError(
                    f"This KV cache holds {held_batch} sequence(s) of {held_heads} heads of {held_dim} channels, and "
                    f"was given {batch} of {heads} of {dim}: a cache belongs to one model and batch; make a new one."
                )
        total = self.length + keys.shape[2]
        if self.limit is not None and total > self.limit:
            raise UserError(
                f"A context of {total} tokens is more than the {self.limit} positions that the model has: "
                "shorten the prompt or generate less."
            )

    def _quantize(self) -> None:
        """Move whole blocks that are older than the window from the tail to the pages."""
        blocks = self._old // self.settings.block
        if blocks > 0:
            self._fill_sink()
            self._store(*self._take(blocks * self.settings.block))

    @property
    def _missing(self) -> int:
        """Tokens that the sink still takes."""
        if self.is_sliding or self.pages:
            return 0
        return self.settings.sink - (self.sink[0].shape[2] if self.sink else 0)

    @property
    def _old(self) -> int:
        """Tokens of the tail that are older than the window and not for the sink; below 0: it is not full yet."""
        assert self.tail is not None
        return self.tail[0].shape[2] - self.settings.window - self._missing

    def _fill_sink(self) -> None:
        if missing := self._missing:
            first = self._take(missing)
            self.sink = first if self.sink is None else _join(self.sink, first)

    def _store(self, keys: Tensor, values: Tensor) -> None:
        """Quantize whole blocks, which come after those that are there."""
        block, count = self.settings.block, keys.shape[2] // self.settings.block
        of_keys, of_values = self.codecs
        made = Page(self._encoded(of_keys, keys), self._encoded(of_values, values), count * block)
        if self.pages and self.pages[-1].tokens == self.pages[-1].blocks * block:
            # the copy is of packed bytes and comes once per block, so it is small beside what attention reads
            last = self.pages.pop()
            made = Page(
                tuple(torch.cat(pair, 2) for pair in zip(last.keys, made.keys, strict=True)),
                tuple(torch.cat(pair, 2) for pair in zip(last.values, made.values, strict=True)),
                last.tokens + made.tokens,
            )
        self.pages.append(made)

    def _encoded(self, codec: Codec, x: Tensor) -> Parts:
        """A long prompt some blocks at a time: searching scales takes many times the memory of what it searches."""
        made = [
            codec.encode(part)
            for part in x.split(max(1, ENCODED // self.settings.block) * self.settings.block, 2)
        ]
        return tuple(torch.cat(same, 2) for same in zip(*made, strict=True)) if len(made) > 1 else made[0]

    def _take(self, count: int) -> Pair:
        """The first tokens of the tail, which then begins after them in memory of its own."""
        assert self.tail is not None
        keys, values = self.tail
        self.tail = keys[:, :, count:].clone(), values[:, :, count:].clone()
        return keys[:, :, :count].clone(), values[:, :, :count].clone()

    def _forget(self) -> None:
        """Drop the blocks, or tokens of the tail, that lie before what the next query sees."""
        if self.sliding_window is None or self.tail is None:
            return
        self.forgotten += self._drop(self.length - self.sliding_window + 1 - self.forgotten)

    def _drop(self, unseen: int) -> int:
        """Forget so many of the oldest tokens after the sink, of pages whole blocks only.

        Returns:
            How many it were.
        """
        dropped = 0
        while self.pages and unseen > 0:
            page, block = self.pages[0], self.settings.block
            blocks = unseen // block if unseen < page.tokens else page.blocks
            if not blocks:
                return dropped
            gone = min(blocks * block, page.tokens)
            self.pages[:1] = [page.cut(blocks, page.blocks, page.tokens - gone)] if gone < page.tokens else []
            dropped += gone
            unseen -= gone
        if unseen > 0:
            self._take(unseen)
            dropped += unseen
        return dropped

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length - self.forgotten + query_length, self.forgotten

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    def activate_past_recording(self) -> None:
        """Forget nothing until the next `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; codes that stay are kept as they are.

        Args:
            tokens_to_remove: a negative number, as transformers has it; 0 only forgets what a sliding window passed.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop() takes a negative number of tokens to remove, not {tokens_to_remove}.")
        if not self.is_initialized:
            return
        assert self.tail is not None
        count = min(-tokens_to_remove, self.length)
        length = self.length - count
        if self.sliding_window and count and self.forgotten > max(0, length - self.sliding_window + 1):
            raise UserError(
                f"{count} tokens cannot be taken back: the sliding window of {self.sliding_window} has forgotten what "
                "was before them; call activate_past_recording() before generating what may be taken back."
            )
        self.length = length
        last = min(count, self.tail[0].shape[2])
        keep = self.tail[0].shape[2] - last
        self.tail = self.tail[0][:, :, :keep], self.tail[1][:, :, :keep]
        count -= last
        while count and self.pages:
            page = self.pages.pop()
            tokens = max(0, page.tokens - count)
            count -= page.tokens - tokens
            if tokens:
                self.pages.append(page.cut(0, -(-tokens // self.settings.block), tokens))
        if count and self.sink:
            keep = self.sink[0].shape[2] - count
            self.sink = (self.sink[0][:, :, :keep], self.sink[1][:, :, :keep]) if keep else None
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        self._map(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self._map(lambda part: part[indices])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor along the batch."""
        if not self.is_initialized:
            return
        assert self.tail is not None
        self.tail = change(self.tail[0]), change(self.tail[1])
        if self.sink is not None:
            self.sink = change(self.sink[0]), change(self.sink[1])
        self.pages = [page.map(change) for page in self.pages]

    def offload(self) -> None:
        self._map(lambda part: part.to("cpu"))

    def prefetch(self) -> None:
        self._map(lambda part: part.to(self.device))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the layer holds."""
        held: list[Tensor] = [*(self.sink or ()), *(self.tail or ())]
        for page in self.pages:
            held += [*page.keys, *page.values]
        return sum(part.numel() * part.element_size() for part in held)


def _join(first: Pair, second: Pair) -> Pair:
    return torch.cat([first[0], second[0]], 2), torch.cat([first[1], second[1]], 2)
