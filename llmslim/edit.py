"""Edits: the only way a model's structure changes.

An edit is a small record of plain JSON that can be applied to a real model and to a meta model. A compressed
checkpoint is the standard config, the list of its edits, and weights; loading builds the skeleton, replays the
edits, and reads the weights. A method describes what it decided as edits; nothing else alters structure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from llmslim.errors import UserError, first_line
from llmslim.ties import put, share, tie_shared

EDITS: dict[str, type[Edit]] = {}


class Edit(BaseModel):
    """A change of structure. Subclasses name themselves in `kind`, declare their fields, and define `apply`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str]
    only_plain: ClassVar[str] = ""
    """Set for edits that no checkpoint stores, as a plain config says what they did: what another cannot say."""
    only_format: ClassVar[str] = ""
    """Set for edits that mean something in one format alone: its name."""

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

    A plain config expresses the result, so that no checkpoint stores this edit.

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
        if not self.keep or list(self.keep) != [n for n in range(len(blocks)) if n in self.keep]:
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

    def renamed(self, name: str) -> str | None:
        """What a module is called afterwards; None if it is gone."""
        if not name.startswith(f"{self.stack}."):
            return name
        index, dot, rest = name.removeprefix(f"{self.stack}.").partition(".")
        if int(index) not in self.keep:
            return None
        return f"{self.stack}.{self.keep.index(int(index))}{dot}{rest}"

    def configure(self, config: Any, count: int) -> None:
        """Change a config that has `count` blocks in this stack."""
        decoder = getattr(config, "is_encoder_decoder", False) and "decoder" in self.stack.split(".")
        config = config.get_text_config()
        dense = _dense_blocks(config, count)
        for name, value in list(vars(config).items()):  # one entry per block: layer_types and its like
            if isinstance(value, (list, tuple)) and len(value) == count and name.endswith(_PER_BLOCK):
                setattr(config, name, [value[index] for index in self.keep])
        if dense is not None:
            config.mlp_only_layers = [new for new, old in enumerate(self.keep) if old in dense]
            config.decoder_sparse_step = 1
        names = ("num_decoder_layers", "decoder_layers") if decoder else ("num_hidden_layers",)
        setattr(config, next(name for name in names if hasattr(config, name)), len(self.keep))


_PER_BLOCK = ("layer_types", "rope_layers", "attention_layers")
"""How fields of configs end that hold one entry per block."""


def _dense_blocks(config: Any, count: int) -> set[int] | None:
    """Qwen's blocks without experts, which the config gives by index and by a period; None for other families."""
    step = getattr(config, "decoder_sparse_step", None)
    if step is None:
        return None
    return {index for index in range(count) if index in config.mlp_only_layers or (index + 1) % step}


def parse_edit(record: Any) -> Edit:
    """An edit from its JSON record, which is untrusted input: unknown kinds and fields are refused."""
    kind = record.get("edit") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in EDITS:
        raise UserError(
            f"The checkpoint has an unknown edit {kind!r}; this llmslim knows {', '.join(sorted(EDITS))}."
        )
    try:
        return EDITS[kind](**{key: value for key, value in record.items() if key != "edit"})
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"])
        raise UserError(f"The checkpoint's edit {kind!r} is damaged: {where}: {detail['msg']}.") from error


def replay(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Apply edits in order to a skeleton.

    Raises:
        UserError: an edit does not fit the model.
    """
    for edit in edits:
        try:
            edit.apply(model)
        except (AttributeError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
            raise UserError(
                f"The checkpoint's edit {edit.to_json()} does not fit the model: {first_line(error)}."
            ) from error
    try:
        tie_shared(model)
    except AttributeError as error:
        raise UserError(f"The checkpoint's edits leave blocks that share weights unlike: {error}.") from error


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name`; it shares with whom the one before did."""
    if source := model.get_submodule(name).__dict__.get("shared_with"):
        share(module, source)
    put(model, name, module)


@contextmanager
def in_place(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules at these dotted names for a while; those that were there come back, whatever happens."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            replace_module(model, name, module)
        yield
    finally:
        for name, module in before.items():
            replace_module(model, name, module)
