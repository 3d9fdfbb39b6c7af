"""Losses over logits, a few tokens at a time.

Logits [batch, seq, vocabulary] of 4 x 512 tokens and 256k words take 2 GB in float32, and a loss wants the teacher's
and a gradient besides. `LazyLogits` stand for them where a model can be taken apart (`llmslim.training.head`): those of
some tokens are made, compared and, with their gradient found, forgotten, as fused linear losses do (Liger; Hsu et al.
2024, arXiv:2410.10989). Tensors do as well: of a classifier's few labels, and of a model that is run as a whole, whose
logits exist whole with their gradient.

Within that, distributions are made of fewer tokens still, which stay in the CPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CHUNK = 32  # tokens whose distributions are held at a time: 6 MB each of 49k tokens, which caches hold
AT_ONCE = 2**25  # logits that are made at a time: 128 MB, and as much for their gradient and the teacher's


class LazyLogits:
    """Logits [..., vocabulary] that are made when asked for.

    Attributes:
        hidden: [..., width]; gradients flow to them.
        head: [tokens, width] -> logits [tokens, vocabulary].
        vocabulary: how many logits that gives.
        parameters: what may be trained of the head; gradients flow to those that it uses.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        vocabulary: int,
        parameters: Sequence[nn.Parameter] = (),
    ) -> None:
        self.hidden, self.head, self.vocabulary, self.parameters = hidden, head, vocabulary, parameters

    def __getitem__(self, positions: Any) -> LazyLogits:
        """Those of some tokens."""
        return self._of(self.hidden[positions])

    def rows(self) -> LazyLogits:
        """One token after the other: [tokens, vocabulary]."""
        return self._of(self.hidden.reshape(-1, self.hidden.shape[-1]))

    def _of(self, hidden: Tensor) -> LazyLogits:
        return LazyLogits(hidden, self.head, self.vocabulary, self.parameters)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.hidden.shape[:-1], self.vocabulary)

    def __len__(self) -> int:
        return len(self.hidden)

    def made(self) -> Tensor:
        """The logits, of [tokens, width]; all of them."""
        return self.head(self.hidden)


Logits = Tensor | LazyLogits


def in_parts(logits: Logits) -> Iterator[Tensor]:
    """Logits [tokens, vocabulary], those of some tokens at a time."""
    size = tokens_at_once(logits.shape[-1])
    for start in range(0, len(logits), size):
        some = logits[start : start + size]
        yield some.made() if isinstance(some, LazyLogits) else some


def tokens_at_once(vocabulary: int) -> int:
    """Of how many tokens logits are made at a time."""
    return max(CHUNK, AT_ONCE // vocabulary)


class Part(NamedTuple):
    """A part of a loss: weight * loss(logits of some tokens, *targets of theirs), summed over all tokens."""

    weight: float
    loss: Callable[..., Tensor]
    targets: tuple[Logits, ...]


class _Summed(torch.autograd.Function):
    """The sum of a loss over rows, a chunk at a time; its gradients are found on the way.

    That by the rows takes their memory once more until the backward pass, that by parameters theirs; graphs of
    distributions, or the second computing of them that checkpoints cost, would take a multiple. One backward pass only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        loss: Callable[..., Tensor],
        size: int,
        targets: Sequence[Logits],
        rows: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        total = rows.new_zeros((), dtype=torch.float32)
        ctx.gradient = torch.empty_like(rows) if ctx.needs_input_grad[3] else None
        ctx.others = [None] * len(parameters)
        for start in range(0, len(rows), size):
            some, wanted = rows[start : start + size], [target[start : start + size] for target in targets]
            if not any(ctx.needs_input_grad):
                total += loss(some, *wanted)
                continue
            with torch.enable_grad():
                leaf = some.detach().requires_grad_()
                value = loss(leaf, *wanted)
            gradient, *others = torch.autograd.grad(value, [leaf, *parameters], allow_unused=True)
            if ctx.gradient is not None:
                ctx.gradient[start : start + size] = gradient
            ctx.others = [_plus(one, other) for one, other in zip(ctx.others, others, strict=True)]
            total += value.detach()
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        gradients, ctx.gradient, ctx.others = [ctx.gradient, *ctx.others], None, None
        scaled = [None if gradient is None else gradient.mul_(outer[0]) for gradient in gradients]
        return None, None, None, *scaled


def _plus(total: Tensor | None, other: Tensor | None) -> Tensor | None:
    if total is None or other is None:
        return total if other is None else other.clone()  # which may be that of another parameter, too
    return total.add_(other)


def summed(logits: Logits, parts: Sequence[Part]) -> Tensor:
    """The sum of the parts of a loss, in one pass over the logits; gradients flow to these, and to what makes them.

    Args:
        logits: [..., vocabulary], as many as the parts have targets.
    """
    lazy = (
        logits if isinstance(logits, LazyLogits) else LazyLogits(logits, lambda rows: rows, logits.shape[-1])
    )
    rows, used = lazy.rows().hidden, lazy.parameters if torch.is_grad_enabled() else ()
    largest = max(part.weight for part in parts)  # sums first: in float16 gradients of means come to 0
    of_some = partial(_made, lazy.head, [part._replace(weight=part.weight / largest) for part in parts])
    targets = [target for part in parts for target in part.targets]
    size = tokens_at_once(lazy.vocabulary)
    total: Tensor = _Summed.apply(of_some, size, targets, rows, *used)  # type: ignore[no-untyped-call]
    return total * largest


def _made(
    head: Callable[[Tensor], Tensor], parts: Sequence[Part], hidden: Tensor, *targets: Logits
) -> Tensor:
    """The parts for some tokens, of which logits are made."""
    with torch.no_grad():
        known = [target.made() if isinstance(target, LazyLogits) else target for target in targets]
    total: Tensor = _Summed.apply(partial(_weighed, parts), CHUNK, known, head(hidden))  # type: ignore[no-untyped-call]
    return total


def _weighed(parts: Sequence[Part], rows: Tensor, *targets: Tensor) -> Tensor:
    left = iter(targets)
    return torch.stack([w * loss(rows, *(next(left) for _ in own)) for w, loss, own in parts]).sum()
