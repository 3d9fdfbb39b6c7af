"""What `llmslim inspect` says of a model: its shape, and its parameters and bytes by part."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from llmslim.anatomy.anatomy import Anatomy, Stack
from llmslim.anatomy.parts import Experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def summary(model: PreTrainedModel, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The anatomy of a model as plain JSON; of one that is not wholly understood, what is understood.

    Args:
        model: real, or on meta.
        dtype: count the bytes of floating-point tensors as if they were stored so; default: as they are.

    Of each stack, a width is one number where all blocks agree, else a list with one entry per block.
    """
    anatomy = Anatomy(model)
    unmatched = anatomy.unmatched
    tensors = {part: list(named.values()) for part, named in anatomy.parts().items() if named}
    parts = {part: _count(listed, dtype) for part, listed in tensors.items()}
    return {
        "model": type(model).__name__,
        "family": anatomy.family,
        "dtype": str(dtype or model.dtype).removeprefix("torch."),
        "hidden_size": model.get_input_embeddings().embedding_dim,
        "vocab_size": model.get_input_embeddings().num_embeddings,
        "tied": anatomy.tied,
        "stacks": [_stack(stack, whole=not unmatched) for stack in anatomy.stacks],
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
        "unmatched": unmatched,
    }


def render(summary: dict[str, Any]) -> Group:
    """The summary as tables for the terminal."""
    facts = Table(title=f"{summary['model']} ({summary['family']})", show_header=False)
    for key in ("dtype", "hidden_size", "vocab_size", "tied"):
        facts.add_row(key.replace("_", " "), str(summary[key]))
    for stack in summary["stacks"]:
        facts.add_section()
        for key, value in stack.items():
            facts.add_row(key.replace("_", " "), str(value))

    sizes = Table("part", title="Parameters and bytes")
    for heading in ("parameters", "%", "MB"):
        sizes.add_column(heading, justify="right")
    total = summary["parameters"]
    rows = [*summary["parts"].items(), ("total", {"parameters": total, "bytes": summary["bytes"]})]
    for part, count in rows:
        sizes.add_section() if part == "total" else None
        share = 100 * count["parameters"] / total
        sizes.add_row(part, f"{count['parameters']:,}", f"{share:.1f}", f"{count['bytes'] / 1e6:,.2f}")
    if not summary["unmatched"]:
        return Group(facts, sizes)
    strange = Table("not matched: llmslim cannot compress this model", *[])
    for name in summary["unmatched"]:
        strange.add_row(name)
    return Group(facts, sizes, strange)


def _count(tensors: Iterable[Tensor], dtype: torch.dtype | None) -> dict[str, int]:
    """Elements and bytes of the tensors of one part."""
    counts = {"parameters": 0, "bytes": 0}
    for tensor in tensors:
        counts["parameters"] += tensor.numel()
        counts["bytes"] += (
            tensor.numel() * (dtype if dtype and tensor.is_floating_point() else tensor.dtype).itemsize
        )
    return counts


def _stack(stack: Stack, whole: bool) -> dict[str, Any]:
    """The widths of a stack; only its name and length if its model is not wholly understood."""
    facts: dict[str, Any] = {"stack": stack.name, "blocks": len(stack.modules)}
    if not whole:
        return facts
    attentions = [block.attention for block in stack.blocks]
    mlps = [block.mlp for block in stack.blocks]
    facts |= {
        "causal": stack.is_causal,
        "num_heads": _common(attention.num_heads for attention in attentions),
        "num_kv_heads": _common(attention.num_kv_heads for attention in attentions),
        "head_dim": _common(attention.head_dim for attention in attentions),
        "mlp_width": _common(mlp.width if mlp else 0 for mlp in mlps),
    }
    if any(isinstance(mlp, Experts) for mlp in mlps):
        facts["num_experts"] = _common(mlp.num_experts if isinstance(mlp, Experts) else 0 for mlp in mlps)
        facts["experts_per_token"] = max(mlp.top_k for mlp in mlps if isinstance(mlp, Experts))
    return facts


def _common(values: Iterable[int]) -> int | list[int]:
    """The value that all share, else all of them."""
    listed = list(values)
    return listed[0] if len(set(listed)) == 1 else listed
