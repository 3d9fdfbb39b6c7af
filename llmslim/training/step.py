"""TrainStep: a method that trains the whole model, written back block by block like every other step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy, Block, Experts
from llmslim.errors import UserError
from llmslim.history import TRAINING
from llmslim.ranks import first, first_alone
from llmslim.step import BlockStep, StepRecord, Survey
from llmslim.training.logits import tokens_at_once

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from typing_extensions import Self

    from llmslim.calibration.stream import BlockStream
    from llmslim.loaders.models import ModelFiles
    from llmslim.training.batches import Examples
    from llmslim.training.loop import Judge, Loss

Finish = Callable[[], dict[str, Tensor]]
"""What training leaves: name of a parameter in the checkpoint -> its value."""


CHECKPOINTS = "trainer"
"""Folder of the checkpoints that training goes on from, in what a step has to itself of the work folder."""


def held_out(windows: int, share: float) -> int:
    """How many windows are kept from training, for validation."""
    return math.ceil(windows * share)


class PlacingStep(BlockStep):
    """A step whose survey finds values of parameters, by name; its pass puts them in the place of what was there."""

    takes: ClassVar[str] = "learns from"
    """What it does with another model, in words."""

    @abstractmethod
    def of_itself(self, spec: str) -> str:
        """What to say when that is the model itself."""

    def check_pair(self, front: Anatomy, other: Anatomy) -> None:
        """Refuse another model that the step cannot take from, by their shapes; on meta."""

    @property
    def needs_survey(self) -> bool:
        return True

    @property
    def keeps_other(self) -> bool:
        """Whether the other model is in memory with this one, not before it; for the plan."""
        return True

    def asked(self, tokens: int, window: int) -> float:
        """Tokens that pass the other model, of a text of so many in windows of that length; for the plan."""
        return 0.0

    def placed(self, anatomy: Anatomy) -> int:
        """How many values the survey finds, float32; for the plan."""
        return sum(parameter.numel() for parameter in anatomy.model.parameters())

    def disk_bytes(self, anatomy: Anatomy, tokens: int) -> int:
        return 4 * self.placed(anatomy)

    @property
    def streams_calibration(self) -> bool:
        return False  # the whole model has seen the text when the pass begins

    def compress_outer(self, stream: BlockStream, record: StepRecord) -> None:
        stacks = tuple(f"{stack.name}." for stack in stream.anatomy.stacks)
        _place(stream.model, {n: t for n, t in record.survey.items() if not n.startswith(stacks)})

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        own = {n: t for n, t in record.survey.items() if n.startswith(f"{block.name}.")}
        _place(stream.model, own)


class TrainStep(PlacingStep):
    """A step that trains. Its survey is the training; its pass puts the results in the place of what was there."""

    without_teacher: ClassVar[str] = ""
    """What a step can do instead when there is no teacher, for messages: ', or ...'."""

    validating: ClassVar[str] = "--validation SHARE"
    """The options that validate, for messages."""

    teacher: str = Field(
        "",
        description="model to distill from; when not given the uncompressed one, as reports of what it became tell",
    )
    temperature: float = Field(1.0, gt=0, description="divides the logits of both sides when distilling")
    lr: float = Field(1e-4, gt=0, description="peak learning rate of AdamW; cosine to 0 at the end")
    epochs: float = Field(1.0, gt=0, le=1e9, description="passes over the calibration windows")
    max_steps: int | None = Field(None, ge=1, le=10**9, description="optimizer steps; instead of epochs")
    max_minutes: float | None = Field(None, gt=0, description="stop training after so long")
    batch_size: int = Field(4, ge=1, description="windows that are held in memory at once")
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="batches per optimizer step, whose gradients add up: of a large batch's memory a part",
    )
    processes: int = Field(
        1,
        ge=1,
        description="processes that train together, with batch_size windows each: on a GPU each, or a share of the CPU",
    )
    shard: bool = Field(
        False,
        description="each of the processes holds a share of gradients, optimizer states and weights (FSDP)",
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of a running mean of the weights, 0.99 say, which is validated and kept in their place",
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which lr rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    save_steps: int = Field(50, ge=1, description="optimizer steps between checkpoints to resume from")
    validation: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the windows held out; what does best on it is kept, be it the start",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many validations without gain; they come with checkpoints and epochs",
    )

    @model_validator(mode="after")
    def _patience_validates(self) -> Self:
        if self.patience is not None and not self.validates:
            raise ValueError(f"patience counts validations, and without {self.validating} there are none")
        return self

    @model_validator(mode="after")
    def _shares_among_several(self) -> Self:
        if self.shard and self.processes == 1:
            raise ValueError(
                "shard shares a model among several processes, and there is 1: give processes, too"
            )
        return self

    @property
    def validates(self) -> bool:
        """Whether what does best on other data than it learns from is kept."""
        return bool(self.validation)

    def held(self, examples: int) -> int:
        """How many of so many examples, the last ones, are for validation."""
        return held_out(examples, self.validation)

    @property
    def needs_calibration(self) -> bool:
        return True

    @property
    def survey_processes(self) -> int:
        return self.processes

    @property
    def survey_copies(self) -> float:
        return 2

    def disk_bytes(self, anatomy: Anatomy, tokens: int) -> int:
        """Trainer keeps two checkpoints, of weights, means and both moments, and writes a third before one goes.

        With validation there is what it began with, besides.
        """
        own = 4 * (1 + bool(self.ema))
        checkpoints = 3 * (own + 8) + own * self.validates
        return super().disk_bytes(anatomy, tokens) + checkpoints * self.placed(anatomy)

    def survey_work(self, tokens: int, window: int) -> float:
        return 6.0 * self._trained(tokens, window)

    def asked(self, tokens: int, window: int) -> float:
        return self._trained(tokens, window) if self.keeps_other else float(tokens)

    @property
    def batch(self) -> int:
        """Windows, or examples, of an optimizer step: of all its batches in all processes."""
        return self.batch_size * self.gradient_accumulation_steps * self.processes

    def _trained(self, tokens: int, window: int) -> float:
        """Tokens that are trained on, of a text of so many."""
        return self.max_steps * self.batch * window if self.max_steps else self.epochs * tokens

    def survey_span(self, window: int) -> int:
        return self.batch_size * window

    def survey_predicted(self, vocabulary: int, window: int) -> int:
        return min(self.survey_span(window), tokens_at_once(vocabulary)) if self.predicts else 0

    @property
    def survey_limit(self) -> float:
        return float("inf") if self.max_minutes is None else 60 * self.max_minutes

    @property
    def distills(self) -> bool:
        """Whether the step learns from a teacher."""
        return True

    @property
    def keeps_other(self) -> bool:
        return self.distills

    def other(self, base: ModelFiles) -> ModelFiles | None:
        from llmslim.lineage import uncompressed
        from llmslim.loaders.models import find  # brings transformers, which help must not wait for

        if not self.distills:
            return None
        return find(self.teacher) if self.teacher else uncompressed(base, self.without_teacher)

    @property
    def by_token(self) -> bool:
        """Whether student and teacher are compared token by token, so that both must have the same."""
        return True

    @property
    def otherwise(self) -> str:
        """How the step could learn from a teacher with other tokens, for messages: ', unless ...'."""
        return ""

    def of_itself(self, spec: str) -> str:
        return (
            f"{spec} would be distilled from itself: name the uncompressed model with --teacher"
            f"{self.without_teacher}."
        )

    @property
    def dropout_trains(self) -> bool:
        """Whether the model drops out while it trains, as its config says: not beside a teacher, which has none."""
        return not self.distills

    @property
    def predicts(self) -> bool:
        """Whether the loss looks at the distribution over tokens."""
        return True

    @abstractmethod
    def criterion(self, model: PreTrainedModel, teacher: Any, data: Any) -> tuple[Loss, nn.Module]:
        """What training lowers, and what belongs to it: trained with the model, then thrown away.

        Args:
            teacher: what `learned_from` gave.
            data: what training will take: the windows, int64 [windows, seq], or what else `examples` gives.
        """

    def judge(self, model: PreTrainedModel, data: Any) -> Judge | None:
        """What validation keeps the best by; the loss when None.

        Args:
            data: as of `criterion`.
        """
        return None

    @property
    def needed(self) -> int:
        """Windows that there must be to train on."""
        return 1

    def examples(self, look: Survey, model: PreTrainedModel, teacher: Any) -> Tensor | Examples:
        """What the step trains on: the calibration windows, int64 [windows, seq].

        Args:
            teacher: what `learned_from` gave.
        """
        return look.tokens

    def products(self, dtype: torch.dtype) -> torch.dtype:
        """The type that matrix products are computed in, in a run of that type; weights and updates are float32."""
        return dtype

    def check_text(self, windows: int) -> None:
        """Refuse a text of so few windows that nothing is learned from it."""
        left = windows - self.held(windows)
        needed = max(self.needed, self.batch_size * (self.processes - 1) + 1)  # something for each process
        if left < needed:
            raise UserError(
                f"validation {self.validation:g} holds out {windows - left} of {windows} windows, and {left} are too "
                f"few to train on: raise --num-samples, or lower it ({needed} are needed)."
                if self.validation
                else f"{self.kind} needs {needed} windows or more to train on, and the text gives {windows}: "
                "raise --num-samples."
            )
        if self.validation and windows - left < self.needed:
            raise UserError(
                f"validation {self.validation:g} holds out {windows - left} of {windows} windows, and {self.kind} "
                f"compares {self.needed} with each other: raise it, or --num-samples."
            )

    def check_teacher(self, config: PreTrainedConfig, spec: str) -> None:
        """Refuse a teacher, of that spec, that the step cannot learn from; by its config."""

    @abstractmethod
    def training(self, model: PreTrainedModel) -> AbstractContextManager[tuple[list[nn.Parameter], Finish]]:
        """Bring a loaded float32 model into the shape in which it trains.

        Yields:
            The parameters to train, float32, and what makes the checkpoint's tensors of the trained model.
        """

    def check(self, anatomy: Anatomy) -> None:
        model = anatomy.model
        for block in anatomy.blocks if self.shard else ():
            if isinstance(block.mlp, Experts) and block.mlp.gate_up is None:
                raise UserError(
                    f"shard averages the gradients of a block together, and of {block.name}'s experts, which lie in "
                    "Linears of their own, each process uses others: leave it out, and processes hold all of the model."
                )
        if (anatomy.head is None and self.predicts) or model.config.is_encoder_decoder:
            raise UserError(
                f"{self.kind} trains models that predict tokens from one text (causal or masked), and "
                f"{type(model).__name__} does not; finetune trains classifiers."
            )

    def learned_from(self, look: Survey) -> Any:
        """The teacher, frozen, or what stands for it; None for a step that learns from none."""
        return look.other(self) if self.distills else None

    def survey(self, look: Survey) -> dict[str, Tensor]:
        from llmslim.training.loop import train
        from llmslim.training.watch import Schedule

        with first_alone():  # what is written of a teacher is written once
            teacher = self.learned_from(look)
        torch.manual_seed(look.seed)  # of adapters' first weights
        model = look.loaded()
        blocks = [block.module for block in Anatomy(model).blocks] if self.shard else None
        fields = {
            name: getattr(self, name)
            for name in Schedule.__dataclass_fields__
            if name not in ("name", "seed", "dtype", "held")
        }
        data = self.examples(look, model, teacher)
        dtype, held = self.products(look.dtype), self.held(len(data))
        schedule = Schedule(name=self.kind, seed=look.seed, dtype=dtype, held=held, **fields)
        with self.training(model) as (trained, finish):
            loss, beside = self.criterion(model, teacher, data)
            gained = train(
                model, trained, beside, data, loss, schedule, look.scratch,
                look.scratch.parent / TRAINING,
                lambda done, total, note: look.progress(self.kind, done, total, note), self.dropout_trains,
                self.judge(model, data), blocks,
            )  # fmt: skip
            if not gained:
                look.note(
                    self.kind, "training changed nothing: no validation did better than the one at the start"
                )
            if not first():
                return {}
            with torch.no_grad():
                return {name: tensor.detach().cpu().clone() for name, tensor in finish().items()}


@torch.no_grad()
def _place(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        model.get_parameter(name).copy_(tensor)
