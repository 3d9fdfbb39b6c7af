"""Names of modules in stored edits: relative to the base model, so that it loads without its head, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedModel

from llmslim.edit import Edit

MODULE_FIELDS = ("module", "block", "tied_head", "source")
"""Fields of edits that hold the name of a module."""


def relative(edits: Sequence[Edit], model: PreTrainedModel) -> list[Edit]:
    """The edits with the base model's prefix taken off their names ("model.layers.0" -> "layers.0")."""
    prefix = f"{_prefix(model)}."
    return [_renamed(edit, lambda name: name.removeprefix(prefix)) for edit in edits]


def absolute(edits: Sequence[Edit], model: PreTrainedModel) -> list[Edit]:
    """The inverse, for `model`, which may be the base model alone: edits of a head are left out then."""
    prefix = _prefix(model)
    base = getattr(model, prefix) if prefix else model
    whole = model.config.architectures or [type(model).__name__]
    partial = type(model).__name__ not in whole

    def full(name: str) -> str | None:
        first = name.partition(".")[0]
        if hasattr(base, first):
            return f"{prefix}.{name}" if prefix else name
        return None if partial and not hasattr(model, first) else name

    renamed = [_renamed(edit, full) for edit in edits]
    return [
        edit for edit in renamed if all(getattr(edit, field, "") is not None for field in ("module", "block"))
    ]


def _prefix(model: PreTrainedModel) -> str:
    """Where the base model hangs in `model`; "" when it is the base model itself (or T5, which has none)."""
    prefix = model.base_model_prefix
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def renamed_or_gone(edit: Edit, rename: Callable[[str], str | None]) -> Edit | None:
    """The edit with its names changed; None if what it is about is gone."""
    moved = _renamed(edit, rename)
    lost = any(getattr(edit, f, None) is not None and getattr(moved, f) is None for f in MODULE_FIELDS)
    return None if lost else moved


def _renamed(edit: Edit, rename: Callable[[str], str | None]) -> Edit:
    names = {field: getattr(edit, field, None) for field in MODULE_FIELDS}
    return edit.model_copy(update={field: rename(name) for field, name in names.items() if name is not None})
