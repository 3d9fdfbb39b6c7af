"""The setting of a quantized KV cache in a checkpoint, and the step that writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from llmslim.anatomy import Anatomy
from llmslim.anatomy.block import Block
from llmslim.calibration.stream import BlockStream
from llmslim.errors import UserError
from llmslim.kvcache.settings import KVSettings, head_sizes
from llmslim.step import BlockStep, StepRecord

FILE, KEY = "generation_config.json", "llmslim_kv_cache"


class QuantizeCache(BlockStep):
    """Keys and values of past tokens in few bits when the model generates; the weights stay as they are.

    Kinds: `kivi` (arXiv 2402.02750), `token`, and `rotated` (TurboQuant, arXiv 2504.19874). The setting goes into
    generation_config.json, where `llmslim.load` and `llmslim generate` find it; other libraries pass it over.
    """

    kind: ClassVar[str] = "kv_cache"
    verb: ClassVar[str] = "quantize"

    kv_bits: int = Field(4, ge=2, le=8, description="bits per stored number of the KV cache: 2, 3, 4 or 8")
    kv_method: Literal["kivi", "token", "rotated"] = Field(
        "kivi", description="keys per channel and values per token, both per token, or both rotated"
    )
    kv_group_size: int | None = Field(
        None,
        ge=1,
        description="numbers of the KV cache that share a scale; 64, or what fits the heads, when left out",
    )
    kv_window: int = Field(128, ge=0, description="recent tokens of the KV cache that stay as they are")
    kv_sink: int = Field(4, ge=0, description="first tokens of the KV cache that stay as they are")

    @field_validator("kv_bits")
    @classmethod
    def _that_pack(cls, value: int) -> int:
        if value not in (2, 3, 4, 8):
            raise ValueError("a KV cache takes 2, 3, 4 or 8 bits")
        return value

    @property
    def settings(self) -> KVSettings:
        return KVSettings(
            bits=self.kv_bits,  # type: ignore[arg-type]
            method=self.kv_method,
            group_size=self.kv_group_size,
            window=self.kv_window,
            sink=self.kv_sink,
        )

    def check(self, anatomy: Anatomy) -> None:
        config = anatomy.model.config
        if config.is_encoder_decoder or not anatomy.model.can_generate():
            raise UserError(
                f"kv_cache: {type(anatomy.model).__name__} has no cache to quantize: it takes a causal language model."
            )
        for size in head_sizes(config):
            self.settings.channels(size)

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        """Nothing: the weights stay."""

    def write_beside(self, folder: Path, record: StepRecord) -> None:
        write_setting(folder, self.settings)
        record.note(
            self.kind,
            f"{FILE} asks for a KV cache of {self.kv_bits} bits; perplexity is measured without one",
        )


def write_setting(folder: Path, settings: KVSettings) -> None:
    """Put the setting into the generation config of a checkpoint."""
    path = folder / FILE
    stored = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**stored, KEY: settings.model_dump()}, indent=2) + "\n", "utf-8")


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
        return KVSettings.of(**{str(name): value for name, value in setting.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
