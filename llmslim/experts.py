"""Experts one by one: the fused 3-D expert parameters of transformers as plain Linears.

transformers keeps all experts of a block in two parameters, gate_up_proj [E, 2I, H] and down_proj [E, H, I].
Methods work on Linears. `UnfuseExperts` turns each slice into a Linear that shares its memory, so that every
method, statistic and edit applies to experts as to anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from llmslim.anatomy import Block, Experts
from llmslim.edit import Edit, replace_module


class Expert(nn.Module):
    """One gated expert: down(act(gate) * up), gate and up in one Linear. Children in order of execution."""

    def __init__(self, gate_up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down

    def forward(self, x: Tensor, act_fn: nn.Module) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(act_fn(gate) * up)


class UnfusedExperts(nn.ModuleList):
    """The experts of a block as a list of `Expert`; called as transformers calls its fused experts."""

    def __init__(self, experts: list[Expert], act_fn: nn.Module) -> None:
        super().__init__(experts)
        self.__dict__["act_fn"] = act_fn  # no child: the children are the experts
        self.num_experts = len(experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, H], top_k_index and top_k_weights [tokens, k] -> [tokens, H]."""
        result = torch.zeros_like(hidden_states)
        for index in range(self.num_experts):
            token, slot = torch.where(top_k_index == index)
            if len(token):
                output = self[index](hidden_states[token], self.act_fn)
                result.index_add_(0, token, (output * top_k_weights[token, slot, None]).to(result.dtype))
        return result


class UnfuseExperts(Edit):
    """Replace the fused experts at `module` by `UnfusedExperts`."""

    kind: ClassVar[str] = "unfuse_experts"
    module: str

    def apply(self, model: nn.Module) -> None:
        fused = model.get_submodule(self.module)
        if isinstance(fused, UnfusedExperts):
            return
        gate_up = model.get_parameter(f"{self.module}.gate_up_proj")
        down = model.get_parameter(f"{self.module}.down_proj")
        plain = not getattr(fused, "is_transposed", False) and not getattr(fused, "has_bias", False)
        if not plain or gate_up.ndim != 3 or gate_up.shape[1] != 2 * down.shape[2]:
            raise ValueError(f"{self.module} keeps its experts in a layout that llmslim does not know")
        experts = [Expert(_linear(gate_up[index]), _linear(down[index])) for index in range(gate_up.shape[0])]
        replace_module(model, self.module, UnfusedExperts(experts, cast(nn.Module, fused.act_fn)))


@contextmanager
def unfused(block: Block) -> Iterator[None]:
    """Has the fused experts of a block, if it has any, as Linears on the same memory meanwhile."""
    experts = block.mlp
    if not isinstance(experts, Experts) or experts.gate_up is None:
        yield
        return
    UnfuseExperts(module=experts.name).apply(block.model)
    try:
        yield
    finally:
        replace_module(block.model, experts.name, experts.module)


def _linear(weight: Tensor) -> nn.Linear:
    """A Linear without bias on this very weight [out, in]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear
