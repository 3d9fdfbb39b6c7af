"""How much a step of pruning removes: as a share, as a target that the result is to meet, and in how many rounds.

Targets and rounds are settled before the run, on the model's shapes alone: what runs are steps with a share each.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from llmslim.anatomy import Anatomy
from llmslim.anatomy.parts import is_linear
from llmslim.errors import UserError
from llmslim.lowrank import LowRankLinear
from llmslim.sparse import SparseLinear
from llmslim.step import BlockStep, Outlook, Step, build_step
from llmslim.ties import shared_modules
from llmslim.training.step import TrainStep

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from typing_extensions import Self

    from llmslim.loaders.models import ModelFiles

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class Amount(BlockStep):
    """A step that removes a share of something, which its field `amount` holds.

    With `rounds` R it runs R times, each time on what the last one left, so that what matters is estimated anew;
    after round k the share k / R of the amount is gone (`linear`), or 1 - (1 - k / R)^3 of it (`cubic`, Zhu & Gupta
    2017, arXiv:1710.01878). With `retrain` a step that trains follows each round: iterative pruning.
    """

    verb = "prune"
    amount: ClassVar[str]

    target_size: str | None = Field(
        None, description="weight files of at most this size, such as 150MB: chooses how much to remove"
    )
    rounds: int = Field(1, ge=1, le=100, description="passes to remove it in, each judging anew")
    ramp: Literal["linear", "cubic"] = Field(
        "linear", description="rounds: equal ones, or large ones first (arXiv:1710.01878)"
    )

    retrain: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        title="METHOD[:KEY=VALUE,...]",
        examples=["full:max_steps=50"],
        description="training after every round, such as full:max_steps=50 or finetune:glue=sst2; a method of "
        "recover, distill or finetune",
    )

    @field_validator("retrain")
    @classmethod
    def _trains(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for kind, fields in value.items():
            if not isinstance(build_step(kind, fields), TrainStep):
                raise ValueError(f"{kind} does not train; take full, lora, response, finetune, ...")
        if len(value) > 1:
            raise ValueError(f"{' and '.join(value)} are two trainings; one follows a round")
        return value

    @field_validator("target_size", mode="before")
    @classmethod
    def _readable(cls, value: object) -> object:
        if value is not None:
            parse_bytes(str(value))
        return value if value is None else str(value)

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if targets := self._targets():
            if self.amount in self.model_fields_set:
                raise ValueError(f"{self.amount} and {targets[0]} both say how much goes; use one")
            if len(targets) > 1:
                raise ValueError(f"{targets[0]} and {targets[1]} both say how much goes; use one")
            if self.uneven:
                raise ValueError(
                    f"{targets[0]} needs every block to lose the same; {self.uneven} settles it later"
                )
        if self.ramp != "linear" and self.rounds == 1:
            raise ValueError(f"ramp {self.ramp} is for several rounds; set rounds as well")
        return self

    def starts_from(self, files: ModelFiles) -> PreTrainedConfig | None:
        """With the head that the training between rounds needs."""
        return next((config for step in self.between() if (config := step.starts_from(files))), None)

    @property
    def uneven(self) -> str:
        """The option, if any, by which blocks lose unequally, how much being known in the run only."""
        return ""

    def amounts(self, anatomy: Anatomy) -> list[float]:
        """The amounts that differ in what they leave of a model, ascending; `check` refuses at most the last ones."""
        raise TypeError(f"{type(self).__name__} does not define amounts()")

    def parts(self, shares: list[float], outlook: Outlook) -> list[Self]:
        """The steps that together remove first `shares[0]`, then `shares[1]`, ... of the model as it is."""
        raise TypeError(f"{type(self).__name__} does not define parts()")

    def resolve(self, outlook: Outlook) -> tuple[list[Step], str]:
        targets = self._targets()
        if not targets and self.rounds == 1 and not self.retrain:
            return [self], ""
        whole = self._of(self._meeting(targets[0], outlook) if targets else self)
        shares = [whole * part for part in ramp_up(self.rounds, self.ramp)]
        steps = self.parts(shares, outlook) if self.rounds > 1 else [self.with_amount(whole)]
        after = outlook
        for one in steps:
            after = after.after(one.planned_edits(after.anatomy))
        asked = [
            f"{name} {getattr(self, name)}" for name in (*targets, "rounds") if name in self.model_fields_set
        ] or ["retrain"]
        before, between = self.before(), self.between()
        then = " and ".join(["", *(step.kind for step in between)])
        chosen = ", then ".join(f"{one.removes[1]}{then}" for one in steps)
        first = "".join(f"{step.kind}, then " for step in before)
        told = f"{self.kind} with {' and '.join(asked)}: {first}{self.removes[0]} {chosen}; leaves {_extent(after)}"
        return [*before, *(step for one in steps for step in (one, *between))], told

    def beside(self) -> list[Step]:
        return [*self.before(), *self.between()]

    def before(self) -> list[Step]:
        """What comes in front of the first round."""
        return []

    @property
    def removes(self) -> tuple[str, str]:
        """What goes, in words: the option that says so, and its value."""
        return self.amount, f"{self._of(self):g}"

    def between(self) -> list[Step]:
        """What follows each round."""
        return [build_step(kind, fields) for kind, fields in self.retrain.items()]

    def with_amount(self, amount: float) -> Self:
        """The same step, removing so much in one round."""
        settled: dict[str, Any] = {"target_params": None, "target_size": None, "rounds": 1, "ramp": "linear"}
        settled |= {"retrain": {}, "rewind": False}
        fields = {name: value for name, value in settled.items() if name in type(self).model_fields}
        return self.model_copy(update={self.amount: amount, **fields})

    def least_within(self, outlook: Outlook, size: Callable[[Outlook], float], goal: float) -> Self | None:
        """The step of the least amount after which the size is at most `goal`; None when none does it."""
        amounts = self.amounts(outlook.anatomy)

        def within(index: int) -> bool:
            step = self.with_amount(amounts[index])
            return not step.allowed(outlook.anatomy) or size(_after(step, outlook)) <= goal

        index = bisect.bisect_left(range(len(amounts)), True, key=within)
        step = self.with_amount(amounts[index]) if index < len(amounts) else None
        return step if step is not None and step.allowed(outlook.anatomy) else None

    def allowed(self, anatomy: Anatomy) -> bool:
        """Whether `check` lets the step pass."""
        try:
            self.check(anatomy)
        except UserError:
            return False
        return True

    def _of(self, step: Self) -> float:
        return float(getattr(step, self.amount))

    def _targets(self) -> list[str]:
        return [name for name in ("target_params", "target_size") if getattr(self, name, None) is not None]

    def _meeting(self, target: str, outlook: Outlook) -> Self:
        """The step that removes no more than it must to meet the target."""
        amounts = self.amounts(outlook.anatomy)
        if not amounts:
            raise UserError(
                f"{target} {getattr(self, target)}: {self.kind} can remove nothing from this model."
            )
        self.with_amount(amounts[0]).check(outlook.anatomy)
        goal, size, show = self._goal(target)
        if size(outlook) <= goal:
            raise UserError(
                f"{target} {getattr(self, target)} is met without {self.kind}: the model in front of it has "
                f"{show(size(outlook))}; leave the step out, or ask for less."
            )
        step = self.least_within(outlook, size, goal)
        if step is None:
            most = next(a for a in reversed(amounts) if self.with_amount(a).allowed(outlook.anatomy))
            least = size(_after(self.with_amount(most), outlook))
            raise UserError(
                f"{target} {getattr(self, target)} is out of reach of {self.kind}, which leaves at least "
                f"{show(least)} ({self.amount} {most:g}); ask for that, or put another step in front."
            )
        return step

    def _goal(self, target: str) -> tuple[float, Callable[[Outlook], float], Callable[[float], str]]:
        """What a target asks for, how a model measures on it, and how that is shown."""
        if target == "target_size":
            return parse_bytes(str(self.target_size)), lambda o: o.stored_bytes, lambda n: f"{n / 1e6:.6g} MB"
        return float(getattr(self, target)), lambda o: o.share, lambda share: f"{share:.4f} of the parameters"


class Share(Amount):
    """A step that removes whole units: heads, channels, experts; the model gets smaller and faster by their share."""

    amount = "ratio"

    ratio: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="share to remove: of the heads, channels, experts, blocks or hidden size",
    )
    target_params: float | None = Field(
        None, gt=0, lt=1, description="share of the model's parameters that stays: chooses the ratio"
    )

    def amounts(self, anatomy: Anatomy) -> list[float]:
        """Subclasses know exactly which ratios differ; these are all hundredths that `check` allows."""
        ratios = [count / 100 for count in range(1, 100)]
        return [ratio for ratio in ratios if self.with_amount(ratio).allowed(anatomy)]

    def parts(self, shares: list[float], outlook: Outlook) -> list[Self]:
        """Each step takes from what is left as much as brings it to where one step from the start would be."""
        steps: list[Self] = []
        now = outlook
        for number, share in enumerate(shares, 1):
            whole = self.with_amount(share)
            goal = _after(whole, outlook) if whole.allowed(outlook.anatomy) else None
            step = None
            if goal is not None and goal.parameters < now.parameters:
                step = self.least_within(now, lambda o: o.parameters, goal.parameters)
            if step is None:
                raise UserError(
                    f"rounds {self.rounds} are too many for {self.kind} with ratio {shares[-1]:g}: round {number} "
                    f"comes to ratio {share:.3g}, which is no further unit of this model; use fewer rounds."
                )
            steps.append(step)
            now = _after(step, now)
        if _shapes(now) != _shapes(_after(self.with_amount(shares[-1]), outlook)):
            raise UserError(
                f"rounds {self.rounds} of {self.kind} do not end at the sizes that ratio {shares[-1]:g} leaves in one, "
                "since blocks of this model differ; use another number of rounds."
            )
        return steps

    def check_dense(self, anatomy: Anatomy) -> None:
        """Refuse a model whose weights cannot be cut."""
        check_dense(anatomy, self.kind)


def check_dense(anatomy: Anatomy, kind: str) -> None:
    """Refuse a model whose weights cannot be cut: packed, factored, sparse, or shared between blocks."""
    check_unshared(anatomy, kind)
    for block in anatomy.blocks:
        for module in block.module.modules():
            if isinstance(module, LowRankLinear):
                raise UserError(f"{block.name} is factored already: prune {kind} first, then factorize.")
            if hasattr(module, "in_features") and not is_linear(module):
                raise UserError(f"{block.name} is quantized already: prune before you quantize.")
            if isinstance(module, SparseLinear):
                raise UserError(
                    f"{block.name} has pruned single weights, whose mask cannot be cut: prune {kind} first, "
                    "then single weights."
                )


def check_unshared(anatomy: Anatomy, kind: str) -> None:
    """Refuse a model whose blocks share weights: what one block can spare, another one may need."""
    if shared := shared_modules(anatomy.model):
        name, source = next(iter(shared.items()))
        raise UserError(f"{name} shares the weight of {source}: prune by {kind} first, then share.")


def ramp_up(rounds: int, ramp: str) -> list[float]:
    """The part of the whole amount that is gone after each round; 1 after the last."""
    times = [number / rounds for number in range(1, rounds + 1)]
    return times if ramp == "linear" else [1 - (1 - time) ** 3 for time in times]


def to_nearest(ratio: float, size: int) -> int:
    """How many of `size` units a ratio removes: to nearest, halves up."""
    return math.floor(ratio * size + 0.5)


def parse_bytes(text: str) -> int:
    """150000000 from '150MB'; KB, MB and GB are powers of 1000.

    Raises:
        ValueError: it is no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]B)", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError("give a number with KB, MB or GB, such as 150MB")
    return round(float(found[1]) * _UNITS[found[2].upper()])


def _after(step: Step, outlook: Outlook) -> Outlook:
    return outlook.after(step.planned_edits(outlook.anatomy))


def _shapes(outlook: Outlook) -> list[tuple[int, ...]]:
    return sorted(tuple(parameter.shape) for parameter in outlook.anatomy.model.parameters())


def _extent(outlook: Outlook) -> str:
    return f"{outlook.share:.4f} of the parameters, {outlook.stored_bytes / 1e6:.6g} MB"
