"""T5's attention with fewer heads: its position bias is made in a stack's first block and handed on from there.

What is handed on keeps the columns of all heads, since other blocks may keep other heads. A narrowed attention
takes its own columns of it, and hands on what it got.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn


def takes_position_bias(module: nn.Module) -> bool:
    """Whether an attention module is called with a position bias [1, heads, queries, keys], as in T5."""
    return hasattr(module, "has_relative_attention_bias")


def choose_bias_columns(module: nn.Module, heads: tuple[int, ...], before: int) -> None:
    """Have an attention that had `before` heads, and has `heads` of them now, take their columns of the bias."""
    columns = getattr(module, "bias_columns", range(before))
    if not hasattr(module, "bias_columns"):
        module.all_heads = before  # type: ignore[assignment]
        module.__class__ = _narrowed(type(module))  # type: ignore[arg-type]
    module.bias_columns = [columns[head] for head in heads]  # type: ignore[assignment]


@cache
def _narrowed(cls: Any) -> type[nn.Module]:
    """A subclass of a family's attention, made from the one at hand: importing transformers takes seconds."""

    class NarrowedAttention(cls):
        def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
            self.whole_bias = super().compute_bias(*args, **kwargs)
            return self.whole_bias[:, self.bias_columns]

        def forward(self, *args: Any, position_bias: Tensor | None = None, **kwargs: Any) -> tuple[Any, ...]:
            own = None if position_bias is None else position_bias[:, self.bias_columns]
            output, own, *rest = super().forward(*args, position_bias=own, **kwargs)
            if position_bias is None:  # made here: from the table, or zeros where there is none
                position_bias = self.__dict__.pop("whole_bias", None)
            if position_bias is None:
                position_bias = own.new_zeros(1, self.all_heads, *own.shape[2:])
            return output, position_bias, *rest

    NarrowedAttention.__name__ = cls.__name__  # transformers knows some classes by name
    return NarrowedAttention
