"""The inputs of Linears in training: on their grid, of each token's own step or of one that is learned and stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.anatomy import Block
from llmslim.calibration.stream import BlockStream
from llmslim.edit import replace_module
from llmslim.quantization.edits import PackLinear
from llmslim.quantization.fake_quantize import TrainedInputs
from llmslim.quantization.grid import quantize_static
from llmslim.quantization.packed import PackedLinear
from llmslim.step import StepRecord

SHARES = [share / 20 for share in range(1, 21)]
SEEN = 4  # chunks of windows that steps are searched on


@contextmanager
def inputs_quantized(
    dense: dict[str, nn.Module], quantize: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """Has Linears take what functions of the same names make of their inputs."""

    def hook(function: Callable[[Tensor], Tensor]) -> Any:
        return lambda module, args: (function(args[0]), *args[1:])

    hooks = [linear.register_forward_pre_hook(hook(quantize[name])) for name, linear in dense.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@torch.no_grad()
def input_steps(
    block: Block, stream: BlockStream, dense: dict[str, nn.Module], packed: dict[str, PackedLinear]
) -> dict[str, TrainedInputs]:
    """For each Linear the step of least square error among shares of the one that just covers its inputs.

    By the first windows, which pass through the block as it is.
    """
    tops = dict.fromkeys(dense, 0.0)
    errors = {name: torch.zeros(len(SHARES)) for name in dense}

    def cover(name: str, x: Tensor) -> Tensor:
        tops[name] = max(tops[name], float(x.abs().max()) / 127.5)
        return x

    def judge(name: str, x: Tensor) -> Tensor:
        for index, share in enumerate(SHARES):
            step = torch.tensor([share * tops[name] or 1.0], device=x.device)
            errors[name][index] += (quantize_static(x, step) - x).float().square().sum().cpu()
        return x

    lane = stream.lanes["calibration"]
    for look in (cover, judge):
        with inputs_quantized(dense, {name: partial(look, name) for name in dense}):
            for index in range(min(SEEN, len(lane.hidden))):
                args, kwargs = lane.calls[index][block.index]
                block.module(lane.hidden[index], *args, **kwargs)
    found = {}
    for name, module in packed.items():
        best = SHARES[int(errors[name].argmin())] * tops[name] or 1.0  # an expert that no token reached
        step = torch.tensor([best], device=module.weight_scale.device)
        found[name] = TrainedInputs(step, module.scheme)
    return found


def fix_inputs(model: nn.Module, name: str, packed: PackedLinear, step: Tensor, record: StepRecord) -> None:
    """Put a Linear in the place of a packed one, that takes its inputs by a step which is stored."""
    scheme = packed.scheme.model_copy(update={"activation_scale": "tensor"})
    weight = replace(packed.quantized(), scheme=scheme, input_scale=step)
    fixed = PackedLinear.from_quantized(weight, packed.bias)
    fixed.pruned = packed.pruned
    replace_module(model, name, fixed)
    index = next(
        i for i, edit in enumerate(record.edits) if isinstance(edit, PackLinear) and edit.module == name
    )
    record.edits[index] = record.edits[index].model_copy(update={"scheme": scheme})
