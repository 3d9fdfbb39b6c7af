"""Which tensors a checkpoint of a model holds: the one list that writing, reading and checking share."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.checkpoint.formats import Compact, Format
from llmslim.sparse import SparseLinear
from llmslim.ties import counterpart, shared_modules


def part_of(model: nn.Module, prefix: str | None) -> Iterator[tuple[str, nn.Module]]:
    """The modules at and below `prefix`; for None those outside all blocks."""
    stacks = tuple(f"{stack.name}." for stack in Anatomy(model).stacks)  # type: ignore[arg-type]
    for name, module in model.named_modules(remove_duplicate=False):
        inside = name.startswith(stacks)
        if (not inside) if prefix is None else (name == prefix or name.startswith(f"{prefix}.")):
            yield name, module


def dense_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and stored buffers by full name; of a compact one the bias only."""
    own = {leaf: p.detach() for leaf, p in module._parameters.items() if p is not None}
    if isinstance(module, Compact):
        own = {leaf: tensor for leaf, tensor in own.items() if leaf == "bias"}
        return {f"{name}.{leaf}": tensor for leaf, tensor in own.items()}
    for leaf, buffer in module._buffers.items():
        if buffer is not None and leaf not in module._non_persistent_buffers_set:
            own[leaf] = buffer
    return {f"{name}.{leaf}" if name else leaf: tensor for leaf, tensor in own.items()}


def stored_tensors(model: nn.Module, form: Format, prefix: str | None = "") -> dict[str, tuple[Tensor, bool]]:
    """On-disk name -> (tensor, whether its floats are to be of the checkpoint's type) below `prefix`.

    `prefix`: "" takes all; None takes what is outside the blocks.

    Tied tensors appear once, under the name that transformers keeps; shared ones in the block that they come from.
    Packed ones are as on disk already; dense ones and the values of sparse ones are yet to be cast.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    modules = model.named_modules() if prefix == "" else part_of(model, prefix)
    shared = shared_modules(model)
    found: dict[str, tuple[Tensor, bool]] = {}
    for name, module in modules:
        dense = dense_tensors(name, module)
        if counterpart(name, shared):
            found.update({full: (tensor, True) for full, tensor in dense.items() if full == f"{name}.bias"})
            continue
        found.update({full: (tensor, True) for full, tensor in dense.items() if full not in tied})
        if isinstance(module, Compact) and f"{name}.weight_packed" not in tied:
            cast = isinstance(module, SparseLinear)
            found.update({full: (tensor, cast) for full, tensor in form.stored(name, module).items()})
    return found
