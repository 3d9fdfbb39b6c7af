"""Putting what adapters add into the weights below them: dense, sparse or packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from llmslim.anatomy import Anatomy, Block
from llmslim.anatomy.match import nearest
from llmslim.anatomy.parts import dense_weight, is_linear, is_matrix, is_packed
from llmslim.calibration.statistics import InputStats, output_error
from llmslim.lowrank import LowRankLinear
from llmslim.sparse import SparseLinear
from llmslim.step import BlockStep, StepRecord, build_step
from llmslim.ties import shared_modules

if TYPE_CHECKING:
    from llmslim.calibration.stream import BlockStream

FILLED = 0.1  # share of a packed weight: more zeros than rounding anew moves off their place by chance


class Additions(Protocol):
    """What adapters add.

    Attributes:
        names: of the Linears.
    """

    names: list[str]

    def delta(self, name: str) -> Tensor:
        """What is added to the weight of that Linear, float32 [out, in]."""


class MergingStep(BlockStep):
    """A step that merges: into dense weights exactly, into sparse ones where the mask is, into packed ones anew.

    The sum is stored in the weights' own type: of 16 bits it loses what is smaller than half their last digit.
    """

    masked: ClassVar[bool]
    """Whether what is added was trained under the masks of pruned weights, so that they leave nothing out."""

    rounding: Literal["gptq", "nearest"] = Field(
        "gptq",
        description="of packed weights when merged into: new scales and codes by the text, or the nearest codes",
    )

    def merge(self, block: Block, stream: BlockStream, added: Additions, record: StepRecord) -> None:
        """Merge into one block; the lane "calibration", where there is one, is passed through the result.

        Each packed weight has a row: how far the outputs are from those with the adapter beside,
        ||(W + B A - W') X||^2 / ||(W + B A) X||^2, or, without a text, what rounding lost of B A as a share.
        """
        known = linears_of(stream.anatomy)
        names = [name for name in added.names if name.startswith(f"{block.name}.")]
        packed = [name for name in names if hasattr(known[name], "quantized")]
        for name in names:
            if name not in packed:
                weight = dense_weight(known[name])
                delta = self._kept(name, known[name], added.delta(name).to(weight.device), record)
                with torch.no_grad():
                    weight.copy_(weight.float() + delta)
        lane = stream.lanes.get("calibration")
        if lane is None:
            for name in packed:
                self._into_packed(name, known[name], added.delta(name), None, record)
            return
        reached: set[str] = set()

        def visit(name: str, inputs: list[Tensor]) -> None:
            reached.add(name)
            self._into_packed(name, known[name], added.delta(name), InputStats.of(inputs), record)

        stream.walk(block, lane, packed, visit)
        for name in [name for name in packed if name not in reached]:
            record.note(name, "no calibration token reached it: merged by rounding")
            self._into_packed(name, known[name], added.delta(name), None, record)

    def _into_packed(
        self, name: str, module: Any, delta: Tensor, stats: InputStats | None, record: StepRecord
    ) -> None:
        grid = module.quantized()
        before, delta = grid.dequantize(), self._kept(name, module, delta.to(grid.codes.device), record)
        wanted = before + delta
        row: dict[str, Any] = {"name": name, "what": "merged", "bits": grid.scheme.bits}
        if stats is None:
            grid.codes = codes_on(grid, wanted)
            lost = (wanted - grid.dequantize()).norm() / delta.norm().clamp_min(1e-30)
            row["lost"] = float(lost)
        else:
            method: Any = build_step("gptq", {})  # of another room
            grid = method.quantize(name, wanted, grid.scheme, stats, record)
            row["output_error"] = output_error(wanted, grid.dequantize(), stats.hessian)
            row["tokens"] = stats.tokens
        module.store(grid)
        record.linears.append(row)
        were, are = (float((weight == 0).float().mean()) for weight in (before, grid.dequantize()))
        if not module.pruned and were - are > FILLED:
            record.note(
                name,
                f"{were:.0%} of its weights were zero and {are:.0%} are: if they were pruned, quantize with --format "
                "llmslim, which remembers it",
            )

    def _kept(self, name: str, module: nn.Module, delta: Tensor, record: StepRecord) -> Tensor:
        """What is added where weights were not pruned; the rest, if it counted until now, is noted."""
        kept, lost = within(module, delta)
        if lost and not self.masked:
            what = f"{lost:.0%} of what the adapter adds is left out (root mean square)"
            record.note(name, f"pruned weights stay zero: {what}")
        return kept


def linears_of(anatomy: Anatomy, beside: bool = False) -> dict[str, nn.Module]:
    """Every Linear of the blocks that an adapter can be for, dense or packed, by its dotted name.

    An adapter of one block cannot be merged into a weight that others use as well.

    Args:
        beside: the adapter is not to be merged: of weights that blocks share each use is a Linear of its own, but
            where it has a correction, which stands for it.
    """
    shared = shared_modules(anatomy.model)
    used = {*shared, *shared.values()}
    corrected = {m.base for m in anatomy.model.modules() if isinstance(m, LowRankLinear)}
    return {
        f"{block.name}.{name}": module
        for block in anatomy.blocks
        for name, module in block.module.named_modules()
        if (is_linear(module) or (is_packed(module) and is_matrix(module)))
        and not (nearest(f"{block.name}.{name}", used) and (not beside or module in corrected))
    }


def has_no_grid(module: nn.Module) -> bool:
    """Whether the weight is packed in a way that nothing can be rounded to anew."""
    return is_packed(module) and not hasattr(module, "quantized")


def within(module: nn.Module, delta: Tensor) -> tuple[Tensor, float]:
    """What of an addition [out, in] falls on weights that were not pruned, and the share that does not (RMS)."""
    kept = delta * open_weights(module)
    return kept, float((delta - kept).norm() / delta.norm().clamp_min(1e-30))


def open_weights(module: Any) -> Tensor | float:
    """Where an adapter may change a weight: bool [out, in] of one that was pruned, packed since or not; else 1."""
    if isinstance(module, SparseLinear):
        return module.mask
    return module.quantized().dequantize() != 0 if getattr(module, "pruned", False) else 1.0


def codes_on(grid: Any, weight: Tensor) -> Tensor:
    """The nearest codes, uint8 [out, in], of a weight on the grid that a packed one has."""
    rows, groups = grid.scale.shape
    scale = grid.scale.reshape(rows, 1, groups, 1)
    zero = (
        grid.scheme.midpoint
        if grid.zero_point is None
        else grid.zero_point.float().reshape(rows, 1, groups, 1)
    )
    parts = weight.reshape(rows, -1, groups, weight.shape[1] // groups)
    codes = (parts / scale + zero).round_().clamp_(0, grid.scheme.max_code)
    return codes.to(torch.uint8).reshape(weight.shape)
