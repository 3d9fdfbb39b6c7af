"""Train every weight of a dense model."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from llmslim.training.objective import ObjectiveStep
from llmslim.training.whole import WholeStep


class Full(WholeStep, ObjectiveStep):
    """Train all weights of a model without packed ones; pruned weights stay zero.

    AdamW takes four times the memory of the weights in float32, so this is for small models.
    """

    kind: ClassVar[str] = "full"
    verb: ClassVar[str] = "recover"

    lr: float = Field(2e-5, gt=0, description="peak learning rate of AdamW; cosine to 0 at the end")
