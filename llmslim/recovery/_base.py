"""Whether an adapter is there, and meets the weights that it was trained beside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmslim.errors import UserError
from llmslim.loaders.safetensors_io import SafetensorsFolder

if TYPE_CHECKING:
    from llmslim.loaders.models import ModelFiles

KEY = "llmslim_base"
"""In the metadata of an adapter's file: what its base looks like."""
ROWS = 8  # of each tensor: enough to tell two models apart, of any size, in a moment


def seal(weights: SafetensorsFolder, linears: Iterable[str]) -> str:
    """What tells the weights of these Linears from others': JSON, tensor name -> type and digest of its first rows."""
    names = set(linears)
    digests: dict[str, str] = {}
    with weights.open() as get:
        for name, entry in sorted(weights.entries.items()):
            if name.rpartition(".")[0] in names and len(entry["shape"]) == 2:
                rows = get(name)[:ROWS].contiguous().view(torch.uint8).numpy().tobytes()
                digests[name] = f"{entry['dtype']} {hashlib.sha256(rows).hexdigest()[:16]}"
    return json.dumps(digests)


def require_files(adapter: Path) -> None:
    """Refuse a folder that has no adapter, or has its weights as a pickle, which peft would load."""
    if not all((adapter / name).is_file() for name in ("adapter_config.json", "adapter_model.safetensors")):
        raise UserError(
            f"No adapter in {adapter}: name a folder with adapter_config.json and adapter_model.safetensors, such as "
            "OUTPUT/adapter of `llmslim recover --method lora --save-adapter`."
        )


def require_base(adapter: Path, files: ModelFiles) -> None:
    """Refuse a model whose weights are others than those that the adapter was trained beside.

    Tensors are compared that both have, in the same type. Adapters that llmslim did not make say nothing of this.

    Raises:
        UserError: with the first that differs.
    """
    from safetensors import safe_open

    try:
        with safe_open(adapter / "adapter_model.safetensors", "pt") as opened:
            sealed = json.loads((opened.metadata() or {}).get(KEY, "{}"))
            names = {name.rpartition(".")[0] for name in sealed}
    except Exception:  # no adapter, or a damaged one: who reads it says so
        return
    found = json.loads(seal(files.weights, names)) if names else {}
    for name, digest in found.items():
        there = str(sealed.get(name, digest))
        if there != digest and there.split()[0] == digest.split()[0]:
            raise UserError(
                f"The adapter {adapter} was trained beside other weights than those of {files.spec} ({name} differs): "
                "take the model that it was trained with."
            )
