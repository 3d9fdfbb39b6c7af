"""The edits of quantization: a Linear, or an embedding with its head, that keeps its weight packed."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import Tensor, nn

from llmslim.anatomy.parts import features
from llmslim.edit import Edit, replace_module
from llmslim.quantization.grid import Scheme
from llmslim.quantization.packed import PackedEmbedding, PackedLinear


class PackLinear(Edit):
    """Replace the Linear (or Conv1D) at `module` by an empty `PackedLinear` of the same shape."""

    kind: ClassVar[str] = "pack_linear"
    module: str
    scheme: Scheme

    def apply(self, model: nn.Module) -> None:
        linear = model.get_submodule(self.module)
        if isinstance(linear, PackedLinear):
            raise ValueError(f"{self.module} is packed already")
        out_features, in_features = features(linear)
        if in_features % self.scheme.group_width(in_features):
            raise ValueError(f"group size {self.scheme.group_size} does not divide {in_features}")
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
        replace_module(model, self.module, packed)


class PackEmbedding(Edit):
    """Replace the token embedding at `module`, and all that is tied to it, by packed ones that share storage.

    Tied are the head, and in T5 the tables of encoder and decoder; transformers' map on the model says which.
    """

    kind: ClassVar[str] = "pack_embedding"
    module: str
    scheme: Scheme
    tied_head: str | None = None

    def apply(self, model: nn.Module) -> None:
        table = model.get_submodule(self.module)
        if not isinstance(table, nn.Embedding):
            raise ValueError(f"{self.module} is no embedding")
        width = table.embedding_dim
        if width % self.scheme.group_width(width):
            raise ValueError(f"group size {self.scheme.group_size} does not divide {width}")
        known = getattr(model, "all_tied_weights_keys", None) or {}
        tied = {
            target.rpartition(".")[0] for target, source in known.items() if source == f"{self.module}.weight"
        }
        if self.tied_head is not None:
            tied.add(self.tied_head)
        replace_module(model, self.module, self._packed_table(table))
        for name in sorted(tied):
            other = model.get_submodule(name)
            packed = (
                self._packed_table(other) if isinstance(other, nn.Embedding) else self._packed_head(other)
            )
            replace_module(model, name, packed)
            retie(model, self.module, name)

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


def retie(model: nn.Module, module: str, head: str) -> None:
    """Tie a packed head to its packed embedding: in memory, and in the two dicts that transformers keeps."""
    source, target = model.get_submodule(module), model.get_submodule(head)
    names = [name for name, _ in source.named_parameters()]
    for name in names:
        setattr(target, name, getattr(source, name))
    old = {f"{head}.weight"}
    ties = {f"{head}.{name}": f"{module}.{name}" for name in names}
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        known = dict(getattr(model, attribute, None) or {})
        kept = {key: value for key, value in known.items() if key not in old}
        setattr(model, attribute, {**kept, **ties})
