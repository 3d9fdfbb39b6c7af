"""A model in training whose weights several processes hold a share of each: fully sharded data parallel (FSDP).

torch's `fully_shard` (FSDP2; Zhao et al. 2023, arXiv:2304.11277) cuts every parameter along its first dimension. The
weights of a block are whole while it is run, forward and backward; gradients, averaged over all processes, and the
optimizer's moments exist in shares alone. Of Adam's 16 bytes per trained weight a process holds 16 / processes. Where
products are computed in 16 bits, autograd keeps the weights that they were computed with, as without shares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmslim.ranks import processes


class _Cut(NamedTuple):
    """A parameter at its place in a module, and the share (a DTensor) that this process has instead."""

    module: nn.Module
    name: str
    whole: nn.Parameter
    share: Any


class Shares(nn.Module):
    """What a loss runs, held in shares by all processes.

    Each process must run it as often as the others, and use the same parameters: gradients are averaged together. The
    weights of the last block, outside of blocks, and of blocks that have some in common with others are whole from the
    forward pass to the end of the backward one. Parameters of integers (bitsandbytes) stay whole.

    After `join` the modules hold the parameters that they held before, of which every process has all. They are to be
    read, not run: torch's hooks stay.

    Args:
        model: on its device.
        beside: what is trained with it.
        blocks: parts of the model.
    """

    def __init__(self, model: nn.Module, beside: nn.Module, blocks: Sequence[nn.Module]) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__()
        self.model, self.beside = model, beside
        places = [(module, name, p) for module in self.modules() for name, p in module._parameters.items()]
        left = {p for _, _, p in places if p is not None and not p.is_floating_point()}
        mesh = init_device_mesh(next(model.parameters()).device.type, (processes(),))
        # a loss may look at the last block's inside alone, and it is the gradient of its output that makes a unit whole
        for unit in (*_alone(self, blocks[:-1]), self):
            fully_shard(unit, mesh=mesh, ignored_params=left)
        self._cuts = [
            _Cut(module, name, whole, module._parameters[name])
            for module, name, whole in places
            if whole is not None and whole not in left
        ]
        for cut in self._cuts:
            cut.whole.data = cut.whole.data.new_empty(0)

    def forward(self, function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        return function(self.model, batch)

    def of(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """This process's shares of parameters."""
        shares = {id(cut.whole): cut.share for cut in self._cuts}
        return [shares.get(id(parameter), parameter) for parameter in parameters]

    @torch.no_grad()
    def join(self) -> None:
        """Give every process all of each parameter again; all must ask."""
        for module, name, whole, share in self._cuts:
            if not whole.numel():  # a tied one may be there already, from its other place
                whole.data = share.full_tensor()
            module._parameters[name] = whole


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its share, or all."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def summed_up(tensor: Any) -> Any:
    """All of a figure of which each process may hold a part; all must ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _alone(root: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks that share no parameter with another or with what is outside of all."""
    inside = {module for block in blocks for module in block.modules()}
    uses = Counter(id(p) for block in blocks for p in block.parameters())
    uses.update(id(p) for m in root.modules() if m not in inside for p in m.parameters(recurse=False))
    return [block for block in blocks if all(uses[id(p)] == 1 for p in block.parameters())]
