"""What methods that look inside the models share: the response loss beside their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.errors import UserError
from llmslim.training.whole import WholeStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmslim.training.loop import Loss


class BesideResponse(WholeStep):
    """A step whose loss is of what modules inside give, with the divergence of the distributions beside."""

    response: float = Field(
        1.0, ge=0, description="weight of the divergence from the teacher's distribution over tokens, beside"
    )

    @property
    def predicts(self) -> bool:
        return self.response > 0

    def check(self, anatomy: Anatomy) -> None:
        if anatomy.head is None and self.response:
            raise UserError(
                f"response {self.response:g} weighs a distribution over tokens, and {type(anatomy.model).__name__} "
                "gives none: set it to 0."
            )
        super().check(anatomy)

    def beside(
        self,
        teacher: PreTrainedModel,
        modules: tuple[Sequence[nn.Module], Sequence[nn.Module]],
        inside: Callable[[list[Tensor], list[Tensor]], Tensor],
    ) -> Loss:
        """The loss of what modules (of the student, of the teacher) give, plus the weighted divergence."""
        from llmslim.training.forward import observe
        from llmslim.training.losses import divergence

        def loss(model: nn.Module, tokens: Tensor) -> Tensor:
            output, found = observe(model, tokens, modules[0])
            with torch.no_grad():
                target, wanted = observe(teacher, tokens, modules[1])
            value = inside(found, wanted)
            if self.response:
                value = value + self.response * divergence(output.logits, target.logits, self.temperature)
            return value

        return loss
