"""What the methods of the room are: one loss of all that a teacher shows, each part with a weight of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.errors import UserError
from llmslim.ranks import agreed
from llmslim.training.inside import Comparison, InsideFields
from llmslim.training.losses import Divergence
from llmslim.training.whole import WholeStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

    from llmslim.training.head import Parted
    from llmslim.training.logits import Part
    from llmslim.training.loop import Loss

SAMPLE = 4096  # tokens that projections are fitted to before training


class Distill(InsideFields, WholeStep):
    """A step that trains a student by its teacher's distribution over tokens, and by what is inside."""

    response: float = Field(
        1.0, ge=0, description="weight of the distribution over tokens, beside those of what is inside"
    )
    alpha: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the divergence in the response; the rest is the text's next token",
    )
    divergence: Divergence = Field(
        "forward",
        description="forward KL covers all that the teacher says; reverse what it says most; js between",
    )
    beta: float = Field(0.5, gt=0, lt=1, description="of js: near 0 like forward, near 1 like reverse")
    on_policy: float = Field(
        0.0, ge=0, le=1, description="share of the batches that the student writes itself (causal models)"
    )
    hidden: float = Field(0.0, ge=0, description="weight of the hidden states")
    attention: float = Field(0.0, ge=0, description="weight of the last attention's relations")

    @model_validator(mode="after")
    def _beta_is_of_js(self) -> Self:
        if self.divergence != "js" and self.beta != 0.5:
            raise ValueError(f"beta is for divergence js, not {self.divergence}")
        return self

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        fields = type(self).model_fields
        of_response = ("alpha", "temperature", "divergence", "on_policy")
        changed = next(filter(self.given, of_response), None)
        if not self.response and changed:
            raise ValueError(f"{changed} is about the response, whose weight is 0")
        usual = [name for name in ("hidden", "attention", "distance", "angle") if fields[name].default]
        if usual and not self.inside:
            raise ValueError(
                f"{' and '.join(usual)} are both 0, which leaves nothing inside; use method response"
            )
        if not self.response and not self.inside:
            raise ValueError(
                "the weight is 0, and so is that of all that is inside: there is nothing to learn"
            )
        self.require_batch(self.batch_size)
        if self.related > 1 and self.validation and self.processes > 1:
            raise ValueError(
                "several processes validate by one sample at a time, which distance and angle say nothing of: leave "
                "out validation, or processes"
            )
        return self

    @property
    def predicts(self) -> bool:
        return self.response > 0

    @property
    def needed(self) -> int:
        return self.related

    def survey_bytes(self, anatomy: Anatomy, window: int) -> int:
        return self.inside_bytes(anatomy, self.batch_size, window)

    def check(self, anatomy: Anatomy) -> None:
        name = type(anatomy.model).__name__
        if anatomy.head is None and self.response:
            raise UserError(
                f"response {self.response:g} weighs a distribution over tokens, and {name} gives none: set it to 0."
            )
        super().check(anatomy)
        if self.attention:
            self.heads([anatomy.blocks[-1].attention])
        if anatomy.is_decoder:
            return
        if self.alpha < 1:
            raise UserError(
                f"alpha {self.alpha:g} asks for the next token, and {name} is no causal model: leave it at 1."
            )
        if self.on_policy:
            raise UserError(
                f"on_policy {self.on_policy:g} asks for text that the student writes, and {name} is no causal "
                "model: leave it at 0."
            )

    def criterion(self, model: PreTrainedModel, teacher: Any, tokens: Tensor) -> tuple[Loss, nn.Module]:
        from llmslim.training.head import Parted

        some = tokens[: max(1, SAMPLE // tokens.shape[1])].to(model.device)
        inside = self.comparison(model, teacher, (some, some))
        pair = Parted(model, tokens), Parted(teacher, tokens)
        return self._beside(pair, inside, tokens.shape[1] // 2), inside.projections

    def _beside(self, pair: tuple[Parted, Parted], inside: Comparison, prompt: int) -> Loss:
        """The loss.

        Args:
            pair: student and teacher.
            prompt: tokens of a window behind which the student writes.
        """
        from llmslim.training.forward import sampled
        from llmslim.training.logits import summed
        from llmslim.training.losses import apart

        student, teacher = pair
        known: int = teacher.model.get_input_embeddings().num_embeddings  # type: ignore[assignment]

        def loss(model: nn.Module, tokens: Tensor) -> Tensor:
            # writing takes long: of several processes all do, or none
            may = self.on_policy > 0 and torch.is_grad_enabled()
            own = may and agreed(float(torch.rand(()))) < self.on_policy
            if own:
                tokens = sampled(model, tokens[:, :prompt], tokens.shape[1] - prompt, known)
            mine = inside.views[0].of(student.body, tokens)
            with torch.no_grad():
                its = inside.views[1].of(teacher.body, tokens)
            terms = inside.losses(mine, its, None)
            if self.response:
                # what the written tokens were drawn from
                judged = (slice(None), slice(prompt - 1, -1) if own else slice(None))
                logits, targets = student.logits(mine.output)[judged], teacher.logits(its.output)[judged]
                how = apart(targets, self.temperature, self.divergence, self.beta)
                terms.append(summed(logits, self.weighed(how, None if own else tokens)))
            return torch.stack(terms).sum()

        return loss

    def weighed(self, apart: Part, labels: Tensor | None) -> list[Part]:
        """The divergence weighed, and that of the labels."""
        from llmslim.training.losses import following, labelled

        parts = [(self.alpha, apart)]
        if self.alpha < 1 and labels is not None:
            parts.append((1 - self.alpha, labelled(following(labels))))
        return [part._replace(weight=self.response * share * part.weight) for share, part in parts]
