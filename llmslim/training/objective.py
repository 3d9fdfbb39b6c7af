"""A step that trains on one of three objectives: the teacher's distribution, or the text's next or masked tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.calibration.objectives import IGNORED, masked
from llmslim.errors import UserError
from llmslim.step import Survey
from llmslim.training.cached import CachedStep, TeacherCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

    from llmslim.training.loop import Loss


@dataclass(frozen=True)
class Masking:
    """What takes the place of a token that is asked for; None puts random ones there."""

    token: int | None
    vocabulary: int

    def of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Windows with 15% of the tokens hidden, and these, IGNORED elsewhere; int64 [batch, seq].

        Drawn by torch's own generator; in validation the same ones each time.
        """
        seed = int(torch.randint(2**31, ())) if torch.is_grad_enabled() else 0
        generator = torch.Generator().manual_seed(seed)
        pairs = [masked(window[None], generator, self.token, self.vocabulary) for window in tokens]
        inputs, labels = (torch.cat(side) for side in zip(*pairs, strict=True))
        return inputs, labels


class ObjectiveStep(CachedStep):
    """A `TrainStep` that needs no teacher when it predicts the text's own tokens."""

    without_teacher: ClassVar[str] = ", or use --objective next_token"

    objective: Literal["distill", "next_token", "masked_token"] = Field(
        "distill",
        description="match the teacher's distribution over tokens, or predict the text's own: the next one, or, with "
        "encoders, 15 % that are masked",
    )

    @model_validator(mode="after")
    def _of_a_teacher(self) -> Self:
        changed = next(filter(self.given, ("teacher", "temperature")), None)
        if changed and not self.distills:
            raise ValueError(
                f"{changed} is about learning from a teacher, and objective {self.objective} has none"
            )
        return self

    @property
    def distills(self) -> bool:
        return self.objective == "distill"

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if self.objective == "next_token" and not anatomy.is_decoder:
            raise UserError(
                f"objective 'next_token' needs a causal model, and {type(anatomy.model).__name__} is none: use distill "
                "or masked_token."
            )
        if self.objective == "masked_token" and anatomy.is_decoder:
            raise UserError(
                f"objective 'masked_token' needs a model that sees both sides, and {type(anatomy.model).__name__} is "
                "causal: use distill or next_token."
            )

    def learned_from(self, look: Survey) -> Any:
        if self.objective == "masked_token":
            table: Any = look.anatomy.model.get_input_embeddings()
            return Masking(look.mask_token, table.num_embeddings)
        return super().learned_from(look)

    def criterion(
        self, model: PreTrainedModel, teacher: PreTrainedModel | TeacherCache | Masking | None, tokens: Tensor
    ) -> tuple[Loss, nn.Module]:
        from llmslim.training.forward import run
        from llmslim.training.head import Parted
        from llmslim.training.logits import summed
        from llmslim.training.losses import coarse_divergence, divergence, labelled, next_token

        student = Parted(model, tokens)
        its = Parted(teacher, tokens) if isinstance(teacher, nn.Module) else None

        def loss(model: Any, tokens: Tensor) -> Tensor:
            if isinstance(teacher, Masking):
                asked, labels = teacher.of(tokens)
                where = labels != IGNORED
                return summed(student.logits(run(student.body, asked))[where], [labelled(labels[where])])
            logits = student.logits(run(student.body, tokens))
            if teacher is None:
                return next_token(logits, tokens)
            if isinstance(teacher, TeacherCache):
                return coarse_divergence(logits, *teacher.of(tokens), self.temperature)
            assert its is not None
            with torch.no_grad():
                targets = its.logits(run(its.body, tokens))
            return divergence(logits, targets, self.temperature)

        return loss, nn.ModuleList()
