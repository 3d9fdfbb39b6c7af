"""Train every weight of a dense model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.errors import UserError
from llmslim.sparse import SparseLinear
from llmslim.training.step import Finish, TrainStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full(TrainStep):
    """Train all weights of a model without packed ones; pruned weights stay zero.

    AdamW takes four times the memory of the weights in float32, so this is for small models.
    """

    kind: ClassVar[str] = "full"
    verb: ClassVar[str] = "recover"

    lr: float = Field(2e-5, gt=0, description="peak learning rate of AdamW; cosine to 0 at the end")

    @property
    def survey_copies(self) -> int:
        return super().survey_copies + 3  # gradients and the two moments

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        packed = [name for name, module in anatomy.model.named_modules() if hasattr(module, "quantized")]
        if packed:
            raise UserError(
                f"recover --method full cannot train packed weights, and {packed[0]} is one of {len(packed)}: "
                "use scales or lora."
            )

    @contextmanager
    def training(self, model: PreTrainedModel) -> Iterator[tuple[list[nn.Parameter], Finish]]:
        parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        sparse = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}

        def finish() -> dict[str, Tensor]:
            masked = {f"{name}.weight": module.weight * module.mask for name, module in sparse.items()}
            return {**parameters, **masked}

        yield list(parameters.values()), finish
