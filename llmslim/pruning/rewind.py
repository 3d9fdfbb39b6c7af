"""Put the weights that pruning left back to those of an earlier model."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor, nn

from llmslim.anatomy import Anatomy, Block
from llmslim.anatomy.parts import dense_weight, is_packed
from llmslim.errors import UserError
from llmslim.sparse import SparseLinear
from llmslim.step import StepRecord, Survey
from llmslim.training.step import PlacingStep

if TYPE_CHECKING:
    from llmslim.calibration.stream import BlockStream
    from llmslim.loaders.models import ModelFiles


class Rewind(PlacingStep):
    """Put all weights back to those of an earlier model; pruned ones stay zero: a lottery ticket to train again.

    What stays after training and pruning by magnitude trains, from its first weights, to the accuracy of the whole
    (Frankle & Carbin 2018, arXiv:1803.03635); in pretrained models from the pretrained ones (Chen et al. 2020,
    arXiv:2007.12223). `--rewind` with `--retrain` of the pruning methods does that: it trains, then in each round
    prunes, puts back and trains again. The earlier model is loaded whole.
    """

    kind: ClassVar[str] = "rewind"
    verb: ClassVar[str] = "prune"
    takes: ClassVar[str] = "goes back to"

    source: str = Field("", description="the earlier model; the one that the run starts from when not given")

    @property
    def keeps_other(self) -> bool:
        return False  # it is all that there is

    def survey_work(self, tokens: int, window: int) -> float:
        return 0.0

    def other(self, base: ModelFiles) -> ModelFiles:
        from llmslim.loaders.models import find  # brings transformers, which help must not wait for

        return find(self.source) if self.source else base

    def of_itself(self, spec: str) -> str:
        return f"rewind would put {spec} back to itself: name the earlier model with --source."

    def check_pair(self, front: Anatomy, other: Anatomy) -> None:
        earlier = _weights(other.model, front.model)
        for name, parameter in front.model.named_parameters():
            if name not in earlier or earlier[name].shape != parameter.shape:
                has = list(earlier[name].shape) if name in earlier else "no such weight"
                raise UserError(
                    f"rewind: {name} has the shape {list(parameter.shape)}, and in the earlier model it is {has}: only "
                    "models of the same shape are put back."
                )

    def check(self, anatomy: Anatomy) -> None:
        packed = next((name for name, module in anatomy.model.named_modules() if is_packed(module)), None)
        if packed:
            raise UserError(
                f"{packed} is packed, and what is packed cannot be put back: rewind before quantizing."
            )

    def survey(self, look: Survey) -> dict[str, Tensor]:
        earlier = _weights(look.other(self, exact=True), look.anatomy.model)
        return {name: earlier[name] for name, _ in look.anatomy.model.named_parameters()}

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        super().compress_block(block, stream, reference, record)
        for module in block.module.modules():
            if isinstance(module, SparseLinear):
                module.weight.data.mul_(module.mask)


def _weights(earlier: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the earlier model by name, turned as those of the other: a `SparseLinear` is [out, in]."""
    found: dict[str, Tensor] = dict(earlier.named_parameters())
    there = dict(earlier.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear) and name in there:
            found[f"{name}.weight"] = dense_weight(there[name])
    return found
