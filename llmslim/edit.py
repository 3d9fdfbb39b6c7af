"""Edits: the only way a model's structure changes.

An edit is a small record of plain JSON that can be applied to a real model and to a meta model. A compressed
checkpoint is the standard config, the list of its edits, and weights; loading builds the skeleton, replays the
edits, and reads the weights. A method describes what it decided as edits; nothing else alters structure.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from llmslim.errors import UserError

EDITS: dict[str, type[Edit]] = {}


class Edit(BaseModel):
    """A change of structure. Subclasses name themselves in `kind`, declare their fields, and define `apply`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str]
    only_plain: ClassVar[str] = ""
    """Set for edits that no checkpoint stores, as a plain config says what they did: what another cannot say."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            EDITS[cls.kind] = cls

    def apply(self, model: nn.Module) -> None:
        """Change `model` in place; works on meta tensors as on real ones.

        Raises:
            ValueError: the model has no such part, or one of another shape.
        """
        raise TypeError(f"{type(self).__name__} does not define apply()")

    def to_json(self) -> dict[str, Any]:
        return {"edit": self.kind, **self.model_dump(mode="json")}


def parse_edit(record: Any) -> Edit:
    """An edit from its JSON record, which is untrusted input: unknown kinds and fields are refused."""
    kind = record.get("edit") if isinstance(record, dict) else None
    if kind not in EDITS:
        raise UserError(
            f"The checkpoint has an unknown edit {kind!r}; this llmslim knows {', '.join(sorted(EDITS))}."
        )
    try:
        return EDITS[kind](**{key: value for key, value in record.items() if key != "edit"})
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"])
        raise UserError(f"The checkpoint's edit {kind!r} is damaged: {where}: {detail['msg']}.") from error


def replay(model: nn.Module, edits: list[Edit]) -> None:
    """Apply edits in order to a skeleton.

    Raises:
        UserError: an edit does not fit the model.
    """
    for edit in edits:
        try:
            edit.apply(model)
        except (AttributeError, ValueError, TypeError) as error:
            raise UserError(
                f"The checkpoint's edit {edit.to_json()} does not fit the model: {error}."
            ) from error


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
