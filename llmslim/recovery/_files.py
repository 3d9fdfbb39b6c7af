"""An adapter's folder as peft saves it: input that is not trusted, so that all of it is read and checked here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from llmslim.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class AdapterConfig(BaseModel):
    """What llmslim needs of peft's config; the rest of it stays beside."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    lora_alpha: float
    use_rslora: bool = False
    init_lora_weights: Any = True
    base_model_name_or_path: str | None = None

    def scaling(self, rank: int) -> float:
        """How many times B A of that rank counts."""
        return self.lora_alpha / (rank**0.5 if self.use_rslora else rank)


class AdapterFiles(NamedTuple):
    """A folder, its config, the shapes of its tensors by name, and the metadata of their file."""

    folder: Path
    config: AdapterConfig
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    def entry(self, key: str) -> dict[str, str]:
        """An entry of the metadata that is JSON, names -> words; empty where it is not there."""
        try:
            return TypeAdapter(dict[str, str]).validate_json(self.metadata.get(key, "{}"))
        except ValidationError as error:
            raise UserError(
                f"The adapter {self.folder} is damaged: the entry {key} of its metadata is none."
            ) from error


def read_adapter(folder: Path) -> AdapterFiles:
    """Read what an adapter is, but no weights.

    Raises:
        UserError: there is none (or one whose weights are a pickle, which is never loaded), or it is damaged.
    """
    if not all((folder / name).is_file() for name in (CONFIG, WEIGHTS)):
        raise UserError(
            f"No adapter in {folder}: name a folder with {CONFIG} and {WEIGHTS}, such as OUTPUT/adapter of `llmslim "
            "recover --method lora --save-adapter`."
        )
    from safetensors import safe_open

    try:
        config = AdapterConfig.model_validate(json.loads((folder / CONFIG).read_text("utf-8")))
        with safe_open(folder / WEIGHTS, "pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except ValidationError as error:
        wrong = error.errors()[0]
        what = ".".join(map(str, wrong["loc"])) or "what it holds"
        raise UserError(
            f"{folder / CONFIG} is not the config of an adapter of LoRA: {what}: {wrong['msg']}."
        ) from error
    except Exception as error:  # safetensors raises one of its own
        said = " ".join(str(error).split())[:120]
        raise UserError(f"The adapter {folder} is damaged, so save or download it again: {said}.") from error
    _check_pairs(folder, shapes)
    return AdapterFiles(folder, config, shapes, metadata)


def _check_pairs(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Each A [rank, in] needs its B [out, rank]; peft takes one that is not there for zeros."""
    for part, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        for name in (name for name in shapes if name.endswith(f".{part}.weight")):
            twin = name.removesuffix(f"{part}.weight") + f"{other}.weight"
            if twin not in shapes:
                raise UserError(f"The adapter {folder} is damaged: it has {name}, and no {twin}.")
            if part == "lora_A" and (shapes[name][:1] != shapes[twin][1:2] or 0 in shapes[name]):
                raise UserError(
                    f"The adapter {folder} is damaged: {name} is {shapes[name]} and {twin} {shapes[twin]}, which have "
                    "not one rank."
                )
