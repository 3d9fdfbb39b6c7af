"""The transformers plug-in: `from_pretrained` and `save_pretrained` of compressed checkpoints.

Loading builds the model on meta, replays the edits, and lets transformers read the tensors. For llmslim's own
format these are the packed modules' own parameters. For another format each packed module waits as a
`StoredWeight`, whose parameters have the names and types on disk, and is decoded when all are read, one
module at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmslim.checkpoint.formats import Format, Packed, formats, packed_modules
from llmslim.checkpoint.inventory import stored_tensors
from llmslim.checkpoint.names import absolute
from llmslim.checkpoint.own import parse_edits
from llmslim.edit import replace_module, replay
from llmslim.errors import UserError


@register_quantization_config("llmslim")
class LlmslimConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint that llmslim loads.

    Args:
        storage: the format of the files, set by `llmslim.load` for formats of others.
        stored_config: what `save_pretrained` writes for such a format.
    """

    def __init__(
        self,
        edits: list[dict[str, Any]] | None = None,
        format_version: int | None = None,
        quant_method: str = "llmslim",
        storage: str = "llmslim",
        stored_config: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        if storage not in formats():
            raise UserError(
                f"The checkpoint has the unknown storage {storage!r}; there are {', '.join(formats())}."
            )
        self.storage, self.stored_config = storage, stored_config
        fields = {"format_version": format_version, "edits": edits, **unknown}
        self.edits = parse_edits(fields)  # relative to the base model

    def to_dict(self) -> dict[str, Any]:
        if self.stored_config is not None:
            return dict(self.stored_config)
        records = [edit.to_json() for edit in self.edits]
        return {"quant_method": "llmslim", "format_version": 1, "edits": records}


class StoredWeight(nn.Module):
    """Stands for a packed module while its tensors are read as another format stores them."""

    def __init__(self, name: str, packed: Packed, form: Format) -> None:
        super().__init__()
        self.__dict__["packed"] = packed  # not a child: its parameters are not in the files
        for full, tensor in form.stored(name, packed).items():
            self.register_parameter(
                full.removeprefix(f"{name}."), nn.Parameter(tensor.to("meta"), requires_grad=False)
            )
        self.register_parameter("bias", getattr(packed, "bias", None))

    @property
    def weight(self) -> Tensor:
        """For the `_init_weights` of models that reach for a child's weight: says that it needs none."""
        weight = torch.empty(0, device="meta")
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    def decode(self, name: str, form: Format) -> Packed:
        """The packed module with the weight that was read; frees what was read."""
        packed: Packed = self.__dict__["packed"]
        first = next(iter(self._parameters.values()))
        assert first is not None
        if first.is_meta:
            raise UserError(
                f"{name} was offloaded to disk, which works for llmslim's own format only: convert it first."
            )

        def get(full: str) -> Tensor:
            return self._parameters[full.removeprefix(f"{name}.")].detach()  # type: ignore[union-attr]

        quantized = form.read(name, packed, get)
        bias, device = self.bias, first.device
        self._parameters.clear()
        packed.to_empty(device=device)
        packed.store(quantized)
        if bias is not None:
            packed.bias = bias
        return packed


@register_quantizer("llmslim")
class LlmslimQuantizer(HfQuantizer):
    """Replays the edits before the weights are read, and decodes foreign formats after."""

    requires_calibration = True
    quantization_config: LlmslimConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        replay(model, absolute(self.quantization_config.edits, model))
        if self._foreign is not None:
            for name, packed in packed_modules(model).items():
                replace_module(model, name, StoredWeight(name, packed, self._foreign))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        waiting = [
            (name, module) for name, module in model.named_modules() if isinstance(module, StoredWeight)
        ]
        for name, stored in waiting:
            assert self._foreign is not None
            packed = stored.decode(name, self._foreign)
            if hasattr(stored, "_hf_hook"):  # placed on a device by accelerate
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(packed, stored._hf_hook)
            replace_module(model, name, packed)

    @property
    def _foreign(self) -> Format | None:
        storage = self.quantization_config.storage
        return None if storage == "llmslim" else formats()[storage]

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict]:
        """For saving: tensors as the format of the files stores them."""
        if self._foreign is None:
            return None, {}
        return {name: tensor for name, (tensor, _) in stored_tensors(model, self._foreign).items()}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on frozen packed weights, as in QLoRA
