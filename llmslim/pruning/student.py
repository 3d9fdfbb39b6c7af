"""A smaller model from a larger one, to be taught by it: fewer blocks, and narrower ones."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from llmslim.anatomy import Anatomy, Experts
from llmslim.errors import UserError
from llmslim.pruning.amount import Amount, to_nearest
from llmslim.pruning.edits import NarrowAttention
from llmslim.pruning.heads import PruneHeads
from llmslim.pruning.kv_groups import KVGroups
from llmslim.pruning.layers import PruneLayers
from llmslim.pruning.mlp import PruneMLP
from llmslim.step import Outlook, Step

if TYPE_CHECKING:
    from typing_extensions import Self

DEPTH, WIDTH = 1.2, 1.1**2
"""EfficientNet's coefficients. Its width enters the weights twice; an inner width enters once, so it is squared."""

BLOCK_OVERHEAD = 1.5e6
"""What calling a block costs per token, in weights read: 1.2M in float32 and 2.5M in bfloat16 on one CPU core (AMD
EPYC, blocks of SmolLM2's width)."""

_NOTCHES, _SMALLEST = 20, 400  # steps of 1/20 of the compound exponent, down to 1.2^-20 = 2.6% of the depth
_SIZES = ("layers", "channels", "heads", "kv_heads")
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}


class Student(Step):
    """Build a student: fewer blocks, narrower MLPs and attention, by sizes or scaled as a whole to a target.

    Weights are inherited: what stays is chosen and refitted as `layers`, `heads`, `mlp` and `kv_groups` do it, which
    run in this step's place. `distill` and `finetune` take it in front (`--student-layers 6` there): the teacher of
    `distill` is the model that it is made from, that of `finetune` the classifier that `--teacher` names. The hidden
    size stays; `width` changes it.

    A target scales depth and inner width together, by one exponent: 1.2^-n of the blocks stay and 1.1^-2n of the
    channels and heads (compound scaling, Tan & Le 2019, arXiv:1905.11946), n the least that meets it. Heads go in
    whole units, at most as many. `latency` counts the weights that a token reads (blocks, of experts those that a
    token takes, and head), as decoding waits for memory, and 1.5M more for each block, which measuring gave for
    calling it on a CPU (of 0.7 and 0.5 asked of SmolLM2, 0.68 and 0.46 were measured on one core); the report has the
    speed measured.

    `uniform` keeps blocks at even distances, the first and the last among them, as DistilBERT and TinyBERT do.
    """

    kind: ClassVar[str] = "student"
    verb: ClassVar[str] = "prune"

    layers: int | None = Field(None, ge=1, description="blocks that stay, of each stack")
    which: Literal["uniform", "influence", "angular", "perplexity", "random"] = Field(
        "uniform", description="blocks that stay: evenly spaced ones, or by a criterion of method layers"
    )
    channels: int | None = Field(
        None, ge=1, description="MLP channels that stay, of each expert in a mixture"
    )
    heads: int | None = Field(None, ge=1, description="query heads that stay")
    kv_heads: int | None = Field(
        None, ge=1, description="KV heads that stay, a divisor of how many there are: pooled by means"
    )
    params: float | str | None = Field(
        None, description="parameters to scale to: 60M, or a share such as 0.5; 0.5 if no size is given"
    )
    latency: float | None = Field(
        None, gt=0, lt=1, description="share of the time per token to scale to, by what a token reads"
    )

    @field_validator("params")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if value is not None:
            parse_parameters(value)
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        sizes = [name for name in _SIZES if getattr(self, name) is not None]
        targets = [name for name in ("params", "latency") if getattr(self, name) is not None]
        if len(targets) > 1 or (targets and sizes):
            raise ValueError(f"{targets[0]} and {[*targets, *sizes][1]} both say how small it is; use one")
        if self.given("which") and sizes and self.layers is None:
            raise ValueError(
                f"which {self.which} chooses blocks, and without layers all stay: give layers too"
            )
        return self

    @property
    def needs_calibration(self) -> bool:
        return True

    def resolve(self, outlook: Outlook) -> tuple[list[Step], str]:
        if any(getattr(self, name) is not None for name in _SIZES):
            steps = self._sized(outlook)
        else:
            steps = self._scaled(outlook)
        after = _after(steps, outlook)
        what = f"leaves {after.parameters / 1e6:.4g}M of {outlook.parameters / 1e6:.4g}M parameters"
        share = token_cost(after.anatomy) / token_cost(outlook.anatomy)
        return (
            steps,
            f"student of {_extent(after.anatomy)}; {what}, {share:.2f} of the time per token by its reads",
        )

    # --- by sizes ---

    def _sized(self, outlook: Outlook) -> list[Step]:
        steps: list[Step] = []
        makers: dict[str, Callable[[Anatomy], Step]] = {
            "layers": self._of_layers,
            "heads": self._of_heads,
            "kv_heads": lambda anatomy: KVGroups(kv_heads=self.kv_heads),
            "channels": self._of_channels,
        }
        for name, make in makers.items():
            if getattr(self, name) is not None:
                steps.append(make(outlook.anatomy))
                outlook = _after(steps[-1:], outlook)
        return steps

    def _of_layers(self, anatomy: Anatomy) -> Step:
        wanted = self.layers or 0
        for stack in anatomy.stacks:
            if wanted >= len(stack.blocks):
                raise UserError(
                    f"layers {wanted} makes no smaller student: {stack.name} has {len(stack.blocks)} blocks; give less."
                )
        if self.which != "uniform" and len({len(stack.blocks) for stack in anatomy.stacks}) > 1:
            raise UserError(f"The stacks differ in depth, and which {self.which} takes a share: use uniform.")
        return self._fewer(anatomy, lambda count: wanted)

    def _of_channels(self, anatomy: Anatomy) -> Step:
        widths = {block.mlp.width for block in anatomy.blocks if block.mlp is not None}
        if len(widths) != 1:
            raise UserError(
                f"channels needs MLPs of one width, and this model has {sorted(widths) or 'none'}."
            )
        (width,) = widths
        if (self.channels or 0) >= width:
            raise UserError(
                f"channels {self.channels} makes no smaller student: MLPs have {width}; give less."
            )
        return PruneMLP(ratio=1 - (self.channels or 0) / width, multiple_of=1)

    def _of_heads(self, anatomy: Anatomy) -> Step:
        leaves = {}
        for ratio in PruneHeads().amounts(anatomy):
            step = PruneHeads(ratio=ratio)
            left = {edit.heads for edit in step.planned_edits(anatomy) if isinstance(edit, NarrowAttention)}
            leaves[left.pop() if len(left) == 1 else None] = step
        if self.heads not in leaves:
            there = anatomy.blocks[0].attention
            possible = ", ".join(str(count) for count in sorted(filter(None, leaves))) or "none"
            raise UserError(
                f"heads {self.heads} cannot be what stays of {there.num_heads} query heads that read "
                f"{there.num_kv_heads} KV heads: groups stay whole, or lose equally many; possible: {possible}."
            )
        return leaves[self.heads]

    def _fewer(self, anatomy: Anatomy, stay: Callable[[int], int]) -> PruneLayers:
        """Of a stack of so many blocks, `stay` of that stay."""
        if self.which != "uniform":
            count = len(anatomy.stacks[0].blocks)
            return PruneLayers(ratio=1 - stay(count) / count, criterion=self.which)
        drop: list[int] = []
        start = 0
        for stack in anatomy.stacks:
            count = len(stack.blocks)
            kept = evenly(count, stay(count))
            drop += [start + index for index in range(count) if index not in kept]
            start += count
        return PruneLayers(drop=tuple(drop))

    # --- to a target ---

    def _scaled(self, outlook: Outlook) -> list[Step]:
        """The steps of the least exponent that meets the target."""
        if self.latency is not None:
            asked, start = f"latency {self.latency:g}", token_cost(outlook.anatomy)
            goal, size = self.latency * start, lambda look: token_cost(look.anatomy)
            show = lambda value: f"{value / start:.3g}"  # noqa: E731
        else:
            params = 0.5 if self.params is None else self.params
            asked, goal = f"params {params}", parse_parameters(params)
            goal, size = goal * outlook.parameters if goal < 1 else goal, lambda look: look.parameters
            show = lambda value: f"{value / 1e6:.4g}M"  # noqa: E731
        if size(outlook) <= goal:
            raise UserError(
                f"{asked} is met by the model as it is, which has {show(size(outlook))}: give less."
            )

        def met(notch: int) -> bool:
            return size(_after(self._at(notch, outlook), outlook)) <= goal

        notch = bisect.bisect_left(range(_SMALLEST), True, key=met)
        if notch == _SMALLEST:
            least = show(size(_after(self._at(notch, outlook), outlook)))
            raise UserError(
                f"{asked} is out of reach of a student with this model's hidden size and vocabulary, which has at "
                f"least {least}; ask for that, or make the model narrower by `prune --method width` first."
            )
        return self._at(notch, outlook)

    def _at(self, notch: int, outlook: Outlook) -> list[Step]:
        """The steps for an exponent of so many notches; none where it changes nothing."""
        anatomy = outlook.anatomy
        depth, width = DEPTH ** (-notch / _NOTCHES), WIDTH ** (-notch / _NOTCHES)
        steps: list[Step] = []
        if any(_stay(depth, len(stack.blocks)) < len(stack.blocks) for stack in anatomy.stacks):
            steps.append(self._fewer(anatomy, lambda count: _stay(depth, count)))
        steps += [step for one in (PruneHeads(), PruneMLP()) if (step := _at_most(one, 1 - width, anatomy))]
        return steps


def evenly(count: int, stay: int) -> list[int]:
    """Indices of `stay` of `count` blocks at even distances, from the first to the last; a single one is the first."""
    return [round(index * (count - 1) / max(1, stay - 1)) for index in range(stay)]


def token_cost(anatomy: Anatomy) -> float:
    """The weights that one token reads in blocks and head, and `BLOCK_OVERHEAD` for each block."""
    total = 0.0
    for block in anatomy.blocks:
        own = float(sum(parameter.numel() for parameter in block.module.parameters()))
        mlp = block.mlp
        if isinstance(mlp, Experts):
            idle = 1 - min(1, mlp.top_k / mlp.num_experts)
            own -= idle * sum(parameter.numel() for parameter in mlp.module.parameters())
        total += own + BLOCK_OVERHEAD
    head = None if anatomy.head is None else anatomy.head[1]
    return total + (0 if head is None else sum(parameter.numel() for parameter in head.parameters()))


def parse_parameters(value: float | str) -> float:
    """60e6 from '60M'; a share below 1 stays what it is.

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(r"(\d*\.?\d+)([KMB]?)", str(value).strip(), re.IGNORECASE)
    number = float(found[1]) * _UNITS.get(found[2].upper(), 1) if found else 0.0
    if not 0 < number < 1 and number < 1000:
        raise ValueError("give parameters such as 60M, or a share of them such as 0.5")
    return number


def _stay(depth: float, count: int) -> int:
    return max(1, to_nearest(depth, count))


def _at_most(step: Amount, share: float, anatomy: Anatomy) -> Amount | None:
    """The step that removes most of what is no more than that share."""
    fitting = [amount for amount in step.amounts(anatomy) if amount <= share + 1e-9]
    return step.with_amount(fitting[-1]) if fitting else None


def _after(steps: list[Step], outlook: Outlook) -> Outlook:
    for step in steps:
        step.check(outlook.anatomy)
        outlook = outlook.after(step.planned_edits(outlook.anatomy))
    return outlook


def _extent(anatomy: Anatomy) -> str:
    """Depth and widths in words."""
    block = anatomy.blocks[0]
    depth = " + ".join(str(len(stack.blocks)) for stack in anatomy.stacks)
    attention, mlp = block.attention, block.mlp
    heads = f"{attention.num_heads} heads ({attention.num_kv_heads} KV)"
    return f"{depth} blocks, {heads}" + (f", {mlp.width} channels" if mlp is not None else "")
