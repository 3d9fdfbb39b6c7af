"""A teacher that is asked once: the likeliest tokens of its distributions on disk, for training of several epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from llmslim.anatomy import Anatomy
from llmslim.errors import UserError
from llmslim.files import load_tensors, save_tensors
from llmslim.step import Survey
from llmslim.training.step import TrainStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CachedStep(TrainStep):
    """A `TrainStep` that can write down what the teacher says, and train without the teacher in memory."""

    cached_logits: int | None = Field(
        None,
        ge=1,
        description="keep so many tokens of each of the teacher's distributions on disk, all others as one, and train "
        "without the teacher in memory; pays off from 2 epochs on",
    )

    @property
    def keeps_other(self) -> bool:
        return super().keeps_other and self.cached_logits is None

    def disk_bytes(self, anatomy: Anatomy, tokens: int) -> int:
        cache = tokens * (6 * self.cached_logits + 4) if self.cached_logits else 0
        return super().disk_bytes(anatomy, tokens) + cache

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if self.cached_logits is None:
            return
        if not self.distills:
            raise UserError(
                f"cached_logits {self.cached_logits} is of a teacher's, and this learns from none."
            )
        vocabulary = anatomy.model.config.get_text_config().vocab_size
        if self.cached_logits > vocabulary:
            raise UserError(
                f"cached_logits {self.cached_logits} is more than the {vocabulary} tokens of the vocabulary: take 64."
            )

    def learned_from(self, look: Survey) -> PreTrainedModel | TeacherCache | None:
        if self.cached_logits is None:
            return super().learned_from(look)
        cache = TeacherCache(look.scratch / "teacher", look.tokens)
        if not cache.complete:
            cache.write(
                look.other(self),
                self.cached_logits,
                self.temperature,
                lambda done, total: look.progress("teacher", done, total),
                look.anatomy.model.config.get_text_config().vocab_size,
            )
        return cache


class TeacherCache:
    """What a teacher says of some windows: a file for each, so that a killed run goes on behind the last one.

        ids         int32 [seq, k], the likeliest tokens
        log_probs   float16 [seq, k], theirs
        tail        float32 [seq], log of the probability of all others; absent when there are none

    Args:
        tokens: windows, int64 [windows, seq].
    """

    def __init__(self, folder: Path, tokens: Tensor) -> None:
        self.folder, self.tokens = folder, tokens
        self._places = {_key(window): index for index, window in enumerate(tokens)}

    @property
    def complete(self) -> bool:
        return all(self._path(index).exists() for index in self._places.values())

    @torch.no_grad()
    def write(
        self,
        teacher: PreTrainedModel,
        k: int,
        temperature: float,
        progress: Callable[[int, int], None],
        vocabulary: int | None = None,
    ) -> None:
        """Ask the teacher for each window that has no file yet.

        Args:
            vocabulary: tokens of the student's, behind which the teacher's is padding.
        """
        from llmslim.training.forward import run
        from llmslim.training.head import Parted
        from llmslim.training.logits import in_parts
        from llmslim.training.losses import likeliest

        self.folder.mkdir(parents=True, exist_ok=True)
        parted = Parted(teacher, self.tokens)
        device = next(teacher.parameters()).device
        for done, index in enumerate(self._places.values()):
            progress(done, len(self._places))
            path = self._path(index)
            if path.exists():
                continue
            logits = parted.logits(run(parted.body, self.tokens[index : index + 1].to(device)))[0]
            found = [
                likeliest(some[:, :vocabulary], min(k, some.shape[-1]), temperature)
                for some in in_parts(logits)
            ]
            ids, log_probs, tails = zip(*found, strict=True)
            tensors = {"ids": torch.cat(ids).int(), "log_probs": torch.cat(log_probs).half()}
            tensors |= {} if tails[0] is None else {"tail": torch.cat(tails)}
            save_tensors(path, {name: tensor.cpu() for name, tensor in tensors.items()})
        progress(len(self._places), len(self._places))

    def of(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """ids int64 and log_probs float32 [batch, seq, k], tail float32 [batch, seq] or None, of known windows."""
        kept = [load_tensors(self._path(self._places[_key(window)])) for window in tokens]
        parts = {name: torch.stack([one[name] for one in kept]).to(tokens.device) for name in kept[0]}
        return parts["ids"].long(), parts["log_probs"].float(), parts.get("tail")

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.safetensors"


def _key(window: Tensor) -> bytes:
    """A window by what it says: the same tokens are told the same."""
    return window.cpu().numpy().tobytes()
