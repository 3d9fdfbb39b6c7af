"""Share the weights of blocks, fitted to all that use them, with a low-rank correction for each."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy, Block
from llmslim.anatomy.match import nearest
from llmslim.anatomy.parts import dense_weight
from llmslim.calibration.factor import rising_cholesky, root_of
from llmslim.calibration.statistics import (
    InputStats,
    check_inputs,
    output_error,
    output_power,
    with_stats,
)
from llmslim.edit import Edit
from llmslim.errors import UserError
from llmslim.linear_step import LinearStep
from llmslim.lowrank import LowRankLinear, decompose, empty_linear
from llmslim.sharing.edits import ShareLinear
from llmslim.sharing.groups import Groups, cheapest, cyclic, sequential
from llmslim.sparse import SparseLinear
from llmslim.step import StepRecord, Survey
from llmslim.ties import share, shared_modules

if TYPE_CHECKING:
    from llmslim.calibration.stream import BlockStream

_OWNERS, _WEIGHT = "owners of ", "weight of "  # how names begin under which a survey keeps what it settled


class Moment(NamedTuple):
    """What a fit of shared weights must know of one Linear of one block.

    Attributes:
        weight: W, float32 [out, in].
        hessian: H = X^T X, float32 [in, in]; one for all Linears that read the same inputs.
        scale: 1 / ||W X||^2, so that blocks of any scale count alike; 0 when no token gave it an output.
    """

    weight: Tensor
    hessian: Tensor
    scale: float


class Sums:
    """Of several blocks: sum_i s_i W_i H_i, sum_i s_i H_i and sum_i W_i, in float32; how many, and with outputs."""

    def __init__(self) -> None:
        self.count = self.heard = 0
        self.product, self.hessian, self.weight = torch.zeros(()), torch.zeros(()), torch.zeros(())

    def add(self, moment: Moment) -> Sums:
        self.count += 1
        self.heard += moment.scale > 0
        self.product = self.product + moment.scale * (moment.weight @ moment.hessian)
        self.hessian = self.hessian + moment.scale * moment.hessian
        self.weight = self.weight + moment.weight
        return self

    def fit(self, damping: float) -> tuple[Tensor, float]:
        """The W of least sum_i ||(W - W_i) X_i||^2 / ||W_i X_i||^2, drawn to the mean; and that sum.

        W = (sum_i s_i W_i H_i + lambda mean) (sum_i s_i H_i + lambda I)^-1, lambda = damping x the mean diagonal;
        raised tenfold until the factorization succeeds. Without outputs (experts that no token chose): the mean, 0.
        """
        mean = self.weight.double() / self.count
        if not self.heard:
            return mean.float(), 0.0
        lower, ridge = rising_cholesky(
            self.hessian.double(), damping * self.hessian.diagonal().mean().double()
        )
        fitted = torch.cholesky_solve((self.product + ridge * mean).T, lower).T
        # sum_i s_i tr (W - W_i) H_i (W - W_i)^T, and s_i tr W_i H_i W_i^T = 1
        error = (
            (fitted @ self.hessian.double() * fitted).sum() - 2 * (fitted * self.product).sum() + self.heard
        )
        return fitted.float(), float(error.clamp_min(0))


class ShareBlocks(LinearStep):
    """Cross-layer sharing (ALBERT, Lan et al. 2019, arXiv:1909.11942), with a correction for each block.

    The blocks of a stack form `unique_blocks` groups, or groups of `group_size`; the Linears of a group use one weight,
    that of least summed relative output error, min_W sum_i ||(W - W_i) X_i||^2 / ||W_i X_i||^2 on the inputs X_i
    that the blocks have (`init fit`), the mean or the first block's. Consecutive blocks whose sharing costs least by
    that sum form groups with `grouping similarity`. With `delta_rank` each block adds a low-rank product of its own,
    the truncated SVD of what its weight had beyond the shared one, as in relaxed recursive transformers (Bae et al.
    2024, arXiv:2410.20672), here weighed by the inputs as they arrive through the blocks shared already. Norms and
    biases stay each block's own. The papers train afterwards; that is left to the steps that train.

    A later step decides on a shared weight once, at the first block that uses it, by that block's inputs.
    """

    kind: ClassVar[str] = "share"
    verb = "share"

    group_size: int = Field(2, ge=2, description="blocks that share")
    unique_blocks: int | None = Field(
        None,
        ge=1,
        description="different blocks that stay in each stack, instead of a group size; 1: all share one",
    )
    grouping: Literal["sequential", "similarity", "cyclic"] = Field(
        "sequential",
        description="sequential: groups of equal size; similarity: consecutive blocks whose sharing costs least, "
        "each by itself; cyclic: block i with i - unique_blocks",
    )
    longest: int = Field(4, ge=2, description="grouping similarity: the most blocks that share one weight")
    part: Literal["block", "attention", "mlp"] = Field("block", description="what is shared of a block")
    init: Literal["fit", "mean", "first"] = Field(
        "fit",
        description="the shared weight: fitted to the outputs of all its blocks, their mean, or the first one's",
    )
    delta_rank: int = Field(0, ge=0, description="rank of each block's own correction of a shared weight")
    fit_damping: float = Field(
        1e-4, gt=0, le=1, description="init fit: pull to the mean weight, x the mean square input"
    )

    @model_validator(mode="after")
    def _consistent(self) -> ShareBlocks:
        if self.unique_blocks is not None and self.group_size != 2:
            raise ValueError("group_size and unique_blocks both say how many share; use one")
        self.require_option("longest", self.grouping == "similarity", "grouping similarity")
        self.require_option("fit_damping", self.needs_calibration, "init fit and grouping similarity")
        return self

    @property
    def needs_calibration(self) -> bool:
        return self.init == "fit" or self.grouping == "similarity"

    @property
    def needs_survey(self) -> bool:
        return True

    def targets(self, block: Block) -> dict[str, tuple[int, int]]:
        attention = {block.attention.name}
        if block.cross_attention is not None:
            attention.add(block.cross_attention.name)
        names = {block.attention.o.name, *([block.cross_attention.o.name] if block.cross_attention else [])}
        return {
            name: shape
            for name, shape in super().targets(block).items()
            if self.part == "block"
            or (self.part == "attention") == bool(nearest(name, attention) or nearest(name, names))
        }

    def unique(self, blocks: int) -> int:
        """How many different blocks a stack of so many has left."""
        return self.unique_blocks or -(-blocks // self.group_size)

    def check(self, anatomy: Anatomy) -> None:
        if shared_modules(anatomy.model):
            raise UserError(
                "This model shares weights between blocks already: share those of the original one."
            )
        for stack in anatomy.stacks:
            blocks = stack.blocks
            _check_dense(blocks)
            size, unique = len(blocks), self.unique(len(blocks))
            if self.group_size > size:
                raise UserError(
                    f"group_size {self.group_size} is more than the {size} blocks of {stack.name}; use at most {size}."
                )
            if unique >= size:
                raise UserError(
                    f"unique_blocks {unique} of the {size} blocks of {stack.name} leaves nothing to share; "
                    f"use 1 to {size - 1}."
                )
            if self.grouping == "similarity" and unique * self.longest < size:
                raise UserError(
                    f"longest {self.longest} allows no {unique} groups of {size} blocks; use at least "
                    f"{-(-size // unique)}."
                )
            self._check_alike(blocks)
            self._check_rank(blocks, unique)
        super().check(anatomy)

    def _check_alike(self, blocks: list[Block]) -> None:
        first = _below(blocks[0], self.targets(blocks[0]))
        if not first:
            raise UserError(
                f"Nothing to share: include={list(self.include)}, exclude={list(self.exclude)} and part={self.part} "
                "leave no Linear."
            )
        for block in blocks[1:]:
            other = _below(block, self.targets(block))
            differs = next((path for path in {**first, **other} if first.get(path) != other.get(path)), None)
            if differs is not None:
                here, there = (_shape(shapes.get(differs)) for shapes in (first, other))
                raise UserError(
                    f"{blocks[0].name} and {block.name} cannot share {differs}, which is {here} in the one and {there} "
                    "in the other: share only what is alike (--exclude), or prune all blocks to one width."
                )

    def _check_rank(self, blocks: list[Block], unique: int) -> None:
        targets = self.targets(blocks[0])
        name, narrowest = min(targets.items(), key=lambda entry: min(entry[1]))
        if self.delta_rank > min(narrowest):
            raise UserError(
                f"delta_rank {self.delta_rank} is more than {name} ({_shape(narrowest)}) has: use at most "
                f"{min(narrowest)}, or --exclude it."
            )
        shapes = targets.values()
        saved = (len(blocks) - unique) * sum(rows * width for rows, width in shapes)
        per_rank = len(blocks) * sum(rows + width for rows, width in shapes)
        if self.delta_rank * per_rank >= saved:
            raise UserError(
                f"delta_rank {self.delta_rank} saves nothing: with {unique} different blocks of {len(blocks)} the "
                f"largest that does is {(saved - 1) // per_rank}."
            )

    def planned_edits(self, anatomy: Anatomy) -> list[Edit]:
        """As many as there will be; which blocks go together is known beforehand only of groups by place."""
        edits: list[Edit] = []
        for stack in anatomy.stacks:
            blocks = stack.blocks
            if self.grouping == "similarity":
                groups = sequential(len(blocks), self.unique(len(blocks)))
            else:
                groups = self._by_place(len(blocks))
            owners = _owners(groups, len(blocks))
            alone = {group[0] for group in groups if len(group) == 1}
            for block in blocks:
                edits += self.unfusing(block)
                for name in self.targets(block):
                    if block.index not in alone:
                        edits.append(self._edit(name, stack.name, owners))
        return edits

    def _edit(self, name: str, stack: str, owners: list[int]) -> ShareLinear:
        index, path = _split(name, stack)
        owner = owners[index]
        if index == owner:
            return ShareLinear(module=name, rank=self._owner_rank)
        source = f"{stack}.{owner}.{path}{'.base' if self._owner_rank else ''}"
        return ShareLinear(module=name, source=source, rank=self.delta_rank)

    @property
    def _owner_rank(self) -> int:
        """The first block's own weight needs no correction."""
        return 0 if self.init == "first" else self.delta_rank

    def workspace_bytes(self, anatomy: Anatomy) -> int:
        def held(block: Block) -> int:
            shapes = self.targets(block).values()
            return 4 * (sum(rows * width for rows, width in shapes) + sum({w for _, w in shapes}) ** 2)

        most = max(held(block) for block in anatomy.blocks)
        blocks = max(len(stack.blocks) for stack in anatomy.stacks)
        kept = self.unique(blocks) * most  # the shared weights until the run ends
        window = self.longest if self.grouping == "similarity" else 1
        open_ = self.unique(blocks) if self.grouping == "cyclic" else 1
        return kept + (window + 2 * open_ + 2) * most

    def disk_bytes(self, anatomy: Anatomy, tokens: int) -> int:
        """The survey, of the shared weights in float32."""
        kept = 0
        for stack in anatomy.stacks:
            sizes = [sum(math.prod(shape) for shape in self.targets(b).values()) for b in stack.blocks]
            kept += 4 * self.unique(len(sizes)) * max(sizes)
        return kept

    def survey(self, look: Survey) -> dict[str, Tensor]:
        """By stack the first block of each one's group, and the weights that they share, by the first's name."""
        sizes = {stack.name: len(stack.blocks) for stack in look.anatomy.stacks}
        groups = self._by_cost(look) if self.grouping == "similarity" else {
            name: self._by_place(size) for name, size in sizes.items()
        }  # fmt: skip
        found = {_OWNERS + name: torch.tensor(_owners(groups[name], size)) for name, size in sizes.items()}
        sums: dict[str, Sums] = {}
        for block, stream in look.blocks():
            stack = block.name.rpartition(".")[0]
            group = next(group for group in groups[stack] if block.index in group)
            for path, moment in self._moments(block, stream).items():
                if len(group) == 1:
                    continue
                name = f"{stack}.{group[0]}.{path}"
                if self.init != "first" or block.index == group[0]:
                    sums.setdefault(name, Sums()).add(moment)
                if block.index == group[-1]:
                    found[_WEIGHT + name] = self._shared(sums.pop(name))
        return found

    def _shared(self, sums: Sums) -> Tensor:
        if self.init == "fit":
            return sums.fit(self.fit_damping)[0]
        return sums.weight / sums.count

    def _by_place(self, blocks: int) -> Groups:
        return (cyclic if self.grouping == "cyclic" else sequential)(blocks, self.unique(blocks))

    def _by_cost(self, look: Survey) -> dict[str, Groups]:
        """By stack, the groups of consecutive blocks of least summed error of `Sums.fit`."""
        costs: dict[str, list[list[float]]] = {stack.name: [] for stack in look.anatomy.stacks}
        window: deque[dict[str, Moment]] = deque(maxlen=self.longest)
        for block, stream in look.blocks():
            if block.index == 0:
                window.clear()
            window.append(self._moments(block, stream))
            of_stack = costs[block.name.rpartition(".")[0]]
            of_stack.append([0.0])
            sums: dict[str, Sums] = {}
            for back, moments in enumerate(reversed(window)):  # runs that end here, longer and longer
                for path, moment in moments.items():
                    sums.setdefault(path, Sums()).add(moment)
                if back:
                    errors = [each.fit(self.fit_damping)[1] for each in sums.values()]
                    of_stack[block.index - back].append(sum(errors))
        return {name: cheapest(each, self.unique(len(each))) for name, each in costs.items()}

    def _moments(self, block: Block, stream: BlockStream) -> dict[str, Moment]:
        """By their names below the block, what a fit must know of its Linears; passes the lane through the block."""
        self.prepare_block(block, stream, StepRecord())
        found: dict[str, Moment] = {}
        paths = {name: name.removeprefix(f"{block.name}.") for name in self.targets(block)}

        def note(name: str, stats: InputStats | None) -> None:
            weight = dense_weight(stream.model.get_submodule(name)).detach().float().clone()
            check_inputs(name, stats, "shared")
            hessian = torch.zeros(weight.shape[1], weight.shape[1]) if stats is None else stats.hessian
            power = float(output_power(weight, hessian.to(weight.device)))
            found[paths[name]] = Moment(weight, hessian.to(weight.device), 1 / power if power > 0 else 0.0)

        if self.needs_calibration:
            stream.walk(block, stream.lanes["calibration"], list(paths), with_stats(note))
        for name in paths:
            if paths[name] not in found:
                note(name, None)
        return found

    def compress_linear(
        self, name: str, weight: Tensor, stats: InputStats | None, record: StepRecord
    ) -> tuple[Edit, nn.Module] | None:
        stack = next(s for key in record.survey if name.startswith(f"{(s := key.removeprefix(_OWNERS))}."))
        owners = record.survey[_OWNERS + stack].tolist()
        index, path = _split(name, stack)
        shared = record.survey.get(f"{_WEIGHT}{stack}.{owners[index]}.{path}")
        if shared is None:
            return None
        edit, full = self._edit(name, stack, owners), weight.float()
        shared = shared.to(weight.device)
        base = empty_linear(weight.shape[1], weight.shape[0], weight.dtype, "meta")
        base.weight = nn.Parameter(shared.to(weight.dtype), requires_grad=False)
        if edit.source is not None:
            share(base, edit.source)
        module: nn.Module = base
        result = shared
        check_inputs(name, stats, "shared")  # what the blocks before make of them
        if edit.rank:
            root = None if stats is None else root_of(stats)
            rest = full - base.weight.float()
            factors = decompose(rest, root).factors(rest, edit.rank)
            module = LowRankLinear.of(factors, weight.dtype, base)
            result = shared + factors.u @ factors.v
        row: dict[str, Any] = {
            "name": name,
            "shares": edit.source,
            "rank": edit.rank,
            "shape": list(weight.shape),
        }
        if stats is not None:
            row |= {"output_error": output_error(full, result, stats.hessian), "tokens": stats.tokens}
        record.linears.append(row)
        return edit, module


def _check_dense(blocks: list[Block]) -> None:
    for block in blocks:
        for path, module in block.module.named_modules():
            if hasattr(module, "weight_packed"):
                raise UserError(
                    f"{block.name}.{path} is quantized, and packed weights cannot be fitted to each other: share "
                    "before quantizing."
                )
            if isinstance(module, (SparseLinear, LowRankLinear)):
                what = "has pruned single weights" if isinstance(module, SparseLinear) else "is factored"
                raise UserError(f"{block.name}.{path} {what}, which sharing would undo: share first.")


def _owners(groups: Groups, blocks: int) -> list[int]:
    """Of each block, the first of its group."""
    owner = {index: group[0] for group in groups for index in group}
    return [owner[index] for index in range(blocks)]


def _split(name: str, stack: str) -> tuple[int, str]:
    """Index of the block and the name below it."""
    index, _, path = name.removeprefix(f"{stack}.").partition(".")
    return int(index), path


def _below(block: Block, shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {name.removeprefix(f"{block.name}."): shape for name, shape in shapes.items()}


def _shape(shape: tuple[int, int] | None) -> str:
    return "not there" if shape is None else f"{shape[0]} x {shape[1]}"
