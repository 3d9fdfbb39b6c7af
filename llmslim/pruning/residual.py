"""The residual stream: which tensors read it, which write it, and the edits that make it narrower."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from llmslim.anatomy import MLP, Anatomy, Block, Experts
from llmslim.anatomy.parts import features, is_conv1d, is_linear
from llmslim.edit import Edit
from llmslim.experts import UnfusedExperts

Site = Literal["attention", "mlp", "outside"]
_INSTEAD = (
    "the new width of the residual stream: it derives the width of a head or a scale of the embeddings from it, or "
    "blocks differ in other widths; "
    "prune --method mlp or heads instead"
)
_SIZES = ("hidden_size", "hidden_dim", "embed_dim", "d_model")
"""What modules call the width of the stream, where they remember it."""


class NarrowResidual(Edit):
    """A block reads and writes a residual stream of `width` channels."""

    kind: ClassVar[str] = "narrow_residual"
    only_plain: ClassVar[str] = _INSTEAD
    block: str
    width: int = Field(gt=0)

    def apply(self, model: nn.Module) -> None:
        blocks = {block.name: block for block in Anatomy(model).blocks}  # type: ignore[arg-type]
        if self.block not in blocks:
            raise ValueError(f"there is no block {self.block}")
        narrow_block(blocks[self.block], lambda _, tensor, dim: tensor.narrow(dim, 0, self.width))


class NarrowOuter(Edit):
    """What lies outside the blocks has a residual stream of `width` channels.

    Attributes:
        untied: the head gets a matrix of its own, where it was the embedding's.
    """

    kind: ClassVar[str] = "narrow_outer"
    only_plain: ClassVar[str] = _INSTEAD
    width: int = Field(gt=0)
    untied: bool = False

    def apply(self, model: nn.Module) -> None:
        anatomy = Anatomy(model)  # type: ignore[arg-type]
        if self.untied:
            untie(anatomy)
        narrow_outer(anatomy, lambda _, tensor, dim: tensor.narrow(dim, 0, self.width))


@dataclass(frozen=True)
class Slot:
    """A parameter, one dimension of which is the residual stream.

    Attributes:
        name: dotted.
        side: whether it reads the (normalised) stream, writes to it, or is a vector of a norm.
        site: for `reads`, in front of what the norm stands that it reads through.
    """

    name: str
    dim: int
    side: Literal["reads", "writes", "norm"]
    site: Site = "outside"


Turn = Callable[[Slot, Tensor, int], Tensor]
"""(slot, its tensor, the dimension) -> the tensor with the narrow stream in that dimension."""


def stream_width(block: Block) -> int:
    """Channels of the residual stream that a block reads."""
    return features(block.attention.q.module)[1]


def narrow_block(block: Block, turn: Turn) -> None:
    """Give every tensor of a block that touches the residual stream what `turn` makes of it; in place."""
    before = stream_width(block)
    after = _narrow(block.model, block_slots(block), turn)
    for module in block.module.modules():
        for name in _SIZES:
            if vars(module).get(name) == before:
                setattr(module, name, after)


def narrow_outer(anatomy: Anatomy, turn: Turn) -> int:
    """The same for what lies outside the blocks; returns the new width."""
    from llmslim.loaders.models import tie  # slow: imports transformers

    width = _narrow(anatomy.model, outer_slots(anatomy), turn)
    tie(anatomy.model)
    return width


def untie(anatomy: Anatomy) -> None:
    """Give the head a matrix of its own, equal to the embedding's; `tie_word_embeddings` of the config is off."""
    from llmslim.loaders.models import place

    model, head = anatomy.model, anatomy.head
    ties = (
        model.all_tied_weights_keys
    )  # not by identity: a skeleton that was filled and freed has two tensors
    if head is None or f"{head[0]}.weight" not in ties:
        raise ValueError("the model has no head that is tied to its embeddings")
    model.all_tied_weights_keys = {k: v for k, v in ties.items() if not k.startswith(f"{head[0]}.")}
    model.config.tie_word_embeddings = False
    place(model, f"{head[0]}.weight", cast(Tensor, head[1].weight).detach().clone())


def block_slots(block: Block) -> list[Slot]:
    """Every parameter of a block that has a dimension which is the residual stream.

    Raises:
        ValueError: a matrix is not dense.
    """
    slots: dict[str, Slot] = {}
    for attention in (block.attention, block.cross_attention):
        if attention is not None:
            for part in (attention.q, attention.k, attention.v):
                slots |= _linear(part.name, part.module, "reads", "attention")
            slots |= _linear(attention.o.name, attention.o.module, "writes")
    mlp = block.mlp
    if isinstance(mlp, Experts):
        slots |= _experts(block, mlp)
        mlp = mlp.shared
    if isinstance(mlp, MLP):
        for part in filter(None, (mlp.gate, mlp.up)):
            slots |= _linear(part.name, part.module, "reads", "mlp")
        slots |= _linear(mlp.down.name, mlp.down.module, "writes")
    for name in stream_norms(block):
        slots |= _norm(name, block.model.get_submodule(name))
    return list(slots.values())


def stream_norms(block: Block) -> list[str]:
    """Names of the norms of a block that stand in the residual stream, in the order of the module tree."""
    inside = tuple(f"{a.name}." for a in (block.attention, block.cross_attention) if a is not None)
    return [name for name, _ in block.norms if not name.startswith(inside)]


def outer_slots(anatomy: Anatomy) -> list[Slot]:
    """The same for what lies outside the blocks.

    Raises:
        ValueError: something there is neither embedding, final norm nor head.
    """
    model, width = anatomy.model, stream_width(anatomy.blocks[0])
    slots: dict[str, Slot] = {}
    for name, module in anatomy.embeddings:
        if not isinstance(module, nn.Embedding) or module.embedding_dim != width:
            raise ValueError(f"{name} is no table of {width} columns")
        slots[f"{name}.weight"] = Slot(f"{name}.weight", 1, "writes")
    for stack in anatomy.stacks:
        if stack.final_norm is not None:
            slots |= _norm(*stack.final_norm)
    if anatomy.head is not None:
        slots |= _linear(*anatomy.head, "reads", "outside")
    stacks = tuple(f"{stack.name}." for stack in anatomy.stacks)
    for name, _ in model.named_parameters():
        if not name.startswith(stacks) and name not in slots and name.rpartition(".")[0] != _head(anatomy):
            raise ValueError(f"{name} is neither embedding, final norm nor head")
    return list(slots.values())


def _head(anatomy: Anatomy) -> str:
    return anatomy.head[0] if anatomy.head else ""


def _linear(
    name: str, module: nn.Module, side: Literal["reads", "writes"], site: Site = "outside"
) -> dict[str, Slot]:
    if not is_linear(module):
        raise ValueError(f"{name} is a {type(module).__name__}, and only a dense Linear can be narrowed")
    dim = int((side == "reads") != is_conv1d(module))
    slots = {f"{name}.weight": Slot(f"{name}.weight", dim, side, site)}
    if side == "writes" and module.bias is not None:
        slots[f"{name}.bias"] = Slot(f"{name}.bias", 0, side)
    return slots


def _norm(name: str, module: nn.Module) -> dict[str, Slot]:
    return {f"{name}.{leaf}": Slot(f"{name}.{leaf}", 0, "norm") for leaf, _ in module.named_parameters()}


def _experts(block: Block, experts: Experts) -> dict[str, Slot]:
    """All experts read and write the stream, and so do what chooses and weighs them."""
    slots: dict[str, Slot] = {}
    if isinstance(experts.module, UnfusedExperts):
        for index, expert in enumerate(experts.module):
            name = f"{experts.name}.{index}"
            slots |= _linear(f"{name}.gate_up", cast(nn.Module, expert.gate_up), "reads", "mlp")
            slots |= _linear(f"{name}.down", cast(nn.Module, expert.down), "writes")
    else:
        assert experts.gate_up is not None and experts.down is not None
        slots[experts.gate_up] = Slot(experts.gate_up, 2, "reads", "mlp")
        slots[experts.down] = Slot(experts.down, 1, "writes")
    for chooser in filter(None, (experts.router, block.roles["experts"].get("shared_gate"))):
        slots[f"{chooser}.weight"] = Slot(f"{chooser}.weight", 1, "reads", "mlp")
    return slots


@torch.no_grad()
def _narrow(model: nn.Module, slots: Iterable[Slot], turn: Turn) -> int:
    """Returns the new width."""
    from llmslim.loaders.models import place

    width = 0
    for slot in slots:
        old = model.get_parameter(slot.name)
        new = turn(slot, old.detach(), slot.dim).to(old.dtype).contiguous()
        width = new.shape[slot.dim]
        owner, _, leaf = slot.name.rpartition(".")
        place(model, slot.name, new.clone() if new.data_ptr() == old.data_ptr() else new)
        if leaf == "weight":
            _tell(model.get_submodule(owner), new)
    return width


def _tell(module: nn.Module, weight: Tensor) -> None:
    """Let a module know the shape of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif is_conv1d(module):
        module.nx, module.nf = weight.shape  # type: ignore[assignment]
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(weight.shape)  # type: ignore[assignment]
