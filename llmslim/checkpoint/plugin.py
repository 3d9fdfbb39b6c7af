"""The transformers plug-in: `from_pretrained` and `save_pretrained` of compressed checkpoints.

Loading builds the model on meta, replays the edits, and lets transformers read the tensors. For llmslim's own
format these are the packed modules' own parameters. A sparse module, and with another format each packed one,
waits as a `StoredWeight`, whose parameters have the names and types on disk, and is decoded when all are read,
one module at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmslim.checkpoint.formats import Compact, Format, compact_modules, formats
from llmslim.checkpoint.inventory import stored_tensors
from llmslim.checkpoint.names import absolute
from llmslim.checkpoint.own import parse_edits
from llmslim.edit import replace_module, replay
from llmslim.errors import UserError
from llmslim.sparse import SparseLinear
from llmslim.ties import counterpart, shared_modules, tie_shared


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
    """Stands for a compact module while its tensors are read as the format stores them."""

    def __init__(self, name: str, module: Compact, form: Format) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not a child: its parameters are not in the files
        for full, tensor in form.stored(name, module).items():
            # not by register_parameter, which would find a property in the place of one that is called weight
            waiting = nn.Parameter(tensor.to("meta"), requires_grad=False)
            self._parameters[full.removeprefix(f"{name}.")] = waiting
        self.register_parameter("bias", getattr(module, "bias", None))

    @property
    def weight(self) -> Tensor:
        """For the `_init_weights` of models that reach for a child's weight: says that it needs none.

        As many rows as there are biases, which transformers compares when it ties.
        """
        if (stored := self._parameters.get("weight")) is not None:
            return stored
        weight = torch.empty(getattr(self.__dict__["module"], "out_features", 0), 0, device="meta")
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    def empty(self) -> Compact:
        """The compact module with its own bias, for one that shares its weight."""
        module: Any = self.__dict__["module"]
        if self.bias is not None:
            module.bias = self.bias
        return module

    def decode(self, name: str, form: Format) -> Compact:
        """The compact module with the weight that was read; frees what was read."""
        module: Any = self.__dict__["module"]
        first = next(iter(self._parameters.values()))
        assert first is not None
        if first.is_meta:
            raise UserError(
                f"{name} was offloaded to disk, which works only for packed weights in llmslim's own format."
            )

        def get(full: str) -> Tensor:
            return self._parameters[full.removeprefix(f"{name}.")].detach()  # type: ignore[union-attr]

        weight = form.read(name, module, get)
        bias, device = self.bias, first.device
        self._parameters.clear()
        module.to_empty(device=device)
        module.store(weight)
        if bias is not None:
            module.bias = bias
        return module


@register_quantizer("llmslim")
class LlmslimQuantizer(HfQuantizer):
    """Replays the edits before the weights are read, and decodes what waits as a `StoredWeight` after."""

    requires_calibration = True
    quantization_config: LlmslimConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        replay(model, absolute(self.quantization_config.edits, model))
        for name, module in compact_modules(model).items():
            if self._waits(module):
                replace_module(model, name, StoredWeight(name, module, self._form))
        tie_shared(model, tell=True)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        waiting = [
            (name, module) for name, module in model.named_modules() if isinstance(module, StoredWeight)
        ]
        shared = shared_modules(model)
        for name, stored in waiting:
            module = stored.empty() if counterpart(name, shared) else stored.decode(name, self._form)
            if hasattr(stored, "_hf_hook"):  # placed on a device by accelerate
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(module, stored._hf_hook)
            replace_module(model, name, module)
        tie_shared(model, tell=True)

    @property
    def _form(self) -> Format:
        return formats()[self.quantization_config.storage]

    def _waits(self, module: Compact) -> bool:
        """Whether what the files hold of a module is not its own parameters."""
        return self._form.name != "llmslim" or isinstance(module, SparseLinear)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict]:
        """For saving: tensors as the format of the files stores them."""
        if not any(self._waits(module) for module in compact_modules(model).values()):
            return None, {}
        return {name: tensor for name, (tensor, _) in stored_tensors(model, self._form).items()}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on frozen packed weights, as in QLoRA
