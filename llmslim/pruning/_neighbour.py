"""Refit of the block in front of removed ones, so that its output comes near what the model had behind them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmslim.anatomy import MLP, Block
from llmslim.anatomy.parts import dense_weight, is_linear
from llmslim.calibration.stream import BlockStream, Lane
from llmslim.edit import replace_module
from llmslim.pruning import importance
from llmslim.pruning._depth import copy_lane
from llmslim.sparse import SparseLinear
from llmslim.step import Survey


@dataclass
class Refit:
    """A new down matrix [out, in], and the error behind the removed blocks without and with it.

    The error is the mean over tokens of ||output - target||^2 / ||target||^2.
    """

    weight: Tensor
    before: float
    after: float


def refitting(index: int, keep: list[int], size: int) -> bool:
    """Whether a kept block of `size` is refitted: those right behind it go, or all those in front of it."""
    return (index + 1 < size and index + 1 not in keep) or (index == keep[0] and index > 0)


def refit_neighbours(look: Survey, keep: dict[str, list[int]], damping: float) -> dict[str, Refit]:
    """Name of a down matrix -> its refit, for every run of removed blocks that has a neighbour fit for it.

    Two lanes go through the model: that of the shortened one with all earlier refits, and that of the model as it
    is, whose hidden states behind a run are what the shortened one is to have there.

    Args:
        keep: by stack, the blocks that stay, ascending.
        damping: pull to the old weights, x the mean diagonal of the Hessian.
    """
    found: dict[str, Refit] = {}
    sizes = {stack.name: len(stack.blocks) for stack in look.anatomy.stacks}
    pending: _Pending | None = None
    for block, stream in look.blocks():
        stack = block.name.rpartition(".")[0]
        short = stream.lanes["calibration"]
        if "dense" not in stream.lanes:
            stream.add(copy_lane(short, "dense"))
        stays, size = keep[stack], sizes[stack]
        if block.index in stays:
            wanted = refitting(block.index, stays, size)
            pending = _Pending.at(block, stream, short) if wanted else None
            if pending is None:
                stream.forward(block, short)
        stream.forward(block, stream.lanes["dense"])
        run_goes_on = block.index + 1 < size and block.index + 1 not in stays
        if pending is not None and not run_goes_on:
            found[pending.name] = pending.close(short, stream.lanes["dense"].hidden, damping)
            pending = None
    return found


@dataclass
class _Pending:
    """A block halted in front of its down matrix until the target is known; its lane is what down adds to."""

    name: str
    linear: nn.Module
    inputs: list[Tensor]

    @classmethod
    @torch.no_grad()
    def at(cls, block: Block, stream: BlockStream, lane: Lane) -> _Pending | None:
        """Pass a lane through all of a block but the weights of down; None, and not passed, if that cannot be."""
        if no_refit(block) is not None:
            return None
        mlp = block.mlp
        assert isinstance(mlp, MLP)
        linear = mlp.down.module
        silent = copy.deepcopy(linear)
        silent.weight.zero_()  # type: ignore[operator]
        seen: list[Tensor] = []

        def visit(name: str, inputs: list[Tensor]) -> None:
            seen.extend(inputs)
            replace_module(stream.model, name, silent)

        first = Lane("first", lane.inputs[:1], lane.hidden[:1], lane.calls[:1])
        start = list(lane.hidden)
        stream.forward(block, first)
        stream.walk(block, lane, [mlp.down.name], visit)
        replace_module(stream.model, mlp.down.name, linear)
        pending = cls(mlp.down.name, copy.deepcopy(linear), seen)
        if not _adds(lane.hidden[0], pending.output(0, lane.hidden[0]), first.hidden[0]):
            lane.hidden = start
            return None
        return pending

    def output(self, index: int, rest: Tensor) -> Tensor:
        """What the weights of down make of a chunk, shaped as the rest that it is added to."""
        return (self.inputs[index] @ dense_weight(self.linear).T).view_as(rest)

    @torch.no_grad()
    def close(self, lane: Lane, target: list[Tensor], damping: float) -> Refit:
        """Solve for down, and pass the lane on through the result."""
        weight = dense_weight(self.linear)
        rows, errors = [], []
        for index, rest in enumerate(lane.hidden):
            wanted = target[index].float()
            scale = wanted.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()
            error = (wanted - rest.float() - self.output(index, rest).float()) * scale
            rows.append(self.inputs[index].float().reshape(-1, weight.shape[1]) * scale.view(-1, 1))
            errors.append(error.reshape(-1, weight.shape[0]))
        step = importance.least_squares(*importance.moments(errors, rows), damping)
        before = sum(float(error.square().sum()) for error in errors)
        after = sum(float((e - x @ step.T).square().sum()) for e, x in zip(errors, rows, strict=True))
        weight.copy_(weight.float() + step)
        for index, rest in enumerate(lane.hidden):
            lane.hidden[index] = rest + self.output(index, rest)
        tokens = sum(len(error) for error in errors)
        return Refit(weight.clone().contiguous(), before / tokens, after / tokens)


def no_refit(block: Block) -> str | None:
    """Why a block has no dense down matrix to refit; None if it has one."""
    mlp = block.mlp
    if not isinstance(mlp, MLP):
        return "it has experts, of which none sees all tokens" if mlp is not None else "it has no MLP"
    down = mlp.down.module  # a sparse one would lose its zeros
    dense = is_linear(down) and not isinstance(down, SparseLinear)
    return None if dense else "its down matrix is compressed already"


def _adds(rest: Tensor, product: Tensor, whole: Tensor) -> bool:
    """Whether a block's output is the rest plus what down makes, to the rounding of each number: no norm follows."""
    scale = rest.float().abs() + product.float().abs() + whole.float().abs()
    difference = (rest.float() + product.float() - whole.float()).abs()
    return bool((difference <= 16 * torch.finfo(rest.dtype).eps * (scale + scale.mean())).all())
