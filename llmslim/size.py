"""Sizes on disk and bits per weight, read from file headers."""

from __future__ import annotations

import math
from typing import Any

from llmslim.anatomy import Anatomy
from llmslim.loaders.models import ModelFiles, skeleton
from llmslim.loaders.safetensors_io import DTYPE_BYTES


def size_of(files: ModelFiles) -> dict[str, Any]:
    """Bytes of the weights on disk, and what they come to per weight of the uncompressed architecture.

    `bits_per_weight` counts everything, `bits_per_block_weight` only what lies in the blocks (embeddings and
    head excluded): packed codes, scales, zero points, norms and biases, over the parameters that they stand for.
    `block_parameters` are those of the plain config, `block_bytes` what is stored in their place.
    """
    anatomy = Anatomy(skeleton(files.config))
    stacks = tuple(f"{stack.name}." for stack in anatomy.stacks)
    total = sum(p.numel() for p in anatomy.model.parameters())
    in_blocks = sum(p.numel() for name, p in anatomy.model.named_parameters() if name.startswith(stacks))
    prefix = anatomy.model.base_model_prefix
    inside = (
        *stacks,
        *(f"{prefix}.{stack}" for stack in stacks),
        *(s.removeprefix(f"{prefix}.") for s in stacks),
    )
    all_bytes = block_bytes = 0
    for name, entry in files.weights.entries.items():
        size = math.prod(entry["shape"]) * DTYPE_BYTES.get(entry["dtype"], 1)
        all_bytes += size
        block_bytes += size if name.startswith(inside) else 0
    weight_files = {entry["file"] for entry in files.weights.entries.values()}
    return {
        "parameters": total,
        "bytes_on_disk": sum((files.folder / name).stat().st_size for name in weight_files),
        "block_parameters": in_blocks,
        "block_bytes": block_bytes,
        "bits_per_weight": 8 * all_bytes / total,
        "bits_per_block_weight": 8 * block_bytes / max(1, in_blocks),
    }
