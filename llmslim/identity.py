"""What tells a run from another: what it must be given to go on to the same bytes, and where it was done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import llmslim
from llmslim.loaders.models import ModelFiles
from llmslim.passes import PassOptions
from llmslim.prepare import Prepared

PLACED_BY = ("torch", "transformers", "accelerate", "safetensors", "compressed-tensors", "datasets")
"""Packages whose versions a report tells."""
COMPUTED_BY = ("tokenizers", "peft", "bitsandbytes")
"""More of which another version may give other bytes."""


def fingerprint(prepared: Prepared) -> dict[str, Any]:
    """What must be the same for a resumed run to give the same bytes."""
    files, recipe = prepared.files, prepared.recipe
    beside = [path for step in recipe.steps for path in step.reads()]
    record = {
        "model": [str(files.folder), _stamps(_weight_paths(files))],
        **recipe.model_copy(update={"evaluation": None}).to_json(),
        "choice to measure every step": recipe.measures_steps,
        "text": prepared.text.data_hash if prepared.text else None,
        "teacher or earlier model": [
            [str(one.folder), _stamps([*_weight_paths(one), *_told(one)])] for one in prepared.others
        ],
        "data": _stamps(beside),
        "versions": {"llmslim": llmslim.__version__, **_versions(*PLACED_BY, *COMPUTED_BY)},
        "device": str(prepared.options.device),
        "threads": torch.get_num_threads(),
    }
    return json.loads(json.dumps(record))


def _weight_paths(files: ModelFiles) -> list[Path]:
    return [
        files.folder / name for name in sorted({entry["file"] for entry in files.weights.entries.values()})
    ]


def _told(files: ModelFiles) -> list[Path]:
    """What says how a model reads, and what its outputs are called."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    return [path for name in names if (path := files.folder / name).exists()]


def _stamps(paths: Sequence[Path]) -> list[list[int]]:
    """Size and time of files, which tell a changed one without reading it."""
    return [[stat.st_size, stat.st_mtime_ns] for stat in (path.stat() for path in paths)]


def environment(options: PassOptions) -> dict[str, Any]:
    """Machine and versions, so that a figure can be placed."""
    import platform

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(options.device),
        "compute_dtype": str(options.dtype).removeprefix("torch."),
        "versions": _versions(*PLACED_BY),
    }


def _versions(*names: str) -> dict[str, str]:
    """Of the packages that are installed."""
    import importlib.metadata

    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
