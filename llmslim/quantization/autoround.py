"""AutoRound: learn which way to round, and how far to clip."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from llmslim.quantization.fake_quantize import TrainedInputs, TrainedWeight, stored_scale
from llmslim.quantization.grid import QuantizedWeight, Scheme
from llmslim.quantization.quantizer import Quantizer
from llmslim.quantization.reconstruction import Reconstruction, Schedule, TrainedVector
from llmslim.quantization.rtn import RTN


class AutoRound(Reconstruction):
    """AutoRound: signed gradient descent on roundings and on clipping (Cheng et al. 2023, arXiv:2309.05516).

    W_q = s (clamp(round(W / s + z + V), 0, 2^b - 1) - z), V in [-0.5, 0.5] per weight; a group's grid covers
    [beta min(W), alpha max(W)], alpha and beta in [0, 1]. V begins at 0, alpha and beta at 1: round to nearest. All
    move by the sign of their gradient times a rate that falls linearly from 1 / iterations to 0, so that V can just
    get anywhere. What they lower is the error of the block's outputs, as in `qat`.
    """

    kind: ClassVar[str] = "autoround"

    iterations: int = Field(200, ge=1, description="steps of signed gradient descent per block")

    def start(self) -> Quantizer:
        return RTN(**{name: getattr(self, name) for name in Quantizer.model_fields})

    def trained(self, weight: Tensor, start: QuantizedWeight) -> RoundedWeight:
        return RoundedWeight(weight, start.scheme)

    def schedule(
        self, weights: list[TrainedWeight], small: list[TrainedVector | TrainedInputs], chunks: int
    ) -> Schedule:
        offsets = [weight.offset for weight in weights]  # type: ignore[attr-defined]
        ends = [end for weight in weights for end in (weight.alpha, weight.beta)]  # type: ignore[attr-defined]
        peak = 1 / self.iterations
        groups = [
            {"params": offsets, "lr": peak, "bounds": (-0.5, 0.5)},
            {"params": ends, "lr": peak, "bounds": (0.0, 1.0)},
        ]
        return Schedule(SignDescent(groups), self.iterations, lambda done: max(1 - done, 0.0))

    @property
    def block_copies(self) -> int:
        return 6  # weights, offsets, their gradients, and what fake quantization saves of them

    def windows_trained(self, windows: int) -> float:
        return float(self.iterations * self.batch_size)


class SignDescent(torch.optim.Optimizer):
    """p <- clamp(p - lr sign(gradient)), each group with the `bounds` of its parameters."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"]).clamp_(*group["bounds"])


class RoundedWeight(TrainedWeight):
    """A weight of which offsets before rounding, and the ends of each group's range, are trained.

    Attributes:
        weight: float32 [rows, groups, width], as it was.
        offset: V, of the same shape.
        alpha, beta: shares of the greatest and the least weight that the range keeps, float32 [rows, groups].
    """

    def __init__(self, weight: Tensor, scheme: Scheme) -> None:
        super().__init__(weight, scheme)
        self.weight = weight.reshape(*scheme.scale_shape(*weight.shape), -1)
        self.low = self.weight.amin(-1).clamp(max=0)
        self.high = self.weight.amax(-1).clamp(min=0)
        self.offset = nn.Parameter(torch.zeros_like(self.weight))
        self.alpha = nn.Parameter(torch.ones_like(self.high))
        self.beta = nn.Parameter(torch.ones_like(self.low))

    def values(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.unpruned(self.offset)  # half a step more would bring pruned ones back

    def grid(self) -> tuple[Tensor, Tensor]:
        low, high = self.low * self.beta, self.high * self.alpha
        if self.scheme.symmetric:
            scale = stored_scale(torch.maximum(high, -low) / (self.scheme.max_code / 2), self.scheme)
            return scale, torch.full_like(self.low, float(self.scheme.midpoint))
        scale = stored_scale((high - low) / self.scheme.max_code, self.scheme)
        return scale, self.stored_zero(-low / scale)
