"""A model in training whose weights several processes hold a share of each: fully sharded data parallel (FSDP).

torch's `fully_shard` (FSDP2; Zhao et al. 2023, arXiv:2304.11277) cuts every parameter along its first dimension. The
weights of a block are whole while it is run, forward and backward; gradients, averaged over all processes, and the
optimizer's moments exist in shares alone. Of Adam's 16 bytes per trained weight a process holds 16 / processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.ranks import processes


class Shares(nn.Module):
    """What a loss runs, held in shares by all processes; each must run it as often as the others.

    The weights outside of blocks, and of blocks that share weights with others, are whole from the forward pass to the
    end of the backward one. Parameters of other kinds than floating point (bitsandbytes) stay whole. After `join` the
    modules hold the parameters that they held before, of which every process has all, and are to be read, not run.

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
        whole = {p for _, _, p in places if p is not None and not p.is_floating_point()}
        mesh = init_device_mesh(next(model.parameters()).device.type, (processes(),))
        for unit in (*_alone(self, blocks), self):
            fully_shard(unit, mesh=mesh, ignored_params=whole)
        self._cut: list[tuple[nn.Module, str, nn.Parameter, Any]] = []
        for module, name, before in places:
            if before is not None and before not in whole:
                self._cut.append((module, name, before, module._parameters[name]))
                before.data = before.data.new_empty(0)

    def forward(self, function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        return function(self.model, batch)

    def of(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The shares that stand for parameters."""
        shares = {id(before): share for _, _, before, share in self._cut}
        return [shares.get(id(parameter), parameter) for parameter in parameters]

    @torch.no_grad()
    def join(self) -> None:
        """Give every process all of each parameter again; all must ask."""
        for module, name, before, share in self._cut:
            if not before.numel():  # tied ones stand in several places
                before.data = share.full_tensor()
            module._parameters[name] = before


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
