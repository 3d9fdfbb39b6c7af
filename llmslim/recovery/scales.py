"""Train scales, norms and biases: the cheap recovery."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.edit import in_place
from llmslim.errors import UserError
from llmslim.ties import counterpart, shared_modules
from llmslim.training.objective import ObjectiveStep
from llmslim.training.step import Finish

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Scales(ObjectiveStep):
    """Train norms, biases and the scales of packed Linears; codes and zero points stay as they are.

    W = (code - zero) * scale: a gradient reaches the scale of each group of weights, and nothing is decided anew.
    EfficientQAT's second phase (Chen et al. 2024, arXiv:2407.11062) trains the scales alone, as `train: scales` does;
    by default norms and biases are trained beside. Scales are trained in float32 and rounded to their type at the end.
    Packed embeddings and heads are left alone.
    """

    kind: ClassVar[str] = "scales"
    verb: ClassVar[str] = "recover"

    lr: float = Field(3e-4, gt=0, description="peak learning rate of AdamW; cosine to 0 at the end")

    train: Literal["scales", "all"] = Field(
        "all", description="the scales of packed Linears alone, or norms and biases with them"
    )

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if self.train == "scales" and not _packed(anatomy):
            raise UserError(
                "train 'scales' trains the scales of packed Linears, and no block has one: quantize first, or use "
                "train all or --method full."
            )

    def placed(self, anatomy: Anatomy) -> int:
        trained = [module.weight_scale.numel() for module in _packed(anatomy).values()]
        if self.train == "all":
            trained += [p.numel() for p in anatomy.model.parameters() if p.ndim == 1]
        return sum(trained)

    @contextmanager
    def training(self, model: PreTrainedModel) -> Iterator[tuple[list[nn.Parameter], Finish]]:
        vectors = {
            name: parameter
            for name, parameter in model.named_parameters()
            if self.train == "all" and parameter.ndim == 1 and parameter.dtype == torch.float32
        }
        scaled = {name: ScaledLinear(module) for name, module in _packed(Anatomy(model)).items()}
        shared = shared_modules(model)
        sources = {name: counterpart(name, shared) for name in scaled}
        own = {name: module for name, module in scaled.items() if sources[name] is None}
        for name, module in scaled.items():
            module.scale = scaled[sources[name] or name].scale

        def finish() -> dict[str, Tensor]:
            scales = {f"{name}.weight_scale": module.rounded() for name, module in own.items()}
            return {**vectors, **scales}

        with in_place(model, scaled):
            yield [*vectors.values(), *(module.scale for module in own.values())], finish


def _packed(anatomy: Anatomy) -> dict[str, Any]:
    """The packed Linears of the blocks, by name."""
    return {
        f"{block.name}.{name}": module
        for block in anatomy.blocks
        for name, module in block.module.named_modules()
        if hasattr(module, "quantized")
    }


class ScaledLinear(nn.Module):
    """A packed Linear while its scales train: y = x W(scale)^T + b; x [..., in] -> [..., out], float32.

    Unpacking takes longer than the product, so that the codes are unpacked once: a byte per weight.

    Attributes:
        scale: float32 [rows, groups].
        centred: code - zero point, int8 (int16 for 8 bits) [out, in].
    """

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self.packed = packed
        self.in_features, self.out_features = packed.in_features, packed.out_features
        quantized = packed.quantized()  # type: ignore[operator]
        centred = replace(quantized, scale=torch.ones_like(quantized.scale)).dequantize()
        self.centred = centred.to(torch.int8 if quantized.scheme.bits < 8 else torch.int16)
        self.scale = nn.Parameter(packed.weight_scale.detach().float().clone())  # type: ignore[operator, union-attr]

    @property
    def weight(self) -> Tensor:
        return self.packed.weight  # type: ignore[return-value]  # models look at its type

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        x = self.packed.quantized_inputs(x)  # type: ignore[operator]
        y = _Product.apply(x.to(dtype), self.scale, self.centred)
        return y if self.packed.bias is None else y + self.packed.bias

    def rounded(self) -> Tensor:
        """The scales as they are stored; one that its type would make 0 or infinite keeps its old value."""
        old: Tensor = self.packed.weight_scale  # type: ignore[assignment]
        new = self.scale.detach().to(old.dtype)
        return torch.where((new == 0) | ~new.isfinite(), old, new)


class _Product(torch.autograd.Function):
    """x W(scale)^T with gradients to x and to the scales; W is made anew in the backward pass, never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, centred: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale, centred)
        return x @ _weight(centred, scale, x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, scale, centred = ctx.saved_tensors
        rows, groups = scale.shape
        by_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        by_code = by_weight.float().mul_(centred).view(rows, -1, groups, centred.shape[1] // groups)
        return grad @ _weight(centred, scale, x.dtype), by_code.sum((1, 3)), None


def _weight(centred: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] of integers [out, in] and scales float32 [rows, groups]."""
    rows, groups = scale.shape
    parts = centred.view(rows, -1, groups, centred.shape[1] // groups)
    return (parts * scale[:, None, :, None]).to(dtype).view(centred.shape)
