"""What edits would leave of a model, told from a skeleton on meta: parameters, and bytes on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from transformers import PreTrainedModel

from llmslim.anatomy import Anatomy
from llmslim.checkpoint.formats import Format
from llmslim.checkpoint.writer import weight_bytes
from llmslim.edit import Edit, replay


@dataclass(frozen=True)
class Foresight:
    """What `llmslim.step.Outlook` promises.

    Attributes:
        origin: the model that the run starts from, on meta.
        edits: of all steps so far.
        form: chooses the format that holds a result of these edits.
        stored: what dense tensors are stored in.
        model: what these edits leave of it; None without edits.
    """

    origin: PreTrainedModel
    edits: tuple[Edit, ...]
    form: Callable[[list[Edit]], Format]
    stored: torch.dtype
    model: PreTrainedModel | None = None
    _forms: dict[frozenset[str], Format] = field(default_factory=dict)  # by kinds of edits, which decide it

    def after(self, edits: list[Edit]) -> Foresight:
        model = copy.deepcopy(self.anatomy.model)
        replay(model, edits)
        return replace(self, edits=(*self.edits, *edits), model=model)

    @cached_property
    def anatomy(self) -> Anatomy:
        return Anatomy.of(copy.deepcopy(self.origin)) if self.model is None else Anatomy(self.model)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.anatomy.model.parameters())

    @property
    def share(self) -> float:
        return self.parameters / sum(parameter.numel() for parameter in self.origin.parameters())

    @property
    def stored_bytes(self) -> int:
        kinds = frozenset(edit.kind for edit in self.edits)
        if kinds not in self._forms:
            self._forms[kinds] = self.form(list(self.edits))
        return weight_bytes(self.anatomy.model, self._forms[kinds], self.stored)
