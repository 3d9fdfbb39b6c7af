"""bitsandbytes' NF4 and LLM.int8, in checkpoints that plain transformers loads."""

from __future__ import annotations

import importlib.util
from typing import ClassVar, Literal, cast

from pydantic import Field, field_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.anatomy.parts import features, is_linear
from llmslim.calibration.statistics import InputStats
from llmslim.edit import Edit, replace_module
from llmslim.errors import UserError
from llmslim.linear_step import LinearStep
from llmslim.quantization.bnb_linear import BLOCK, BnbLinear, QuantType
from llmslim.quantization.quantizer import refuse_nothing
from llmslim.step import StepRecord


class PackBnb(Edit):
    """Replace the Linear (or Conv1D) at `module` by an empty `BnbLinear` of the same shape."""

    kind: ClassVar[str] = "pack_bnb"
    module: str
    bits: Literal[4, 8]
    double_quant: bool = False
    quant_type: QuantType = "nf4"

    def apply(self, model: nn.Module) -> None:
        linear = model.get_submodule(self.module)
        if not is_linear(linear):
            raise ValueError(f"{self.module} is no dense Linear")
        out_features, in_features = features(linear)
        dtype = cast(Tensor, linear.weight).dtype
        packed = BnbLinear(
            in_features, out_features, self.bits, self.double_quant, self.quant_type, False, dtype, "meta"
        )
        packed.bias = cast(Tensor | None, linear.bias)
        replace_module(model, self.module, packed)


class BitsAndBytes(LinearStep):
    """bitsandbytes' own rounding, with its kernels to compute: NF4 with 4 bits, LLM.int8 with 8; no calibration.

    - 4 bits: blocks of 64 weights, each divided by its largest, go to the nearest of 16 values that a normal
      distribution has equally often (QLoRA, Dettmers et al. 2023, arXiv:2305.14314). With `double_quant` the blocks'
      scales are put in 8 bits.
    - 8 bits: rows to their largest weight; inputs, too, are rounded when it runs, but for outliers (Dettmers et al.
      2022, arXiv:2208.07339).

    Made block by block, without a GPU. The checkpoint is bitsandbytes' in the layout of transformers, byte for byte
    what it would save, but for spaces behind the JSON of each 4-bit weight.
    """

    kind: ClassVar[str] = "bnb"
    verb: ClassVar[str] = "quantize"

    bits: int = Field(4, ge=2, le=8, description="bits per weight, 2 to 8")
    double_quant: bool = Field(True, description="of bnb with 4 bits: also quantize the scales, to 8 bits")

    @field_validator("bits")
    @classmethod
    def _four_or_eight(cls, value: int) -> int:
        if value not in (4, 8):
            raise ValueError("bitsandbytes has 4 bits (NF4) and 8 (LLM.int8); rtn and gptq take others")
        return value

    def check(self, anatomy: Anatomy) -> None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("quantize --method bnb needs bitsandbytes: pip install 'llmslim[bnb]'.")
        if not any(self.targets(block) for block in anatomy.blocks):
            refuse_nothing(self, anatomy)
        super().check(anatomy)

    def planned_edits(self, anatomy: Anatomy) -> list[Edit]:
        edits: list[Edit] = []
        for block in anatomy.blocks:
            edits += [*self.unfusing(block), *(self._edit(name) for name in self.targets(block))]
        return edits

    def _edit(self, name: str) -> PackBnb:
        return PackBnb(module=name, bits=self.bits, double_quant=self.bits == 4 and self.double_quant)  # type: ignore[arg-type]

    def compress_linear(
        self, name: str, weight: Tensor, stats: InputStats | None, record: StepRecord
    ) -> tuple[Edit, nn.Module]:
        edit = self._edit(name)
        if self.bits == 4 and weight.shape[1] % BLOCK:
            record.note(
                name,
                f"its width {weight.shape[1]} is no multiple of {BLOCK}: bitsandbytes' kernels for CPUs cannot compute "
                "with it in plain transformers; its GPU kernels and llmslim.load can",
            )
        record.linears.append({"name": name, "bits": self.bits, "shape": list(weight.shape)})
        # bitsandbytes writes down the type that it saw, and computes with the weight in it
        weight = weight.to(record.stored)
        return edit, BnbLinear.quantize(weight, self.bits, edit.double_quant, edit.quant_type)
