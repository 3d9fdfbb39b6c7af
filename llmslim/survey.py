"""A step's look at the whole model before its pass: streamed block by block, or loaded for gradients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslim.anatomy import Anatomy, Block
from llmslim.calibration.stream import BlockStream, Lane
from llmslim.checkpoint.load import load_model
from llmslim.checkpoint.reader import CheckpointReader
from llmslim.checkpoint.walk import walk_blocks
from llmslim.files import write_atomically
from llmslim.loaders.models import ModelFiles
from llmslim.passes import PassOptions
from llmslim.ranks import first
from llmslim.step import BlockStep
from llmslim.work import Progress

NOTES, SURVEY = "notes.json", "survey.safetensors"  # in the scratch folder


class Look:
    """What `llmslim.step.Survey` promises, for a model in its files."""

    def __init__(
        self, files: ModelFiles, options: PassOptions, progress: Progress, scratch: Path = Path()
    ) -> None:
        self.files, self.options, self.scratch, self.progress = files, options, scratch, progress
        self.seed, self.dtype = options.seed, options.dtype
        self.reader = CheckpointReader(files)
        self.anatomy = Anatomy.of(self.reader.model_skeleton())

    @property
    def tokens(self) -> Tensor:
        assert self.options.tokens is not None, "the step's needs_calibration says that it needs no text"
        return self.options.tokens

    def tokenizer(self, step: BlockStep | None = None) -> Any:
        return (self.files if step is None else self._other(step)).tokenizer()

    @property
    def mask_token(self) -> int | None:
        return self.tokenizer().mask_token_id

    def note(self, where: str, what: str, **figures: float) -> None:
        if first():
            told = [*notes_of(self.scratch), {"where": where, "what": what, **figures}]
            write_atomically(self.scratch / NOTES, json.dumps(told))

    def progressed(self, done: int, total: int) -> None:
        self.progress("survey", done, total)

    def blocks(self) -> Iterator[tuple[Block, BlockStream]]:
        model = self.reader.model_skeleton()
        stream = BlockStream(model, self.options.device, self.options.dtype)
        if self.options.tokens is not None:
            two_sided = bool(model.config.is_encoder_decoder)
            stream.add(Lane.of_tokens("calibration", self.options.tokens, two_sided))
        total = len(self.anatomy.blocks)
        for done, block in enumerate(walk_blocks(self.reader, stream)):
            self.progress("survey", done, total)
            yield block, stream
        self.progress("survey", total, total)

    def loaded(self) -> PreTrainedModel:
        return load_model(self.files, torch.float32, self.options.device)

    def other(
        self, step: BlockStep, exact: bool = False, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        files = self._other(step)
        chosen = files.dtype if exact else dtype or self.options.dtype
        model = load_model(files, chosen, self.options.device)
        return model.requires_grad_(False)

    def _other(self, step: BlockStep) -> ModelFiles:
        assert self.options.base is not None
        files = step.other(self.options.base)
        assert files is not None, "a step that takes from no other model asks for none"
        return files


def notes_of(scratch: Path) -> list[dict[str, Any]]:
    """What a survey told for the report, that of an earlier run, too."""
    path = scratch / NOTES
    return json.loads(path.read_text()) if path.exists() else []
