"""The edits of quantization: a Linear, or an embedding with its head, that keeps its weight packed."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

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
        weight = linear.weight
        packed = PackedLinear(
            in_features, out_features, self.scheme, bias=linear.bias is not None, dtype=weight.dtype, device="meta"
        )
        packed.bias = linear.bias
        replace_module(model, self.module, packed)


class PackEmbedding(Edit):
    """Replace the token embedding at `module`, and a head that is tied to it, by packed ones that share storage."""

    kind: ClassVar[str] = "pack_embedding"
    module: str
    scheme: Scheme
    tied_head: str | None = None

    def apply(self, model: nn.Module) -> None:
        table = model.get_submodule(self.module)
        vocabulary, width = table.weight.shape
        if width % self.scheme.group_width(width):
            raise ValueError(f"group size {self.scheme.group_size} does not divide {width}")
        packed = PackedEmbedding.like(table, self.scheme)
        replace_module(model, self.module, packed)
        if self.tied_head is not None:
            bias = model.get_submodule(self.tied_head).bias
            head = PackedLinear(width, vocabulary, self.scheme, bias=bias is not None, device="meta")
            head.bias = bias
            replace_module(model, self.tied_head, head)
            retie(model, self.module, self.tied_head)


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

