"""bitsandbytes' layout, as transformers saves and loads it. Per Linear `name` with weight [out, in]:

    4 bits: name.weight, name.weight.absmax, .quant_map, .nested_absmax, .nested_quant_map, and
            name.weight.quant_state.bitsandbytes__nf4, uint8: JSON
    8 bits: name.weight, name.SCB, and name.weight_format, uint8 []: 0, row by row

What they hold: `llmslim.quantization.bnb_linear`. config.json names the Linears that stay dense.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslim.anatomy.parts import is_linear
from llmslim.checkpoint.formats import Format, Get, expect
from llmslim.edit import Edit
from llmslim.errors import UserError, first_line
from llmslim.quantization.bnb import PackBnb
from llmslim.quantization.bnb_linear import BLOCK, NESTED_BLOCK, THRESHOLD, BnbLinear, state_of

STATE_DTYPES = ["float32", "bfloat16", "float16"]
"""What a weight may have been of before it was packed."""


class BitsAndBytesLayout(Format):
    name = "bitsandbytes"

    def refusal(self, edits: Sequence[Edit], model: PreTrainedModel, dtype: torch.dtype) -> str | None:
        other = next((edit for edit in edits if not isinstance(edit, PackBnb)), None)
        if other is not None:
            return f"it holds what method bnb packs only, and the result has the edit {other.kind!r}"
        asked = {edit.module: edit for edit in edits if isinstance(edit, PackBnb)}
        if len({edit.model_copy(update={"module": ""}) for edit in asked.values()}) > 1:
            return "it has one number of bits for all Linears"
        told = {edit.module: edit for edit in self._packed(self.config(edits, model, dtype), model)}
        for name in asked.keys() ^ told.keys():
            return f"transformers would take {name} for {'dense' if name in asked else 'packed'}"
        return None

    def stored(self, name: str, module: Any) -> dict[str, Tensor]:
        parts = module.stored()
        if module.bits == 8:
            row_major = torch.zeros((), dtype=torch.uint8, device=module.weight.device)
            tensors = {**parts, "weight_format": row_major}
        else:
            tensors = {_key(leaf, module): tensor for leaf, tensor in parts.items()}
        return {f"{name}.{key}": tensor for key, tensor in tensors.items()}

    def is_sized(self, full: str) -> bool:
        return ".quant_state." not in full  # text, which others fill up to another length than ours

    def read(self, name: str, module: Any, get: Get) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for leaf, like in module.stored().items():
            full = f"{name}.{leaf if module.bits == 8 else _key(leaf, module)}"
            parts[leaf] = get(full) if leaf == "quant_state" else expect(full, get(full), like)
        if module.bits == 8 and (order := get(f"{name}.weight_format")).any():
            raise UserError(
                f"The checkpoint's {name}.weight_format is {order.tolist()}; llmslim reads 0, row by row."
            )
        check_state(name, module, parts)
        return parts

    def config(self, edits: Sequence[Edit], model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any]:
        packed = {edit.module: edit for edit in edits if isinstance(edit, PackBnb)}
        one = next(iter(packed.values()))
        linears = [name for name, module in model.named_modules() if is_linear(module)]
        return {
            "quant_method": self.name,
            "_load_in_4bit": one.bits == 4,
            "_load_in_8bit": one.bits == 8,
            "load_in_4bit": one.bits == 4,
            "load_in_8bit": one.bits == 8,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": one.quant_type,
            "bnb_4bit_use_double_quant": one.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": [name for name in linears if name not in packed],
            "llm_int8_threshold": THRESHOLD,
        }

    def edits(self, config: dict[str, Any], model: PreTrainedModel) -> list[Edit]:
        return [*self._packed(config, model)]

    def _packed(self, config: dict[str, Any], model: PreTrainedModel) -> list[PackBnb]:
        from transformers.integrations.bitsandbytes import should_convert_module
        from transformers.quantizers.base import HfQuantizer

        bits = 8 if config.get("load_in_8bit") else 4
        kind, storage = (
            config.get("bnb_4bit_quant_type", "fp4"),
            config.get("bnb_4bit_quant_storage", "uint8"),
        )
        skipped = config.get("llm_int8_skip_modules")
        listed = skipped is None or (isinstance(skipped, list) and all(isinstance(n, str) for n in skipped))
        if kind not in ("nf4", "fp4") or storage != "uint8" or not listed:
            raise UserError(
                f"The checkpoint is bitsandbytes of type {kind!r} in {storage!r} without {skipped!r}; llmslim reads "
                "nf4 and fp4 in uint8, and a list of names."
            )
        if config.get("llm_int8_has_fp16_weight") or config.get("llm_int8_threshold", THRESHOLD) != THRESHOLD:
            raise UserError(
                f"The checkpoint is LLM.int8 with llm_int8_threshold {config.get('llm_int8_threshold')!r}; "
                f"llmslim reads {THRESHOLD} and 8-bit weights."
            )
        dense = HfQuantizer.get_modules_to_not_convert(
            model, skipped, list(model._keep_in_fp32_modules or ())
        )
        double = bits == 4 and bool(config.get("bnb_4bit_use_double_quant"))
        return [
            PackBnb(module=name, bits=bits, double_quant=double, quant_type=kind if bits == 4 else "nf4")
            for name, module in model.named_modules()
            if is_linear(module) and should_convert_module(name, dense)
        ]


def settle(model: PreTrainedModel) -> None:
    """Keep transformers' `Linear4bit` from repacking itself at the first evaluation, on CPUs with AVX512-BF16.

    What it repacks has no gradients for what lies in front of it, and is not saved exactly.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _key(leaf: str, module: BnbLinear) -> str:
    if leaf == "weight":
        return leaf
    return (
        f"weight.quant_state.bitsandbytes__{module.quant_type}" if leaf == "quant_state" else f"weight.{leaf}"
    )


def check_state(name: str, module: BnbLinear, parts: dict[str, Tensor]) -> None:
    """Refuse a `quant_state` of 4 bits that is not what the config announces."""
    if module.bits == 8:
        return
    announced: dict[str, Any] = {
        "quant_type": module.quant_type,
        "blocksize": BLOCK,
        "shape": list(module.shape),
    }
    if module.double_quant:
        announced |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    try:
        state = dict(state_of(parts["quant_state"]))
        dtype, offset = state.pop("dtype"), float(state.pop("nested_offset") if module.double_quant else 0)
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"The checkpoint's {name} has a quant_state that cannot be read ({first_line(error)}): it is damaged; "
            "download or save it again."
        ) from error
    # as text, where 64.0 is not 64
    fits = json.dumps(state, sort_keys=True) == json.dumps(announced, sort_keys=True)
    if not fits or dtype not in STATE_DTYPES or not math.isfinite(offset):
        raise UserError(
            f"The checkpoint's {name} has the quant_state {reprlib.repr(state)} of {dtype!r} with the offset {offset}; "
            f"llmslim reads {announced} of {', '.join(STATE_DTYPES)} here."
        )
