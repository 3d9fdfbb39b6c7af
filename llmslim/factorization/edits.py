"""The edits of factorization: a Linear, or an embedding with its head, as a product of two matrices."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from llmslim.anatomy.parts import features, is_linear
from llmslim.edit import Edit, replace_module
from llmslim.lowrank import LowRankLinear, worthwhile
from llmslim.ties import replace_table


class FactorizeLinear(Edit):
    """Replace the Linear (or Conv1D) at `module` by two empty ones with `rank` values between them."""

    kind: ClassVar[str] = "factorize_linear"
    module: str
    rank: int = Field(gt=0)

    def apply(self, model: nn.Module) -> None:
        linear = model.get_submodule(self.module)
        if not is_linear(linear):
            raise ValueError(f"{self.module} is no dense Linear")
        out_features, in_features = features(linear)
        if self.rank > worthwhile(out_features, in_features):
            raise ValueError(f"rank {self.rank} makes {self.module} no smaller")
        dtype = cast(Tensor, linear.weight).dtype
        factored = LowRankLinear(in_features, out_features, self.rank, dtype, "meta")
        factored.u.bias = cast(nn.Parameter, linear.bias)
        replace_module(model, self.module, factored)


class FactorizeEmbedding(Edit):
    """Replace the token embedding at `module`, and all that is tied to it, by a narrow table and a projection.

    As in ALBERT (Lan et al. 2019, arXiv:1909.11942, section 3.1), but that the head uses the same two.
    """

    kind: ClassVar[str] = "factorize_embedding"
    module: str
    rank: int = Field(gt=0)
    tied_head: str | None = None

    def apply(self, model: nn.Module) -> None:
        replace_table(model, self.module, self.tied_head, self._table, self._head)

    def _table(self, table: nn.Embedding) -> LowRankEmbedding:
        rows, width = table.weight.shape
        if self.rank > worthwhile(rows, width):
            raise ValueError(f"rank {self.rank} makes {self.module} no smaller")
        scale = getattr(table, "scalar_embed_scale", 1.0)  # Gemma's
        return LowRankEmbedding(rows, width, self.rank, table.weight.dtype, table.padding_idx, scale, "meta")

    def _head(self, head: nn.Module) -> LowRankHead:
        rows, width = features(head)
        narrow = LowRankHead(width, rows, self.rank, cast(Tensor, head.weight).dtype, "meta")
        narrow.bias = cast(nn.Parameter, head.bias)
        return narrow


class LowRankEmbedding(nn.Module):
    """Row i is P t_i; ids [...] -> [..., width].

    Attributes:
        table: float [rows, rank].
        projection: P, float [width, rank].
    """

    def __init__(
        self,
        rows: int,
        width: int,
        rank: int,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        scale: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = rows, width, rank
        self.padding_idx, self.scale = padding_idx, scale
        self.table = nn.Parameter(torch.empty(rows, rank, dtype=dtype, device=device), requires_grad=False)
        self.projection = nn.Parameter(
            torch.empty(width, rank, dtype=dtype, device=device), requires_grad=False
        )

    @property
    def weight(self) -> Tensor:
        """The narrow table, for models (T5) that look at an embedding's type."""
        return self.table

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.linear(F.embedding(ids, self.table), self.projection)
        return rows if self.scale == 1.0 else rows * rows.new_tensor(self.scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


class LowRankHead(nn.Module):
    """logits = T (P^T x) + b with the table T and the projection P of the embedding it is tied to."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.table = nn.Parameter(
            torch.empty(out_features, rank, dtype=dtype, device=device), requires_grad=False
        )
        self.projection = nn.Parameter(
            torch.empty(in_features, rank, dtype=dtype, device=device), requires_grad=False
        )
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:
        """The narrow table, for models that look at a head's type."""
        return self.table

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.projection.T), self.table, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
