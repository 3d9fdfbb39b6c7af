"""Distil the teacher's distribution over tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.errors import UserError
from llmslim.training.cached import CachedStep, TeacherCache
from llmslim.training.losses import Divergence
from llmslim.training.whole import WholeStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

    from llmslim.training.loop import Loss


class Response(CachedStep, WholeStep):
    """Train a student to give the teacher's distribution over tokens, on a text or on what it writes itself.

    alpha * divergence + (1 - alpha) * next token (Hinton et al. 2015, arXiv:1503.02531). With `on_policy`, that share
    of the batches is the student's own: from the first half of each window it writes the second (sampled at
    temperature 1), and is trained there on the divergence alone, which counts alpha times as well: what it wrote is
    no label. That is GKD (Agarwal et al. 2023, arXiv:2306.13649), for causal models. Validation is on the text.
    The student trains without dropout, here and in the other methods of the room: the teacher has none.
    """

    kind: ClassVar[str] = "response"
    verb: ClassVar[str] = "distill"

    alpha: float = Field(
        1.0, gt=0, le=1, description="share of the divergence in the loss; the rest is the text's next token"
    )
    divergence: Divergence = Field(
        "forward",
        description="forward KL covers all that the teacher says; reverse what it says most; js between",
    )
    beta: float = Field(0.5, gt=0, lt=1, description="of js: near 0 like forward, near 1 like reverse")
    on_policy: float = Field(
        0.0, ge=0, le=1, description="share of the batches that the student writes itself (causal models)"
    )

    @model_validator(mode="after")
    def _beta_is_of_js(self) -> Self:
        if self.divergence != "js" and self.beta != 0.5:
            raise ValueError(f"beta is for divergence js, not {self.divergence}")
        return self

    @model_validator(mode="after")
    def _cache_is_of_a_text(self) -> Self:
        if self.cached_logits is not None and self.on_policy:
            raise ValueError(
                "cached_logits is of a text known beforehand, not of what the student writes: on_policy 0"
            )
        return self

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if anatomy.is_decoder:
            return
        name = type(anatomy.model).__name__
        if self.alpha < 1:
            raise UserError(
                f"alpha {self.alpha:g} asks for the next token, and {name} is no causal model: leave it at 1."
            )
        if self.on_policy:
            raise UserError(
                f"on_policy {self.on_policy:g} asks for text that the student writes, and {name} is no causal "
                "model: leave it at 0."
            )

    def criterion(
        self, model: PreTrainedModel, teacher: PreTrainedModel | TeacherCache | None, tokens: Tensor
    ) -> tuple[Loss, list[nn.Parameter]]:
        from llmslim.training.forward import run, sampled
        from llmslim.training.losses import coarse_divergence, divergence, next_token

        assert teacher is not None
        prompt = tokens.shape[1] // 2

        def loss(model: nn.Module, tokens: Tensor) -> Tensor:
            own = self.on_policy > 0 and torch.is_grad_enabled() and float(torch.rand(())) < self.on_policy
            if own:
                tokens = sampled(model, tokens[:, :prompt], tokens.shape[1] - prompt)
            logits = run(model, tokens).logits
            how = (self.temperature, self.divergence, self.beta)
            if isinstance(teacher, TeacherCache):
                value = self.alpha * coarse_divergence(logits, *teacher.of(tokens), *how)
            else:
                with torch.no_grad():
                    targets = run(teacher, tokens).logits
                judged = (
                    slice(prompt - 1, -1) if own else slice(None)
                )  # what the written tokens were drawn from
                value = self.alpha * divergence(logits[:, judged], targets[:, judged], *how)
            if self.alpha < 1 and not own:
                value = value + (1 - self.alpha) * next_token(logits, tokens)
            return value

        return loss, []
