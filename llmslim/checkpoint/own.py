"""llmslim's own format: packed modules' own parameters, sparse ones' bitmap and values, every edit in config.json.

    "quantization_config": {"quant_method": "llmslim", "format_version": 1, "edits": [{"edit": ...}, ...]}

It holds anything. Names of modules in the edits are relative to the base model. A tied head and embedding are
stored once, under the embedding's name. `llmslim.plugin` teaches transformers to load it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslim.checkpoint.bitsandbytes import check_state
from llmslim.checkpoint.formats import Compact, Format, Get, exact_scale, expect, input_step
from llmslim.checkpoint.names import absolute, relative
from llmslim.edit import Edit, parse_edit
from llmslim.errors import UserError
from llmslim.quantization import packing
from llmslim.quantization.bnb_linear import BnbLinear
from llmslim.quantization.grid import QuantizedWeight
from llmslim.sparse import SparseLinear, SparseWeight

FORMAT_VERSION = 1


class Own(Format):
    name = "llmslim"

    def refusal(self, edits: Sequence[Edit], model: PreTrainedModel, dtype: torch.dtype) -> str | None:
        return None

    def stored(self, name: str, module: Compact) -> dict[str, Tensor]:
        if isinstance(module, SparseLinear | BnbLinear):
            return {f"{name}.{part}": tensor for part, tensor in module.stored().items()}
        names = ("weight_packed", "weight_scale", "weight_zero_point", "input_scale")
        parts = {part: getattr(module, part) for part in names}
        return {f"{name}.{part}": tensor.detach() for part, tensor in parts.items() if tensor is not None}

    def read(
        self, name: str, module: Compact, get: Get
    ) -> QuantizedWeight | SparseWeight | dict[str, Tensor]:
        like = self.stored(name, module)
        tensors = {full: expect(full, get(full), tensor) for full, tensor in like.items()}
        if isinstance(module, BnbLinear):
            parts = {full.removeprefix(f"{name}."): tensor for full, tensor in tensors.items()}
            check_state(name, module, parts)
            return parts
        if isinstance(module, SparseLinear):
            sparse = SparseWeight(*tensors.values())
            try:
                module.check(sparse)
            except ValueError as error:
                raise UserError(f"The checkpoint's {name} is damaged: {error}.") from error
            return sparse
        scheme = module.scheme
        codes = packing.unpack(tensors[f"{name}.weight_packed"], scheme.bits, module.shape[1])
        scale = exact_scale(name, tensors[f"{name}.weight_scale"], scheme)
        step = input_step(name, tensors, scheme)
        return QuantizedWeight(scheme, codes, scale, tensors.get(f"{name}.weight_zero_point"), step)

    def config(self, edits: Sequence[Edit], model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any]:
        records = [edit.to_json() for edit in relative(edits, model)]
        return {"quant_method": Own.name, "format_version": FORMAT_VERSION, "edits": records}

    def edits(self, config: dict[str, Any], model: PreTrainedModel) -> list[Edit]:
        return absolute(parse_edits(config), model)


class Plain(Own):
    """A standard Hugging Face checkpoint: its config says all that was done, and nothing is left for a format."""

    name = "plain"


def parse_edits(config: dict[str, Any]) -> list[Edit]:
    """The edits of our `quantization_config`, names relative to the base model; untrusted input."""
    from llmslim.step import load_steps

    load_steps()  # the rooms' edits enter the registry
    version, records = config.get("format_version"), config.get("edits")
    unknown = set(config) - {"quant_method", "format_version", "edits"}
    if version != FORMAT_VERSION:
        raise UserError(
            f"The checkpoint has format_version {version!r}; this llmslim reads {FORMAT_VERSION}: update it."
        )
    if unknown or not isinstance(records, list):
        what = f"an unknown field {min(map(str, unknown))!r}" if unknown else "no list of edits"
        raise UserError(
            f"The checkpoint's quantization_config has {what}; it takes format_version and edits."
        )
    return [parse_edit(record) for record in records]
