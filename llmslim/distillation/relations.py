"""Distil how samples lie to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.distillation._beside import BesideResponse

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

    from llmslim.training.loop import Loss


class Relations(BesideResponse):
    """Train a student to set the windows of a batch in the same distances and angles to each other.

    RKD (Park et al. 2019, arXiv:1904.05068) on the means over a window of the last hidden states, behind the final
    norm: made for embeddings of texts, so for encoders above all. Widths may differ, nothing is projected. The last
    batch of an epoch gives no angle with less than three windows, and no distance with one.
    """

    kind: ClassVar[str] = "relations"
    verb: ClassVar[str] = "distill"

    distance: float = Field(25.0, ge=0, description="weight of the distances between windows")
    angle: float = Field(50.0, ge=0, description="weight of the angles between three windows")

    @property
    def needed(self) -> int:
        """Windows that make one relation of each kind."""
        return 3 if self.angle else 2

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if not self.distance and not self.angle:
            raise ValueError("distance and angle are both 0, which leaves no relation; use method response")
        if self.batch_size < self.needed:
            raise ValueError(f"a batch_size of {self.batch_size} makes no such relation; {self.needed} does")
        return self

    def criterion(
        self, model: PreTrainedModel, teacher: PreTrainedModel | None, tokens: Tensor
    ) -> tuple[Loss, list[nn.Parameter]]:
        from llmslim.training.losses import angles, distances

        assert teacher is not None

        def inside(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
            mine, its = (states[0].float().mean(1) for states in (found, wanted))
            value = mine.new_zeros(())
            if self.distance:
                value = value + self.distance * distances(mine, its)
            if self.angle:
                value = value + self.angle * angles(mine, its)
            return value

        return self.beside(teacher, ([_last(model)], [_last(teacher)]), inside), []


def _last(model: PreTrainedModel) -> nn.Module:
    """The module that gives the last hidden states."""
    anatomy = Anatomy(model)
    return anatomy.final_norm[1] if anatomy.final_norm else anatomy.blocks[-1].module
