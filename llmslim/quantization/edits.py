"""The edits of quantization: a Linear, or an embedding with its head, that keeps its weight packed."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import Tensor, nn

from llmslim.anatomy.parts import features
from llmslim.edit import Edit, replace_module
from llmslim.quantization.grid import Scheme
from llmslim.quantization.packed import PackedEmbedding, PackedLinear
from llmslim.sparse import SparseLinear
from llmslim.ties import replace_table


class PackLinear(Edit):
    """Replace the Linear (or Conv1D) at `module` by an empty `PackedLinear` of the same shape.

    `pruned` says that weights were pruned as it was quantized: what is 0 is to stay so. Of a `SparseLinear` that is
    known without it. Layouts of others have no place for it.
    """

    kind: ClassVar[str] = "pack_linear"
    module: str
    scheme: Scheme
    pruned: bool = False

    def apply(self, model: nn.Module) -> None:
        linear = model.get_submodule(self.module)
        if isinstance(linear, PackedLinear):
            raise ValueError(f"{self.module} is packed already")
        out_features, in_features = features(linear)
        weight = cast(Tensor, linear.weight)
        packed = PackedLinear(
            in_features,
            out_features,
            self.scheme,
            bias=linear.bias is not None,
            dtype=weight.dtype,
            device="meta",
        )
        packed.bias = cast(Tensor | None, linear.bias)
        packed.pruned = self.pruned or isinstance(linear, SparseLinear)
        replace_module(model, self.module, packed)


class PackEmbedding(Edit):
    """Replace the token embedding at `module`, and all that is tied to it, by packed ones that share storage."""

    kind: ClassVar[str] = "pack_embedding"
    module: str
    scheme: Scheme
    tied_head: str | None = None

    def apply(self, model: nn.Module) -> None:
        replace_table(model, self.module, self.tied_head, self._packed_table, self._packed_head)

    def _packed_table(self, table: nn.Embedding) -> PackedEmbedding:
        scale = getattr(table, "scalar_embed_scale", 1.0)  # Gemma's
        rows, width = table.weight.shape
        return PackedEmbedding(
            rows, width, self.scheme, table.weight.dtype, table.padding_idx, scale, device="meta"
        )

    def _packed_head(self, head: nn.Module) -> PackedLinear:
        out_features, in_features = features(head)
        dtype = cast(Tensor, head.weight).dtype
        packed = PackedLinear(
            in_features, out_features, self.scheme, head.bias is not None, dtype, device="meta"
        )
        packed.bias = cast(Tensor | None, head.bias)
        return packed
