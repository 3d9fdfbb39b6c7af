"""Train scales, norms and biases: the cheap recovery."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.edit import replace_module
from llmslim.training.step import Finish, TrainStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Scales(TrainStep):
    """Train norms, biases and the scales of packed Linears; codes and zero points stay as they are.

    W = (code - zero) * scale: a gradient reaches the scale of each group of weights, and nothing is decided anew.
    EfficientQAT's second phase (Chen et al. 2024, arXiv:2407.11062), with norms and biases beside. Scales are trained
    in float32 and rounded to their type at the end. Packed embeddings and heads are left alone.
    """

    kind: ClassVar[str] = "scales"
    verb: ClassVar[str] = "recover"

    lr: float = Field(3e-4, gt=0, description="peak learning rate of AdamW; cosine to 0 at the end")

    @contextmanager
    def training(self, model: PreTrainedModel) -> Iterator[tuple[list[nn.Parameter], Finish]]:
        blocks = [(block.name, block.module) for block in Anatomy(model).blocks]
        packed = {
            f"{prefix}.{name}": module
            for prefix, root in blocks
            for name, module in root.named_modules()
            if hasattr(module, "quantized")
        }
        vectors = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.ndim == 1 and parameter.dtype == torch.float32
        }
        scaled = {name: ScaledLinear(module) for name, module in packed.items()}
        for name, module in scaled.items():
            replace_module(model, name, module)

        def finish() -> dict[str, Tensor]:
            scales = {f"{name}.weight_scale": module.rounded() for name, module in scaled.items()}
            return {**vectors, **scales}

        try:
            yield [*vectors.values(), *(module.scale for module in scaled.values())], finish
        finally:
            for name, module in packed.items():
                replace_module(model, name, module)


class ScaledLinear(nn.Module):
    """A packed Linear while its scales train: y = x W(scale)^T + b; x [..., in] -> [..., out], float32.

    Attributes:
        scale: float32 [rows, groups].
    """

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self.packed = packed
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.scale = nn.Parameter(packed.weight_scale.detach().float().clone())  # type: ignore[operator, union-attr]

    @property
    def weight(self) -> Tensor:
        return self.packed.weight  # type: ignore[return-value]  # models look at its type

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self.scale, self.packed)
        return y if self.packed.bias is None else y + self.packed.bias

    def rounded(self) -> Tensor:
        """The scales as they are stored; one that its type would make 0 or infinite keeps its old value."""
        old: Tensor = self.packed.weight_scale  # type: ignore[assignment]
        new = self.scale.detach().to(old.dtype)
        return torch.where((new == 0) | ~new.isfinite(), old, new)


class _Product(torch.autograd.Function):
    """x W(scale)^T with gradients to x and to the scales; W is expanded anew in the backward pass, never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, packed: Any) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.packed = packed
        return x @ replace(packed.quantized(), scale=scale).dequantize().T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        with torch.no_grad():
            # W = centred * scale: with scales of 1 the weight is the centred codes
            centred = replace(ctx.packed.quantized(), scale=torch.ones_like(scale)).dequantize()
            rows, groups = scale.shape
            shape = (rows, -1, groups, centred.shape[1] // groups)
            by_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
            by_scale = (by_weight * centred).view(shape).sum((1, 3))
            weight = centred.view(shape).mul_(scale[:, None, :, None]).view(centred.shape)
        return grad @ weight, by_scale, None
