"""The GPTQ layout (AutoGPTQ, GPTQModel, vLLM). Per Linear `name` with weight [out, in]:

    name.qweight  int32 [in * bits / 32, out]: codes along in, one little-endian bit stream per column
    name.qzeros   int32 [groups, out * bits / 32]: zero points along out, packed alike
    name.scales   float16 [groups, out]
    name.g_idx    int32 [in]: the group of each input, here always input // group_size

Symmetric weights have the zero point 2**(bits-1). Version 1 ("gptq") stores zero points less one; where one
is 0, readers that add the one per field and those that add it per word differ. Hence symmetric weights are
written as version 1, which everything reads, and asymmetric ones as version 2 ("gptq_v2"), which stores zero
points as they are. Not read: version 1 when asymmetric, and `g_idx` of a dynamic activation order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import llmslim
from llmslim.anatomy import Anatomy
from llmslim.checkpoint.formats import (
    Format,
    Get,
    Packed,
    as_bytes,
    as_words,
    exact_scale,
    expect,
    pack_linears,
)
from llmslim.edit import Edit
from llmslim.errors import UserError
from llmslim.quantization import packing
from llmslim.quantization.edits import PackLinear
from llmslim.quantization.grid import QuantizedWeight, Scheme

BITS = (2, 3, 4, 8)


class GPTQLayout(Format):
    name = "gptq"

    def refusal(self, edits: Sequence[Edit], model: PreTrainedModel, dtype: torch.dtype) -> str | None:
        schemes = pack_linears(edits)
        if schemes is None:
            other = next(edit for edit in edits if not isinstance(edit, PackLinear))
            return f"it holds packed Linears only, and the result has the edit {other.kind!r}"
        if len(set(schemes.values())) > 1:
            return "it has one bit width and group size for all Linears, and the result has overrides"
        scheme = next(iter(schemes.values()))
        if scheme.activation_bits:
            return "it has no quantized activations"
        if scheme.bits not in BITS:
            return f"it has {', '.join(map(str, BITS))} bits, not {scheme.bits}"
        if scheme.group_size == "tensor":
            return 'it has scales per group or per channel, not "tensor"'
        if scheme.scale_dtype != "float16":
            return f"its scales are float16, not {scheme.scale_dtype}: set scale_dtype to float16"
        for name in schemes:
            linear = model.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                return f"{name} is a {type(linear).__name__}, and llmslim writes nn.Linear only in it"
            if (linear.in_features * scheme.bits) % 32 or (linear.out_features * scheme.bits) % 32:
                shape = f"{linear.out_features} x {linear.in_features}"
                return f"{name} is {shape}, and both must fill words of 32 bits"
        return _partial(schemes, model)[1]

    def stored(self, name: str, module: Packed) -> dict[str, Tensor]:
        scheme, columns = module.scheme, module.shape[1]
        scale = module.weight_scale.detach()
        if module.weight_zero_point is None:  # version 1: less one
            zero = torch.full(scale.shape, scheme.midpoint - 1, dtype=torch.uint8, device=scale.device)
        else:
            zero = module.weight_zero_point.detach()
        group = scheme.group_width(columns)
        tensors = {
            "qweight": as_words(module.weight_packed.detach()).T.contiguous(),
            "qzeros": as_words(packing.pack(zero.T.contiguous(), scheme.bits)),
            "scales": scale.T.contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32, device=scale.device) // group,
        }
        return {f"{name}.{part}": tensor for part, tensor in tensors.items()}

    def read(self, name: str, module: Packed, get: Get) -> QuantizedWeight:
        like = self.stored(name, module)
        tensors = {full.rpartition(".")[2]: expect(full, get(full), tensor) for full, tensor in like.items()}
        scheme, (rows, columns) = module.scheme, module.shape
        order = torch.arange(columns, dtype=torch.int32) // scheme.group_width(columns)
        if not torch.equal(tensors["g_idx"].cpu(), order):
            raise UserError(
                f"The checkpoint's {name} was quantized with a dynamic activation order (g_idx), which "
                "llmslim does not read; take one made with desc_act=False or static groups."
            )
        codes = packing.unpack(
            as_bytes(tensors["qweight"].T, packing.packed_width(columns, scheme.bits)), scheme.bits, columns
        )
        scale = exact_scale(name, tensors["scales"], scheme).T.contiguous()
        bytes_ = as_bytes(tensors["qzeros"], packing.packed_width(rows, scheme.bits))
        zero = packing.unpack(bytes_, scheme.bits, rows).T.contiguous()
        if not scheme.symmetric:
            return QuantizedWeight(scheme, codes, scale, zero)
        # version 1 announces 2**(bits-1) - 1, version 2 (some peers write symmetric weights so) 2**(bits-1)
        if not bool(((zero == scheme.midpoint - 1) | (zero == scheme.midpoint)).all()):
            raise UserError(f"The checkpoint's config says symmetric, and {name} has other zero points.")
        return QuantizedWeight(scheme, codes, scale)

    def config(self, edits: Sequence[Edit], model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any]:
        schemes = pack_linears(edits)
        assert schemes
        scheme = next(iter(schemes.values()))
        version = "gptq" if scheme.symmetric else "gptq_v2"
        config = {
            "quant_method": self.name,
            "bits": scheme.bits,
            "group_size": scheme.group_size if isinstance(scheme.group_size, int) else -1,
            "sym": scheme.symmetric,
            "desc_act": False,
            "static_groups": False,
            "true_sequential": True,
            "lm_head": False,
            "format": version,
            "checkpoint_format": version,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"llmslim:{llmslim.__version__}"]},
        }
        chosen, _ = _partial(schemes, model)
        return (
            config
            if chosen is None
            else config | {"modules_in_block_to_quantize": [[name] for name in chosen]}
        )

    def edits(self, config: dict[str, Any], model: PreTrainedModel) -> list[Edit]:
        layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        symmetric = config.get("sym", True)
        if layout not in ("gptq", "gptq_v2") or (layout == "gptq" and not symmetric):
            raise UserError(
                f"The checkpoint is GPTQ in the layout {layout!r} with sym={symmetric}; llmslim reads 'gptq' "
                "when symmetric, and 'gptq_v2'."
            )
        if config.get("dynamic") or config.get("lm_head") or config.get("pack_dtype", "int32") != "int32":
            raise UserError(
                "The checkpoint uses GPTQ's dynamic, lm_head or pack_dtype, which llmslim does not read."
            )
        size = config.get("group_size", 128)
        try:
            scheme = Scheme(
                bits=config.get("bits", 4),
                group_size="channel" if size == -1 else size,
                symmetric=symmetric,
                scale_dtype="float16",
            )
        except ValueError as error:
            raise UserError(
                f"The checkpoint's GPTQ config has bits {config.get('bits')!r} and group_size {size!r}."
            ) from error
        chosen = _flat(config.get("modules_in_block_to_quantize"))
        linears = _block_linears(model)
        names = [name for name, tail in linears.items() if chosen is None or tail in chosen]
        return [PackLinear(module=name, scheme=scheme) for name in names]


def _block_linears(model: PreTrainedModel) -> dict[str, str]:
    """Every nn.Linear (or what was one) inside the blocks: full name -> name inside its block."""
    found = {}
    for stack in Anatomy(model).stacks:
        for name, module in model.get_submodule(stack.name).named_modules():
            if isinstance(module, nn.Linear | Packed):
                found[f"{stack.name}.{name}"] = name.partition(".")[2]
    return found


def _partial(schemes: dict[str, Scheme], model: PreTrainedModel) -> tuple[list[str] | None, str | None]:
    """Which Linears of a block are packed, when not all are; and what stands in the way of saying so."""
    linears = _block_linears(model)
    outside = [name for name in schemes if name not in linears]
    if outside:
        return None, f"{outside[0]} is outside the blocks, where it packs nothing"
    tails = sorted({linears[name] for name in schemes})
    left = sorted(set(linears) - set(schemes))
    uneven = [name for name in left if linears[name] in tails]
    if uneven:
        return None, f"it packs the same Linears in every block, and {uneven[0]} is left dense"
    return (tails if left else None), None


def _flat(value: Any) -> set[str] | None:
    """`modules_in_block_to_quantize`, a list of lists of names, as a set."""
    if value is None:
        return None
    lists = value if isinstance(value, list) else [value]
    names = [name for part in lists for name in (part if isinstance(part, list) else [part])]
    if not all(isinstance(name, str) for name in names):
        raise UserError(
            f"The checkpoint's GPTQ config has modules_in_block_to_quantize {value!r}, not lists of names."
        )
    return set(names)
