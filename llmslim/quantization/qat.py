"""Quantization-aware training, block by block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.quantization.fake_quantize import TrainedInputs, TrainedWeight, stored_scale
from llmslim.quantization.gptq import GPTQ
from llmslim.quantization.grid import QuantizedWeight, Scheme
from llmslim.quantization.quantizer import Quantizer
from llmslim.quantization.reconstruction import Reconstruction, Schedule, TrainedVector

if TYPE_CHECKING:
    from typing_extensions import Self

MARGIN = 0.25
"""How far from the edge between two codes a weight begins at least, in steps of its grid.

Nearer ones (0.05) fall over the edge in the first steps, all at once, whatever the gradient is worth: on a block of the
demo model the error rose by 24% in 16 steps and ended above its start, and fell from the first on with this margin.
"""


EPSILON = 1e-18
"""Adam's, which is to be far below any gradient, so that a step does not depend on how large the loss is.

A weight's gradient is about the block's error divided by its number of weights: 1e-10 for a small model at 8 bits,
1e-14 for one of 7B. Adam's usual 1e-8 keeps such weights where they are. The square of 1e-18 is still a float32.
"""


class QAT(Reconstruction):
    """Quantization-aware training block by block (Block-AP of EfficientQAT, Chen et al. 2024, arXiv:2407.11062).

    min mean ||B_q(X_q) - B(X)||^2 / ||B(X)||^2 over tokens, B the block as it was, B_q the quantized one, X and X_q
    the hidden states that the uncompressed model and the model quantized so far put in front of it. All of the block
    is trained by AdamW: weights, through rounding, by the straight-through estimator; a step size per group as in LSQ
    (Esser et al. 2019, arXiv:1902.08153), but for its scale of gradients, which Adam takes out again; zero points,
    norms and biases. `recover --method scales` afterwards is EfficientQAT's second phase, end to end.

    Training begins at GPTQ's codes: each weight is the original, moved as far as it takes to be rounded to GPTQ's code.
    Weights and step sizes are trained in units of their grid as it is at first, so that learning rates mean the same in
    every model; step sizes, norms and biases the slower the more codes there are, as 0.2% of a step size is a quarter
    of a step or more at the end of an 8-bit grid. Weights that are zero stay zero. With `activation_bits` 8 the inputs
    of the Linears are rounded in training as they will be, straight through: per token, by each token's largest value,
    or, `activation_scale` "learned", by one step for all inputs of a Linear, which is stored and trained as in LSQ. It
    begins at the one of least square error on the first windows. Language models have a few inputs that are hundreds of
    times larger than the others, to which one step for all yields much (README's results): take it for runtimes that
    know no other.
    """

    kind: ClassVar[str] = "qat"

    bits: int = Field(2, ge=2, le=8, description="bits per weight, 2 to 8")
    lr: float = Field(
        5e-3,
        gt=0,
        description="peak learning rate of the weights, in steps of their grid; cosine to 0",
    )
    scale_lr: float = Field(
        2e-3,
        gt=0,
        description="that of zero points, in steps, and of step sizes, norms and biases, as a share of them; this for "
        "2 bits, of shares less with more codes",
    )
    epochs: float = Field(8.0, gt=0, le=1e9, description="passes over the calibration windows")
    activation_scale: Literal["token", "learned"] = Field(
        "token",
        description="step of the inputs with activation_bits: by each token's largest, or one for each Linear, learned",
    )

    @model_validator(mode="after")
    def _of_activations(self) -> Self:
        if self.activation_scale != "token" and self.activation_bits is None:
            raise ValueError(
                f"activation_scale {self.activation_scale} is of quantized inputs: give activation_bits 8"
            )
        return self

    @property
    def trains_vectors(self) -> bool:
        return True

    @property
    def trains_inputs(self) -> bool:
        return self.activation_scale == "learned"

    def scheme(self, *names: str) -> Scheme:
        scheme = super().scheme(*names)
        return scheme.model_copy(update={"activation_scale": "tensor"}) if self.trains_inputs else scheme

    def windows_trained(self, windows: int) -> float:
        return self.epochs * windows

    @property
    def block_copies(self) -> int:
        return 8  # weights, their units, gradients, two moments, and what fake quantization saves of them

    def start(self) -> Quantizer:
        shared = {name: getattr(self, name) for name in Quantizer.model_fields}
        return GPTQ(**shared)

    def trained(self, weight: Tensor, start: QuantizedWeight) -> LearnedGrid:
        return LearnedGrid(weight, start)

    def schedule(
        self, weights: list[TrainedWeight], small: list[TrainedVector | TrainedInputs], chunks: int
    ) -> Schedule:
        matrices = [weight.weight for weight in weights]  # type: ignore[attr-defined]
        zeros = [weight.zero for weight in weights]  # type: ignore[attr-defined]
        shares: dict[int, list[nn.Parameter]] = {}  # by bits of the grid
        for weight in weights:
            shares.setdefault(weight.scheme.bits, []).append(weight.ratio)  # type: ignore[arg-type]
        for one in small:
            bits = one.scheme.activation_bits if isinstance(one, TrainedInputs) else None
            shares.setdefault(bits or self.bits, []).append(one.change)
        groups: list[dict[str, Any]] = [
            {"params": matrices, "lr": self.lr},
            {"params": zeros, "lr": self.scale_lr},
        ]
        # a share of a step size is as many steps at the end of the grid as it is of the codes; there are 3 at 2 bits
        groups += [{"params": ones, "lr": self.scale_lr * 3 / (2**bits - 1)} for bits, ones in shares.items()]
        steps = max(1, math.ceil(chunks * self.epochs))
        optimizer = torch.optim.AdamW(groups, eps=EPSILON, weight_decay=0.0, fused=True)
        return Schedule(optimizer, steps, lambda done: 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

    def workspace_bytes(self, anatomy: Anatomy) -> int:
        return self.start().workspace_bytes(anatomy)


class LearnedGrid(TrainedWeight):
    """A weight, its step sizes and its zero points, all trained.

    Attributes:
        unit: step sizes at the start, float32 [rows, groups].
        weight: in units, float32 [rows, groups, width].
        ratio: step sizes now to those at the start, float32 [rows, groups].
        zero: zero points, float32 [rows, groups]; not trained when symmetric.
    """

    def __init__(self, weight: Tensor, start: QuantizedWeight) -> None:
        super().__init__(weight, start.scheme)
        self.unit = start.scale
        original = weight.reshape(*start.scale.shape, -1)
        zero = torch.full_like(start.scale, float(start.scheme.midpoint))
        if start.zero_point is not None:
            zero = start.zero_point.float()
        centre = start.codes.reshape(original.shape).float() - zero.unsqueeze(-1)
        reach = 0.5 - MARGIN
        begun = (original / self.unit.unsqueeze(-1)).clamp(centre - reach, centre + reach)
        self.weight = nn.Parameter(begun)
        self.ratio = nn.Parameter(torch.ones_like(start.scale))
        self.zero = nn.Parameter(zero, requires_grad=not start.scheme.symmetric)

    def values(self) -> tuple[Tensor, Tensor | None]:
        return self.unpruned(self.weight) * self.unit.unsqueeze(-1), None

    def grid(self) -> tuple[Tensor, Tensor]:
        return stored_scale(self.unit * self.ratio, self.scheme), self.stored_zero(self.zero)
