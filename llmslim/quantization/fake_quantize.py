"""Fake quantization: a weight on its grid, with gradients to what the grid is made of."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.quantization.grid import QuantizedWeight, Scheme, assemble, quantize_static, round_scale


def fake_quantize(
    weight: Tensor, scale: Tensor, zero: Tensor, max_code: int, offset: Tensor | None = None
) -> Tensor:
    """(clamp(round(w / s + z + v), 0, max_code) - z) s, rounding passed straight through by gradients.

    With u = w / s + z + v before rounding, q after clamping, and "inside" where rounding stays in 0 .. max_code:

        d/dw = 1,      d/ds = q - z - w / s,  d/dz = 0,   d/dv = s   inside
        d/dw = 0,      d/ds = q - z,          d/dz = -s,  d/dv = 0   elsewhere

    which for s is LSQ's (Esser et al. 2019, arXiv:1902.08153, equation 3), and for z LSQ+'s.

    Args:
        weight: w, float32 [rows, groups, width].
        scale, zero: s and z, float32 [rows, groups]; z whole numbers.
        offset: v, of the weight's shape, added before rounding; none when not given.

    Returns:
        float32 of the weight's shape; gradients flow to all four.
    """
    return _FakeQuantize.apply(weight, scale, zero, max_code, offset)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, max_code: int, offset: Tensor | None
    ) -> Tensor:
        codes = _levels(weight, scale, zero, offset).round_()
        inside = (codes >= 0) & (codes <= max_code)
        centred = codes.clamp_(0, max_code).sub_(zero.unsqueeze(-1))
        ctx.has_offset = offset is not None
        ctx.save_for_backward(weight, scale, centred, inside)
        return centred * scale.unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scale, centred, inside = ctx.saved_tensors
        passed = grad * inside
        by_scale = (grad * centred).sum(-1) - (passed * weight).sum(-1) / scale
        by_zero = scale * (passed.sum(-1) - grad.sum(-1))
        by_offset = passed * scale.unsqueeze(-1) if ctx.has_offset else None
        return passed if ctx.needs_input_grad[0] else None, by_scale, by_zero, None, by_offset


def _levels(weight: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None) -> Tensor:
    levels = (weight * scale.reciprocal().unsqueeze(-1)).add_(zero.unsqueeze(-1))
    return levels if offset is None else levels.add_(offset)


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value`."""
    return rounded + (value - value.detach())


def stored_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """Scales as their type holds them, with gradients."""
    return straight_through(scale, round_scale(scale.detach(), scheme))


class TrainedWeight(nn.Module):
    """A weight of a Linear while its grid is trained; subclasses say what is learned.

    Args:
        weight: float32 [out, in], as it was: what is zero was pruned, and stays so.
    """

    def __init__(self, weight: Tensor, scheme: Scheme) -> None:
        super().__init__()
        self.scheme, self.shape = scheme, weight.shape
        pruned = weight.reshape(*scheme.scale_shape(*weight.shape), -1) == 0
        self.pruned = pruned if bool(pruned.any()) else None

    @abstractmethod
    def values(self) -> tuple[Tensor, Tensor | None]:
        """The weight and the offset as `fake_quantize` takes them; 0 both where a weight was pruned."""

    @abstractmethod
    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they are stored, with gradients."""

    def forward(self) -> Tensor:
        """The dequantized weight, float32 [out, in], as it is stored; with gradients."""
        weight, offset = self.values()
        scale, zero = self.grid()
        return fake_quantize(weight, scale, zero, self.scheme.max_code, offset).reshape(self.shape)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """What is stored."""
        weight, offset = self.values()
        scale, zero = self.grid()
        codes = _levels(weight, scale, zero, offset).round_().clamp_(0, self.scheme.max_code)
        return assemble(codes.reshape(self.shape), scale.detach().clone(), zero.detach(), self.scheme)

    def unpruned(self, values: Tensor) -> Tensor:
        """The values, but 0 where a weight was pruned."""
        return values if self.pruned is None else values.masked_fill(self.pruned, 0.0)

    def stored_zero(self, zero: Tensor) -> Tensor:
        """Zero points as whole numbers."""
        return straight_through(zero, zero.detach().round().clamp(0, self.scheme.max_code))


class TrainedInputs(nn.Module):
    """The inputs of a Linear on a grid of 8 bits with one step for all, learned as in LSQ.

    Args:
        start: the step at first, float32 [1].
    """

    def __init__(self, start: Tensor, scheme: Scheme) -> None:
        super().__init__()
        self.start, self.scheme = start, scheme
        self.change = nn.Parameter(torch.zeros_like(start))
        """As a share of the start, so that learning rates mean the same for all."""

    def scale(self) -> Tensor:
        """The step as it is stored, float32 [1], with gradients."""
        return stored_scale(self.start * (1 + self.change), self.scheme)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return quantize_static(x, self.scale())
        scale = self.scale().unsqueeze(0)
        rounded = fake_quantize(x.float().reshape(1, 1, -1), scale, torch.full_like(scale, 128.0), 255)
        return rounded.reshape(x.shape).to(x.dtype)
