"""The setting of a quantized KV cache in a checkpoint, and the step that writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmslim.anatomy import Anatomy
from llmslim.anatomy.block import CACHE_SCALES, Block
from llmslim.calibration.stream import BlockStream
from llmslim.edit import Edit
from llmslim.errors import UserError
from llmslim.files import save_tensors, write_atomically
from llmslim.kvcache.allocation import (
    CHOICES,
    check_budget,
    measure,
    measured_windows,
    shared_out,
    told,
    with_bits,
)
from llmslim.kvcache.components import measure_components, with_components
from llmslim.kvcache.fp8 import ScaleCache, knows, scales
from llmslim.kvcache.settings import KVSettings, head_sizes
from llmslim.step import BlockStep, Step, StepRecord, Survey

if TYPE_CHECKING:
    from typing_extensions import Self

USUAL_LAYERS = 30
"""Layers of a model, for a plan that knows its weights alone."""
FILE, KEY = "generation_config.json", "llmslim_kv_cache"
COMPONENTS = "kv_cache/components.safetensors"
"""Beside it, of method `pca`: the components of the keys of each attention layer, by its number."""


class QuantizeCache(BlockStep):
    """Keys and values of past tokens in few bits when the model generates; the weights stay as they are.

    Kinds: `kivi` (arXiv 2402.02750), `token`, `rotated` (TurboQuant, arXiv 2504.19874); `pca`, for 2 or 3 bits: keys
    in their principal components, measured on the calibration text, of which the larger get more bits (in kind KVTC,
    arXiv 2511.01815); they are stored in kv_cache/components.safetensors. With `kv_bits` auto the keys and the
    values of each layer get bits of their own: the least summed KL divergence that `kv_budget` allows, by what 2
    bits cost in one of them at a time. With `kv_evict` tokens older than the window are dropped for good: the oldest
    (StreamingLLM, arXiv 2309.17453), keys of large norm (arXiv 2406.11430), or those recent queries attend to least
    (SnapKV, arXiv 2404.14469; in kind H2O, arXiv 2306.14048). The setting goes into generation_config.json, where
    `llmslim.load` and `llmslim generate` find it; other libraries pass it over. For vLLM, `kv_fp8` stores in a
    compressed-tensors checkpoint that the cache is FP8 there, with scales by the greatest key and value of the
    calibration text.
    """

    kind: ClassVar[str] = "kv_cache"
    verb: ClassVar[str] = "quantize"

    kv_bits: int | Literal["auto"] = Field(
        4, description="bits per stored number of the KV cache: 2, 3, 4 or 8; auto: each layer its own"
    )
    kv_value_bits: int | None = Field(
        None, description="bits of the values alone, where kv_bits are those of the keys: keys need more"
    )
    kv_budget: float | None = Field(
        None, description="mean bits that the layers share by measured sensitivity; for kv_bits auto"
    )
    kv_method: Literal["kivi", "token", "rotated", "pca"] = Field(
        "kivi",
        description="keys per channel and values per token, both per token, both rotated, or keys in their principal "
        "components and values rotated",
    )
    kv_group_size: int | None = Field(
        None,
        ge=1,
        description="numbers of the KV cache that share a scale; 64, rotated and pca 128, or what fits, when left out",
    )
    kv_window: int = Field(128, ge=0, description="recent tokens of the KV cache that stay as they are")
    kv_sink: int = Field(4, ge=0, description="first tokens of the KV cache that stay as they are")
    kv_evict: Literal["streaming", "knorm", "snapkv"] | None = Field(
        None,
        description="which tokens are dropped: the oldest, keys of large norm, or those least attended to",
    )
    kv_keep: float | None = Field(
        None, gt=0, lt=1, description="share of the tokens that stays; for kv_evict"
    )

    kv_fp8: bool = Field(
        False,
        description="tell vLLM to keep its KV cache in FP8, with measured scales; for compressed-tensors",
    )

    @field_validator("kv_bits", "kv_value_bits")
    @classmethod
    def _that_pack(cls, value: int | str | None) -> int | str | None:
        if value not in (*CHOICES, "auto", None):
            raise ValueError("a KV cache takes 2, 3, 4 or 8 bits, or auto")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.kv_bits == "auto") != (self.kv_budget is not None):
            raise ValueError("kv_bits auto and kv_budget go together, such as kv_budget 3.0")
        if self.kv_bits == "auto" and self.kv_value_bits is not None:
            raise ValueError("kv_bits auto finds the bits of values too: leave out kv_value_bits")
        if (self.kv_evict is None) != (self.kv_keep is None):
            raise ValueError("kv_evict and kv_keep go together, such as kv_evict snapkv and kv_keep 0.5")
        return self

    @property
    def settings(self) -> KVSettings:
        """What the fields say; without the bits that a survey finds."""
        fields: dict[str, Any] = {} if self.kv_bits == "auto" else {"bits": self.kv_bits}
        if self.kv_value_bits is not None:
            fields["value_bits"] = self.kv_value_bits
        return KVSettings(
            **fields,
            method=self.kv_method,
            group_size=self.kv_group_size,
            window=self.kv_window,
            sink=self.kv_sink,
            evict=self.kv_evict,
            keep=self.kv_keep,
        )

    @property
    def needs_calibration(self) -> bool:
        return self.needs_survey or self.kv_fp8

    @property
    def streams_calibration(self) -> bool:
        return self.kv_fp8

    @property
    def needs_survey(self) -> bool:
        return self.kv_bits == "auto" or self.kv_method == "pca"

    @property
    def survey_copies(self) -> int:
        return int(self.needs_survey)

    def survey_work(self, tokens: int, window: int) -> float:
        work = 2.0 * tokens if self.kv_method == "pca" else 0.0  # a pass
        if self.kv_bits != "auto":
            return work
        windows = measured_windows(tokens // window, window)
        return work + 2.0 * windows * window * 2 * USUAL_LAYERS  # a pass for keys and values of each layer

    def survey(self, look: Survey) -> dict[str, Tensor]:
        """`bits` of the keys and values of each layer, where they are auto, with `damage` and `sizes` as
        `allocation.measure` has them; `components.0`, ... of the keys of each layer, of method `pca`."""
        settings, model, found = self.settings, look.loaded(), {}
        if settings.method == "pca":
            components = measure_components(model, look.tokens, settings, look.progressed)
            found = {f"components.{number}": one for number, one in enumerate(components)}
            settings = with_components(settings, components)
        if self.kv_budget is not None:
            damage, sizes = measure(model, look.tokens, settings, look.progressed)
            bits = torch.tensor(shared_out(damage, sizes, self.kv_budget))
            found |= {"bits": bits, "damage": damage, "sizes": sizes}
        return found

    def check(self, anatomy: Anatomy) -> None:
        config = anatomy.model.config
        if config.is_encoder_decoder or not anatomy.model.can_generate():
            raise UserError(
                f"kv_cache: {type(anatomy.model).__name__} has no cache to quantize: it takes a causal language model."
            )
        if self.kv_budget is not None:
            check_budget(self.kv_budget)
        for size in head_sizes(config):
            self.settings.channels(size)
        for attention in (block.attention for block in anatomy.blocks if self.kv_fp8):
            if not knows(attention.module, config.get_text_config(decoder=True)):
                raise UserError(
                    "kv_cache: kv_fp8 is for attention that compressed-tensors finds, by its k_proj and v_proj and the "
                    f"config's number of KV heads, and {attention.name} is a {type(attention.module).__name__}: "
                    "leave it out."
                )
            if hasattr(attention.module, CACHE_SCALES[0]):
                raise UserError(
                    "kv_cache: the model has FP8 scales of its KV cache already: leave out kv_fp8."
                )

    def planned_edits(self, anatomy: Anatomy) -> list[Edit]:
        return [ScaleCache(module=block.attention.name) for block in anatomy.blocks if self.kv_fp8]

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        """The weights stay; for vLLM the scales of the keys and values are added."""
        if not self.kv_fp8:
            return
        found = scales(block, stream, stream.lanes["calibration"])
        edit = ScaleCache(module=block.attention.name)
        edit.apply(stream.model)
        for name, scale in found.items():
            setattr(block.attention.module, name, scale.to(stream.device))
        record.edits.append(edit)

    def compress_outer(self, stream: BlockStream, record: StepRecord) -> None:
        """Tells what `write_beside` will write."""
        bits = told(self._settled(record))
        record.note(
            self.kind, f"{FILE} asks for a KV cache of {bits} bits; perplexity is measured without one"
        )
        if self.kv_fp8:
            record.note(
                self.kind,
                "config.json tells vLLM to keep its KV cache in FP8; plain transformers rounds keys and values so, and "
                "llmslim computes without",
            )

    def write_beside(self, folder: Path, record: StepRecord) -> None:
        write_setting(folder, self._settled(record))

    def _settled(self, record: StepRecord) -> KVSettings:
        """The settings, with what a survey found."""
        found, settings = record.survey, self.settings
        components = [found[f"components.{i}"] for i in range(len(found)) if f"components.{i}" in found]
        if components:
            settings = with_components(settings, components)
        return with_bits(settings, found["bits"].tolist()) if "bits" in found else settings


def write_setting(folder: Path, settings: KVSettings) -> None:
    """Put the setting into the generation config of a checkpoint, and its components beside it."""
    path = folder / FILE
    stored = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if settings.components:
        (folder / COMPONENTS).parent.mkdir(exist_ok=True)
        tensors = {str(number): one.cpu().contiguous() for number, one in enumerate(settings.components)}
        save_tensors(folder / COMPONENTS, tensors)
    write_atomically(
        path, json.dumps({**stored, KEY: settings.model_dump(exclude_unset=True)}, indent=2) + "\n"
    )


def read_setting(folder: Path) -> KVSettings | None:
    """The setting of a checkpoint, None when it has none.

    Raises:
        UserError: what stands there is no such setting.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError):
        return None  # transformers tells what is wrong with it
    setting = stored.get(KEY) if isinstance(stored, dict) else None
    if setting is None:
        return None
    if not isinstance(setting, dict):
        raise UserError(
            f"{path}: {KEY} is {setting!r}, which is no setting of a KV cache: take the line out."
        )
    try:
        settings = KVSettings.of(**{str(name): value for name, value in setting.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if settings.method != "pca":
        return settings
    components = _components(folder)
    try:
        return with_components(settings, components)
    except UserError as error:
        raise UserError(f"{folder / COMPONENTS}: {error}") from error


def check_lasts(setting: KVSettings | None, steps: Sequence[Step], anatomies: Sequence[Anatomy]) -> None:
    """Refuse steps that change the attention layers that a setting was measured on.

    Args:
        setting: of the model that the steps start from.
        anatomies: in front of each step, and behind the last.

    Raises:
        UserError: in one sentence.
    """
    measured = setting is not None and bool(setting.layer_bits or setting.components)
    remedy = f"take {KEY} out of the model's {FILE} first"
    for step, before, after in zip(steps, anatomies, anatomies[1:], strict=False):
        if measured and _kv_heads(before) != _kv_heads(after):
            raise UserError(
                f"{step.kind} changes the attention layers for which the settings of the KV cache were measured: "
                f"{remedy}."
            )
        if isinstance(step, QuantizeCache):
            measured, remedy = step.needs_survey, "put kv_cache behind it"


def _kv_heads(anatomy: Anatomy) -> list[int]:
    return [block.attention.num_kv_heads for block in anatomy.blocks if block.attention is not None]


def _components(folder: Path) -> list[Tensor]:
    """What `write_setting` put beside the setting."""
    path = folder / COMPONENTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read, which the KV cache of method pca needs: {str(error).splitlines()[0]}"
        ) from error
    found = [tensors.get(str(number)) for number in range(len(tensors))]
    if not all(
        one is not None
        and one.dtype == torch.float32
        and one.dim() == 3
        and one.shape[1] == one.shape[2]
        and bool(torch.isfinite(one).all())
        for one in found
    ):
        raise UserError(
            f"{path} has other tensors than the components of layers 0, 1, ...: it is damaged; make it again with "
            "quantize --method kv_cache."
        )
    return [one for one in found if one is not None]
