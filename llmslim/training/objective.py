"""A step that trains on either of two objectives: the teacher's distribution, or the next token of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.errors import UserError
from llmslim.training.cached import CachedStep, TeacherCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmslim.training.loop import Loss


class ObjectiveStep(CachedStep):
    """A `TrainStep` that needs no teacher when it predicts the next token."""

    without_teacher: ClassVar[str] = ", or use --objective next_token"

    objective: Literal["distill", "next_token"] = Field(
        "distill",
        description="match the teacher's distribution over tokens, or predict the text's next token",
    )

    @property
    def distills(self) -> bool:
        return self.objective == "distill"

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if self.objective == "next_token" and not anatomy.is_decoder:
            raise UserError(
                f"objective 'next_token' needs a causal model, and {type(anatomy.model).__name__} is none: use distill."
            )

    def criterion(
        self, model: PreTrainedModel, teacher: PreTrainedModel | TeacherCache | None, tokens: Tensor
    ) -> tuple[Loss, list[nn.Parameter]]:
        from llmslim.training.forward import run
        from llmslim.training.losses import coarse_divergence, divergence, next_token

        def loss(model: nn.Module, tokens: Tensor) -> Tensor:
            logits = run(model, tokens).logits
            if teacher is None:
                return next_token(logits, tokens)
            if isinstance(teacher, TeacherCache):
                return coarse_divergence(logits, *teacher.of(tokens), self.temperature)
            with torch.no_grad():
                targets = run(teacher, tokens).logits
            return divergence(logits, targets, self.temperature)

        return loss, []
