"""Merge an adapter that was kept beside a model, later."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor, nn

from llmslim.anatomy import Anatomy, Block
from llmslim.anatomy.parts import features
from llmslim.calibration.stream import BlockStream
from llmslim.errors import UserError
from llmslim.recovery._base import require_base
from llmslim.recovery._files import CONFIG, WEIGHTS, read_adapter
from llmslim.recovery._merging import MergingStep, has_no_grid, linears_of
from llmslim.recovery.lora import PEFT, Added
from llmslim.step import Outlook, Step, StepRecord

if TYPE_CHECKING:
    from llmslim.loaders.models import ModelFiles

_BEYOND = (
    *("use_dora", "use_qalora", "modules_to_save", "alpha_pattern", "lora_bias", "trainable_token_indices"),
    *(
        "layer_replication",
        "alora_invocation_tokens",
        "arrow_config",
        "use_bdlora",
        "kasa_config",
        "monteclora_config",
    ),
)
"""What peft can put into an adapter beside B A, by the key of its config."""
BEGINNINGS = (True, False, None, "gaussian", "eva")
"""`init_lora_weights` that leave the weights below as they are; peft changes them for PiSSA and its kin."""


class MergeAdapter(MergingStep):
    """Merge an adapter of peft's LoRA that was kept beside the model, such as `lora --save-adapter` leaves.

    W + (alpha / rank) B A in the place of W: exactly, up to the type it is stored in, where W is dense, where the mask
    is where it is sparse. Packed weights are quantized anew, to the bits and groups that they have: `gptq` searches
    scales and codes on the calibration text (Frantar et al. 2023, arXiv:2210.17323), `nearest` keeps the scales and
    rounds, which loses most of what is smaller than half a step. How far the outputs are from those with the adapter
    beside is in the report.

    An adapter of llmslim is refused on other weights than those that it was trained beside: its Linears must be the
    same where both models store them in one form, and of norms, biases, tables and other weights at least one. The
    report tells where this is in doubt, as with peft's own, which have the name of their base alone.
    """

    kind: ClassVar[str] = "merge"
    verb: ClassVar[str] = "recover"

    masked: ClassVar[bool] = False  # peft knows no masks

    adapter: str = Field("", description="folder of the adapter to merge, as peft saves it")

    @property
    def needs_calibration(self) -> bool:
        return self.rounding == "gptq"

    def resolve(self, outlook: Outlook) -> tuple[list[Step], str]:
        """Without a packed weight to merge into, no text is needed."""
        known = linears_of(outlook.anatomy)
        packed = [name for name in self._adapter.names if hasattr(known.get(name), "quantized")]
        return [self if packed else self.model_copy(update={"rounding": "nearest"})], ""

    def check_source(self, files: ModelFiles) -> None:
        require_base(Path(self.adapter), files)

    def reads(self) -> list[Path]:
        return [self._adapter.file, self._adapter.file.with_name(CONFIG)]

    def check(self, anatomy: Anatomy) -> None:
        known, beside = linears_of(anatomy), linears_of(anatomy, beside=True)
        for name in self._adapter.names:
            if name in beside and name not in known:
                raise UserError(
                    f"merge cannot merge into a weight that blocks share, such as {name}, of which each would need its "
                    "own: keep the adapter beside the model (evaluate --adapter)."
                )
            misfit = self._misfit(name, known.get(name))
            if misfit:
                raise UserError(
                    f"The adapter {self.adapter} does not fit this {type(anatomy.model).__name__}: {misfit}; take the "
                    "model that it was trained with."
                )
            if has_no_grid(known[name]):
                raise UserError(
                    f"merge cannot merge into weights of bitsandbytes, such as {name}: keep the adapter beside the "
                    "model (evaluate --adapter), or merge it into the dense model."
                )

    def _misfit(self, name: str, module: nn.Module | None) -> str:
        if module is None:
            return f"it has no Linear {name} in its blocks"
        shape = self._adapter.shape(name)
        return "" if shape == features(module) else f"{name} is {features(module)}, and the adapter's {shape}"

    @cached_property
    def _adapter(self) -> Adapter:
        if not self.adapter:
            raise UserError("Which adapter should be merged? Give --adapter FOLDER.")
        return Adapter(Path(self.adapter))

    def compress_outer(self, stream: BlockStream, record: StepRecord) -> None:
        """Nothing lies there; but all of the base is at hand now, whatever the steps before have made of it."""
        assert record.source is not None
        doubt = require_base(Path(self.adapter), record.source)
        if doubt:
            record.note(self.kind, doubt)

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        self.merge(block, stream, self._adapter, record)


class Adapter(Added):
    """An adapter's folder: what it adds to which weight.

    Raises:
        UserError: it is none, or one that is more than B A.
    """

    def __init__(self, folder: Path) -> None:
        _, config, shapes, _ = read_adapter(folder)
        extra = next((key for key in _BEYOND if (config.model_extra or {}).get(key)), None)
        other = next((key for key in shapes if not key.endswith((".lora_A.weight", ".lora_B.weight"))), None)
        if extra or other:
            raise UserError(
                f"The adapter {folder} has {extra or other}, and merge takes plain LoRA of Linears alone."
            )
        begun = config.init_lora_weights
        if begun not in BEGINNINGS:
            raise UserError(
                f"The adapter {folder} began as {begun!r}, for which peft changes the weights below it as well: save "
                "it again with path_initial_model_for_weight_conversion, which makes plain LoRA of it."
            )
        self.file, self._shapes = folder / WEIGHTS, shapes
        super().__init__(shapes, self._read, config.scaling)

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of the weight that it adds to."""
        return self._shapes[f"{PEFT}{name}.lora_B.weight"][0], self._shapes[f"{PEFT}{name}.lora_A.weight"][1]

    def _read(self, key: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
            return tensor
