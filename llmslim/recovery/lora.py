"""Low-rank adapters by peft, merged when they are trained, or kept beside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from llmslim.anatomy import Anatomy, Block, Experts
from llmslim.anatomy.parts import features, is_conv1d, is_linear, is_matrix, is_packed
from llmslim.errors import UserError
from llmslim.loaders.safetensors_io import SafetensorsFolder
from llmslim.recovery._base import public_name, seal
from llmslim.recovery._files import WEIGHTS, read_adapter
from llmslim.recovery._merging import MergingStep, has_no_grid, linears_of, open_weights, within
from llmslim.sparse import SparseLinear
from llmslim.step import Outlook, Step, StepRecord, listed, matches, require_matches
from llmslim.training.objective import ObjectiveStep
from llmslim.training.step import Finish

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

    from llmslim.calibration.stream import BlockStream


ADAPTER = "adapter"
PEFT = "base_model.model."
"""What peft puts in front of names in the files of adapters."""
TURNED = "fan_in_fan_out"
MERGED = 32768  # tokens that packed weights are quantized anew on


class LoRA(MergingStep, ObjectiveStep):
    """Train low-rank adapters beside frozen Linears, dense, sparse or packed, and merge them.

    y = W x + (alpha / rank) B A x (Hu et al. 2021, arXiv:2106.09685); over packed weights that is QLoRA (Dettmers
    et al. 2023, arXiv:2305.14314). Merging into dense weights is exact, up to the type that they are stored in. Where
    weights were pruned, packed since or not, the adapter is masked while it trains, so that zeros cost nothing. Packed
    weights are quantized anew, to the bits and groups that they have: `gptq` searches scales and codes on up to 32,768
    tokens of the text, `nearest` rounds to the grid that is there, which loses most of what is below half a step.
    Each weight's row in the report tells what that cost. Weights that blocks share get no adapters (their corrections
    do), nor do experts that lie in one tensor.

    With `save_adapter` the model stays as it is and the adapter lies in its folder `adapter`, as peft saves it:
    `PeftModel.from_pretrained(model, "OUTPUT/adapter")`, over packed weights `llmslim.recovery.lora.with_adapter`. That
    is the only way over weights of bitsandbytes, and over weights that blocks share without corrections: there each
    block has an adapter of its own. Beside sparse weights it trains unmasked, for peft knows no masks: its outputs are
    those of W + B A, dense, and to merge it later leaves out what falls on pruned weights, a share that the report
    tells. What the report measures is the model without it; `llmslim evaluate` and `generate` take it along by
    `--adapter OUTPUT/adapter`.
    """

    kind: ClassVar[str] = "lora"
    verb: ClassVar[str] = "recover"
    masked: ClassVar[bool] = True

    lr: float = Field(2e-4, gt=0, description="peak learning rate of AdamW; cosine to 0 at the end")
    rank: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="adapters count alpha / rank times")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of an adapter's inputs dropped in training, without a teacher"
    )
    target_modules: tuple[str, ...] = Field(
        (),
        description="modules that get adapters, by name: 'q_proj'; all Linears of the blocks when not given",
    )

    save_adapter: bool = Field(
        False, description="keep the adapter beside the model, in its folder adapter, instead of merging it"
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _several(cls, names: Any) -> Any:
        return listed(names)

    @model_validator(mode="after")
    def _drops_without_a_teacher(self) -> Self:
        if self.dropout and self.distills:
            raise ValueError("beside a teacher nothing is dropped out: dropout is for objective next_token")
        return self

    @property
    def writes_beside(self) -> bool:
        return self.save_adapter

    @property
    def streams_calibration(self) -> bool:
        return self.rounding == "gptq" and not self.save_adapter

    @property
    def text_limit(self) -> int | None:
        return MERGED

    def resolve(self, outlook: Outlook) -> tuple[list[Step], str]:
        """Without a packed weight to merge into, no text passes through the blocks."""
        known = self._linears(outlook.anatomy)
        packed = any(hasattr(known[name], "quantized") for name in self._named(known, self.target_modules))
        return [self if packed else self.model_copy(update={"rounding": "nearest"})], ""

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        _installed()
        known = self._linears(anatomy)
        fixed = [name for name in self._named(known, self.target_modules) if has_no_grid(known[name])]
        if fixed and not self.save_adapter:
            raise UserError(
                f"lora cannot merge into weights of bitsandbytes, such as {fixed[0]}: give --save-adapter to keep the "
                "adapter beside the model."
            )
        if not known:
            raise UserError(
                "lora finds no Linear that one block has for itself: an adapter cannot be merged into weights that "
                "blocks share; give --save-adapter to keep it beside the model, or use recover --method full, or "
                "scales where they are packed."
            )
        require_matches("target_modules", self.target_modules, known, "Linear in the blocks")

    def placed(self, anatomy: Anatomy) -> int:
        known = self._linears(anatomy)
        return sum(self.rank * sum(features(known[n])) for n in self._named(known, self.target_modules))

    def _linears(self, anatomy: Anatomy) -> dict[str, nn.Module]:
        known = linears_of(anatomy, beside=self.save_adapter)
        if not any(isinstance(block.mlp, Experts) for block in anatomy.blocks):
            return known
        taken = _taken_for_experts(self._config(list(known), False), anatomy.model)
        return {name: module for name, module in known.items() if name not in taken}

    @staticmethod
    def _named(known: dict[str, nn.Module], patterns: tuple[str, ...]) -> list[str]:
        return [name for name in known if not patterns or matches(name, patterns)]

    @contextmanager
    def training(self, model: PreTrainedModel) -> Iterator[tuple[list[nn.Parameter], Finish]]:
        from peft import inject_adapter_in_model
        from peft.tuners import lora

        known = self._linears(Anatomy(model))
        targets = self._named(known, self.target_modules)
        turned = any(is_conv1d(known[name]) for name in targets)
        config = self._config(list(targets), turned)
        if self.save_adapter:
            _register(config, model, lora.Linear)
        else:
            _register(config, model, _masked(lora.Linear), SparseLinear)
        inject_adapter_in_model(config, model)
        parameters = {name: p for name, p in model.named_parameters() if ".lora_" in name}

        def finish() -> dict[str, Tensor]:
            own = {f"{PEFT}{name.replace('.default', '')}": p for name, p in parameters.items()}
            return {**own, TURNED: torch.tensor(turned)}

        yield list(parameters.values()), finish

    def _config(self, targets: list[str], turned: bool) -> Any:
        """peft's description of the adapter.

        Args:
            targets: names of the modules that have one.
            turned: whether these hold their weights as [in, out] (Conv1D).
        """
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
            fan_in_fan_out=turned,
        )

    def compress_outer(self, stream: BlockStream, record: StepRecord) -> None:
        """What was trained is of the blocks, some of which have no adapters in a mixture."""
        if self.target_modules:
            return
        fused = [
            block.name for block in stream.anatomy.blocks if isinstance(block.mlp, Experts) and block.mlp.down
        ]
        if fused:
            what = f"the experts of {len(fused)} blocks got no adapters: they lie in one tensor"
            record.note(self.kind, what)
        known = linears_of(stream.anatomy, beside=self.save_adapter)
        for name in known.keys() - self._linears(stream.anatomy).keys():
            record.note(name, "got no adapter: peft takes it for a part of the experts of other blocks")

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        added = self._added(record.survey)
        if not self.save_adapter:
            self.merge(block, stream, added, record)
            return
        known = self._linears(stream.anatomy)
        names = [name for name in added.names if name.startswith(f"{block.name}.")]
        lost = max((within(known[name], added.delta(name).to(stream.device))[1] for name in names), default=0)
        if lost:
            record.note(
                block.name,
                "the adapter beside pruned weights is dense: to merge it later would leave out up to "
                f"{lost:.0%} of what it adds to a Linear (root mean square)",
            )

    def _added(self, trained: dict[str, Tensor]) -> Added:
        return Added(
            [key for key in trained if key != TURNED], trained.__getitem__, lambda rank: self.alpha / rank
        )

    def write_beside(self, folder: Path, record: StepRecord) -> None:
        if not self.save_adapter:
            return
        from safetensors.torch import save_file

        tensors = {name: tensor for name, tensor in record.survey.items() if name.startswith(PEFT)}
        names = self._added(tensors).names
        config = self._config(names, bool(record.survey[TURNED]))
        config.inference_mode = True
        assert record.source is not None
        config.base_model_name_or_path = public_name(record.source.base)
        made = json.loads((folder / "config.json").read_text())["architectures"][0]
        config.task_type = "CAUSAL_LM" if made.endswith(("ForCausalLM", "LMHeadModel")) else None
        place = folder / ADAPTER
        place.mkdir(exist_ok=True)
        metadata = {"format": "pt", **seal(SafetensorsFolder(folder), names)}
        save_file(tensors, place / WEIGHTS, metadata=metadata)
        config.save_pretrained(str(place))
        record.note(self.kind, f"the adapter is in {ADAPTER}/; what is measured is the model without it")


class Added:
    """What adapters add, of their tensors as peft names them.

    Args:
        keys: names of the tensors.
        get: a tensor by its name.
        scaling: of a rank, how many times B A of that rank counts.

    Attributes:
        names: of the Linears that have an adapter.
    """

    def __init__(
        self, keys: Iterable[str], get: Callable[[str], Tensor], scaling: Callable[[int], float]
    ) -> None:
        self._get, self._scaling = get, scaling
        self.names = sorted({key.removeprefix(PEFT).partition(".lora_")[0] for key in keys})

    def delta(self, name: str) -> Tensor:
        """What is added to the weight of that Linear, float32 [out, in]."""
        down, up = (self._get(f"{PEFT}{name}.lora_{part}.weight").float() for part in ("A", "B"))
        return (up @ down) * self._scaling(len(down))


def with_adapter(model: PreTrainedModel, folder: str | Path) -> Any:
    """A peft model: `model` with the adapter of a folder, also where its Linears are packed.

    Raises:
        UserError: there is no adapter, or it is for another model.
    """
    _installed()
    read_adapter(Path(folder))
    from peft import PeftConfig, PeftModel
    from peft.tuners import lora

    config = PeftConfig.from_pretrained(str(folder))
    _register(config, model, lora.Linear)
    try:
        return PeftModel.from_pretrained(model, str(folder), config=config).eval()
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"The adapter {folder} does not fit this {type(model).__name__}: take the model that it was trained with "
            f"({said})."
        ) from error


def _register(config: Any, model: nn.Module, linear: Any, *further: type) -> None:
    """Tell peft what it puts beside Linears that it does not know; it keeps no note of that in files.

    Args:
        linear: what is put beside packed ones, and `further` ones.
    """
    packed = {type(m) for m in model.modules() if is_packed(m) and is_matrix(m) and not is_linear(m)}
    config._register_custom_module(dict.fromkeys([*packed, *further], linear))


def _masked(linear: Any) -> Any:
    """peft's Linear whose adapter, too, reaches only the weights that were not pruned, packed since or not."""

    class MaskedLinear(linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.fan_in_fan_out = False  # both are [out, in], whatever the other targets are
            self.open = open_weights(self.get_base_layer())

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not isinstance(self.open, Tensor):
                return cast(Tensor, super().forward(x, *args, **kwargs))
            delta = self.get_delta_weight("default") * self.open
            return cast(Tensor, self.get_base_layer()(x) + F.linear(self.lora_dropout["default"](x), delta))

    return MaskedLinear


def _taken_for_experts(config: Any, model: nn.Module) -> set[str]:
    """Which targets peft would turn into the experts of other blocks, as they are called like the parts of one."""
    _installed()
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    targets = set(config.target_modules)
    convert_peft_config_for_transformers(config, model, None)
    return targets - set(config.target_modules)


def _installed() -> None:
    import importlib.util

    if importlib.util.find_spec("peft") is None:
        raise UserError("recover --method lora needs peft: pip install 'llmslim[train]'.")
