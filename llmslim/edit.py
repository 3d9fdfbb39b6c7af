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


class DropBlocks(Edit):
    """Leave out blocks of a stack; those that stay keep their order, and the config says how many there are.

    Any plain config can express the result, so that no checkpoint stores this edit.

    Attributes:
        stack: name of the ModuleList.
        keep: indices of the blocks that stay, ascending.
    """

    kind: ClassVar[str] = "drop_blocks"
    stack: str
    keep: tuple[int, ...]

    def apply(self, model: nn.Module) -> None:
        blocks = model.get_submodule(self.stack)
        if not isinstance(blocks, nn.ModuleList):
            raise ValueError(f"{self.stack} is no list of blocks")
        if not self.keep or max(self.keep) >= len(blocks) or list(self.keep) != sorted(set(self.keep)):
            raise ValueError(
                f"{self.stack} has {len(blocks)} blocks, of which {list(self.keep)} cannot be kept"
            )
        self.configure(model.config, len(blocks))
        kept = nn.ModuleList(blocks[index] for index in self.keep)
        replace_module(model, self.stack, kept)
        for index, block in enumerate(kept):
            for module in block.modules():  # a block's place in the KV cache
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = index  # type: ignore[assignment]

    def configure(self, config: Any, count: int) -> None:
        """Change a config that has `count` blocks in this stack."""
        two_sided = getattr(config, "is_encoder_decoder", False)
        decoder = two_sided and self.stack.startswith("decoder")
        config = config.get_text_config()
        for name, value in list(vars(config).items()):  # one entry per block: layer_types and its like
            if isinstance(value, (list, tuple)) and len(value) == count and name.endswith("layer_types"):
                setattr(config, name, [value[index] for index in self.keep])
        if getattr(config, "mlp_only_layers", None):  # Qwen's blocks without experts, by index
            dense = set(config.mlp_only_layers)
            config.mlp_only_layers = [new for new, old in enumerate(self.keep) if old in dense]
        setattr(config, "num_decoder_layers" if decoder else "num_hidden_layers", len(self.keep))


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
