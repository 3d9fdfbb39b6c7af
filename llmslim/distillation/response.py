"""Distil the teacher's distribution over tokens, and whatever else of it is weighed in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator
from torch import Tensor, nn

from llmslim.distillation._loss import Distill
from llmslim.training.cached import CachedStep, TeacherCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

    from llmslim.training.loop import Loss


class Response(CachedStep, Distill):
    """Train a student to give the teacher's distribution over tokens, on a text or on what it writes itself.

    response * (alpha * divergence + (1 - alpha) * next token) (Hinton et al. 2015, arXiv:1503.02531). With `on_policy`,
    that share of the batches is the student's own: from the first half of each window it writes the second (sampled
    at temperature 1), and is trained there on the divergence alone, which counts alpha times as well: what it wrote
    is no label. That is GKD (Agarwal et al. 2023, arXiv:2306.13649), for causal models. Validation is on the text.
    The student trains without dropout, here and in the other methods of the room: the teacher has none.

    What the models have inside adds to the loss with its own weights, none of which is set here: `features` tells what
    they are, and it and `relations` are this method with other weights.
    """

    kind: ClassVar[str] = "response"
    verb: ClassVar[str] = "distill"

    @model_validator(mode="after")
    def _cache_is_of_a_text(self) -> Self:
        if self.cached_logits is None:
            return self
        if self.on_policy:
            raise ValueError(
                "cached_logits is of a text known beforehand, not of what the student writes: on_policy 0"
            )
        if self.inside:
            raise ValueError(
                f"cached_logits spares the teacher, whose inside {self.inside[0]} compares with: leave one of them out"
            )
        return self

    def criterion(self, model: PreTrainedModel, teacher: Any, tokens: Tensor) -> tuple[Loss, nn.Module]:
        if not isinstance(teacher, TeacherCache):
            return super().criterion(model, teacher, tokens)
        from llmslim.training.forward import run
        from llmslim.training.head import Parted
        from llmslim.training.logits import summed
        from llmslim.training.losses import coarsely_apart

        student = Parted(model, tokens)

        def loss(model: nn.Module, tokens: Tensor) -> Tensor:
            logits = student.logits(run(student.body, tokens))
            how = coarsely_apart(*teacher.of(tokens), self.temperature, self.divergence, self.beta)
            return summed(logits, self.weighed(how, tokens))

        return loss, nn.ModuleList()
