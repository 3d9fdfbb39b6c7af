"""Sizes on disk and bits per weight, read from file headers."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from llmslim.anatomy import Anatomy
from llmslim.anatomy.parts import is_packed
from llmslim.checkpoint.reader import model_on_meta
from llmslim.loaders.models import ModelFiles, skeleton
from llmslim.loaders.safetensors_io import entry_bytes
from llmslim.ties import counterpart, shared_modules


def size_of(files: ModelFiles) -> dict[str, Any]:
    """Bytes of the weights on disk, and what they come to per weight of the uncompressed architecture.

    `bits_per_weight` counts everything, `bits_per_block_weight` only what lies in the blocks (embeddings and
    head excluded): packed codes, scales, zero points, norms and biases, over the parameters that they stand for.
    `block_parameters` are those of the plain config, `block_bytes` what is stored in their place.
    `parts` are bytes by part of the model, largest first.
    `unique_parameters` are those that the checkpoint has, `effective_parameters` those that a token goes through
    when blocks share some: each counts once for every block that uses it. A packed weight counts by its shape.
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
    parts: dict[str, int] = {}
    for name, entry in files.weights.entries.items():
        size = entry_bytes(entry)
        all_bytes += size
        block_bytes += size if name.startswith(inside) else 0
        part = part_of(name, name.startswith(inside))
        parts[part] = parts.get(part, 0) + size
    weight_files = {entry["file"] for entry in files.weights.entries.values()}
    return {
        "parameters": total,
        **counts(model_on_meta(files)),
        "bytes_on_disk": sum((files.folder / name).stat().st_size for name in weight_files),
        "block_parameters": in_blocks,
        "block_bytes": block_bytes,
        "parts": dict(sorted(parts.items(), key=lambda entry: -entry[1])),
        "bits_per_weight": 8 * all_bytes / total,
        "bits_per_block_weight": 8 * block_bytes / max(1, in_blocks),
    }


def part_of(name: str, in_block: bool) -> str:
    """Which part of a model a stored tensor belongs to, by its name: what a report's bars show."""
    words = name.lower().split(".")
    if any("norm" in word or word.startswith("ln_") for word in words):
        return "norms"
    if words[-1] in ("scales", "qzeros", "g_idx") or "scale" in words[-1] or "zero" in words[-1]:
        return "scales and zero points"
    if not in_block:
        return (
            "embeddings and head"
            if any("emb" in w or "head" in w or w in ("wte", "wpe") for w in words)
            else "other"
        )
    if any("attn" in word or "attention" in word for word in words):
        return "attention"
    if any(
        w in ("mlp", "feed_forward", "intermediate", "output", "ffn", "experts") or w.startswith("fc")
        for w in words
    ):
        return "MLP"
    return "other"


def counts(model: nn.Module) -> dict[str, int]:
    """`unique_parameters` and `effective_parameters` of a skeleton, as `size_of` tells them."""
    shared, seen = shared_modules(model), set[int]()
    unique = effective = 0
    for name, module in model.named_modules():
        follows = counterpart(name, shared) is not None
        for leaf, parameter in module._parameters.items():
            if parameter is None or (is_packed(module) and leaf not in ("weight_packed", "weight", "bias")):
                continue
            size = (
                math.prod(module.shape)  # type: ignore[arg-type]
                if is_packed(module) and leaf != "bias"
                else parameter.numel()
            )
            tied, borrowed = id(parameter) in seen, follows and leaf != "bias"
            seen.add(id(parameter))
            effective += 0 if tied and not borrowed else size
            unique += 0 if tied or borrowed else size
    return {"unique_parameters": unique, "effective_parameters": effective}
