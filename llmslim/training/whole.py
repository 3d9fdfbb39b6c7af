"""A step that trains every weight of a dense model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.anatomy.parts import is_packed
from llmslim.errors import UserError
from llmslim.sparse import SparseLinear
from llmslim.training.step import Finish, TrainStep

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def drops_out(model: PreTrainedModel) -> bool:
    """Whether anything of the model is dropped out in training."""
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    return any(rates) or bool(getattr(model.config, "attention_dropout", 0.0))


class WholeStep(TrainStep):
    """A `TrainStep` of all weights; packed ones are refused, pruned ones stay zero."""

    of_packed: ClassVar[str] = "use recover --method scales or lora"
    """What to do with packed weights instead, for messages."""

    @property
    def survey_copies(self) -> float:
        own = 3 + bool(self.ema)  # gradients, the two moments and the means
        if self.shard:
            return super().survey_copies + own / self.processes
        apart = self.processes > 1  # gradients are averaged in memory of their own
        return super().survey_copies + own + apart

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        packed = [name for name, module in anatomy.model.named_modules() if is_packed(module)]
        if packed:
            raise UserError(
                f"{self.verb} --method {self.kind} cannot train packed weights, and {packed[0]} is one of "
                f"{len(packed)}: {self.of_packed}."
            )

    @contextmanager
    def training(self, model: PreTrainedModel) -> Iterator[tuple[list[nn.Parameter], Finish]]:
        parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
        sparse = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}

        def finish() -> dict[str, Tensor]:
            masked = {f"{name}.weight": module.weight * module.mask for name, module in sparse.items()}
            return {**parameters, **masked}

        yield list(parameters.values()), finish
