"""A Linear whose weight lies and computes as bitsandbytes has it: NF4 (FP4) in blocks, or LLM.int8 by rows.

    4 bits                                      8 bits
    weight           uint8 [ceil(n / 2), 1]     weight  int8 [out, in]
    absmax           [blocks]                   SCB     float32 [out], the largest of each row
    quant_map        float32 [16]
    quant_state      uint8 [STATE_BYTES]: JSON with type, block size, shape and the offset of double quantization
    nested_absmax    float32 [ceil(blocks / 256)]     only with double quantization,
    nested_quant_map float32 [256]                    where absmax is uint8 and not float32

n = out * in, blocks = ceil(n / 64). Packing, unpacking and products are bitsandbytes' own functions; its Linear4bit
is not used, which repacks itself at an evaluation on some CPUs. Casting the model leaves all but the bias alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BLOCK = 64
NESTED_BLOCK = 256
STATE_BYTES = 256
"""Room for the JSON, which is filled up with spaces: so the size does not depend on the weight."""
THRESHOLD = 6.0
"""Inputs beyond go around the 8-bit product (LLM.int8's outliers): the default of transformers."""

QuantType = Literal["nf4", "fp4"]


class BnbLinear(nn.Module):
    """y = x W^T + b with W in bitsandbytes' 4 or 8 bits; x [..., in] -> y [..., out]. Gradients flow to x only.

    With 8 bits the product itself is in integers: x is rounded by rows, but for its outliers.

    Args:
        bits: 4 or 8.
        double_quant: whether the 4-bit blocks' scales are quantized themselves.
        bias: whether there is a bias; it is of `dtype`.
        device: "meta" gives a skeleton to load into.
    """

    weight: Tensor
    SCB: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        double_quant: bool,
        quant_type: QuantType,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.double_quant, self.quant_type = bits, double_quant, quant_type
        self.shape = (out_features, in_features)
        count = out_features * in_features
        blocks = -(-count // BLOCK)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if bits == 8:
            shapes["weight"] = ((out_features, in_features), torch.int8)
            shapes["SCB"] = ((out_features,), torch.float32)
        else:
            shapes = {
                "weight": ((-(-count // 2), 1), torch.uint8),
                "absmax": ((blocks,), torch.uint8 if double_quant else torch.float32),
                "quant_map": ((16,), torch.float32),
                "quant_state": ((STATE_BYTES,), torch.uint8),
            }
            if double_quant:
                shapes["nested_absmax"] = ((-(-blocks // NESTED_BLOCK),), torch.float32)
                shapes["nested_quant_map"] = ((256,), torch.float32)
        self.parts = tuple(shapes)
        for name, (shape, kind) in shapes.items():
            self.register_parameter(name, _frozen(torch.zeros(shape, dtype=kind, device=device)))
        stored = _frozen(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", stored)

    @classmethod
    def quantize(
        cls, weight: Tensor, bits: int, double_quant: bool, quant_type: QuantType = "nf4"
    ) -> BnbLinear:
        """A float weight [out, in] as bitsandbytes rounds it, without bias."""
        from bitsandbytes import functional

        layer = cls(
            weight.shape[1], weight.shape[0], bits, double_quant, quant_type, False, weight.dtype, "meta"
        )
        weight = weight.detach().contiguous()
        if bits == 8:
            codes, largest, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
            layer.fill({"weight": codes, "SCB": largest})
            return layer
        codes, state = functional.quantize_4bit(
            weight, blocksize=BLOCK, compress_statistics=double_quant, quant_type=quant_type
        )
        parts = state.as_dict(packed=True)
        text = parts.pop(f"quant_state.bitsandbytes__{quant_type}")
        parts["quant_state"] = torch.cat([text, text.new_full((STATE_BYTES - len(text),), ord(" "))])
        layer.fill({"weight": codes, **parts})
        return layer

    def fill(self, parts: dict[str, Tensor]) -> None:
        """Put the tensors of `parts` in place; none is copied."""
        for name in self.parts:
            setattr(self, name, _frozen(parts[name]))

    def stored(self) -> dict[str, Tensor]:
        """All but the bias, by name."""
        return {name: getattr(self, name).detach() for name in self.parts}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out, in]."""
        from bitsandbytes import functional

        if self.bits == 8:
            return functional.int8_vectorwise_dequant(self.weight.detach(), self.SCB.detach()).to(dtype)
        return functional.dequantize_4bit(self.weight.detach(), self._state()).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        import bitsandbytes

        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.bits == 4:
            return bitsandbytes.matmul_4bit(x, self.weight, quant_state=self._state(), bias=bias)
        # it tells at every product that it casts x
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        state = bitsandbytes.MatmulLtState()
        state.has_fp16_weights, state.threshold = False, THRESHOLD
        state.is_training = x.requires_grad  # then, on a CPU, the product is not in integers
        state.CB, state.SCB = self.weight, self.SCB
        return bitsandbytes.matmul(x, self.weight, bias=bias, state=state)

    def _state(self) -> QuantState:
        """What goes with the codes, as bitsandbytes' functions take it."""
        from bitsandbytes.functional import QuantState

        parts = self.stored()
        del parts["weight"]
        told = parts.pop("quant_state")
        return QuantState.from_dict(
            {f"quant_state.bitsandbytes__{self.quant_type}": told, **parts}, told.device
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BnbLinear:
        """`fn` moves or casts a tensor. It sees all but the bias as bytes, which a cast does not touch."""
        kept = {id(getattr(self, name)) for name in self.parts}

        def keep(t: Tensor) -> Tensor:
            return fn(t.view(torch.uint8)).view(t.dtype) if id(t) in kept else fn(t)

        super()._apply(keep, recurse)
        return self

    def extra_repr(self) -> str:
        kind = "LLM.int8" if self.bits == 8 else f"{self.quant_type}, double_quant={self.double_quant}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {kind}"


def state_of(told: Tensor) -> dict[str, Any]:
    """What `quant_state` says."""
    return json.loads(bytes(told.tolist()).decode())


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
