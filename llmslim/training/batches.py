"""What is trained on, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

GROUP = 50  # batches among which examples are sorted by length


class Examples(Protocol):
    """What is trained on, when it is no windows of one length."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each example: batches are of like ones, so that little is padding."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch that the loss gets."""


class Windows(torch.utils.data.Dataset):
    """Tokens int64 [windows, seq], all of one length."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.lengths = tokens, [tokens.shape[1]] * len(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index]}

    def collate(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"input_ids": torch.stack([example["input_ids"] for example in examples])}


class ByLength(torch.utils.data.Sampler[int]):
    """Batches of like length, in random order; a function of seed and epoch alone, so that a resumed run has the same.

    Trainer's own grouping ("group_by_length") draws from the global generator.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        group = GROUP * self.batch_size
        ranked = [
            index
            for some in order.split(group)
            for index in sorted(some.tolist(), key=self.lengths.__getitem__)
        ]
        whole = (
            len(ranked) // self.batch_size
        )  # what is left over stays at the end, so that batches stay whole
        for batch in [*torch.randperm(whole, generator=generator).tolist(), whole]:
            yield from ranked[batch * self.batch_size : (batch + 1) * self.batch_size]
