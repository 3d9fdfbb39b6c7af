"""LinearStep: the narrowest rung, a method that decides weight by weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from pydantic import Field
from torch import Tensor, nn

from llmslim.anatomy import Anatomy, Block, Experts
from llmslim.anatomy.parts import dense_weight, features, is_matrix
from llmslim.edit import Edit, replace_module
from llmslim.experts import UnfuseExperts
from llmslim.step import REFERENCE_PART, BlockStep, StepRecord, block_of, matches, require_matches
from llmslim.ties import counterpart, shared_modules

if TYPE_CHECKING:
    from llmslim.calibration.statistics import InputStats
    from llmslim.calibration.stream import BlockStream

TOKENS_PER_INPUT = 8  # of those, that a comparison of a Linear's inputs takes; fewer tell little


class LinearStep(BlockStep):
    """A step that decides weight by weight from the statistics of its inputs.

    Attributes:
        include: patterns of module names to compress; all Linears of the blocks when empty.
        exclude: patterns of module names to leave alone.
    """

    include: tuple[str, ...] = Field(
        (), description="modules to compress, by name: '*.mlp.*'; all when not given"
    )
    exclude: tuple[str, ...] = Field((), description="modules to leave alone, by name: 'down_proj'")

    def selects(self, name: str) -> bool:
        """Whether a Linear of that dotted name is compressed; a pattern may match any tail of the name."""
        return (not self.include or matches(name, self.include)) and not matches(name, self.exclude)

    def check(self, anatomy: Anatomy) -> None:
        """Refuse patterns that match nothing; what is left alone may be any matrix or table of the model."""
        fused = {
            name
            for block in anatomy.blocks
            if isinstance(experts := block.mlp, Experts) and experts.gate_up is not None
            for name in _expert_shapes(block, experts)
        }
        linears = fused.union(*(block.linears() for block in anatomy.blocks))
        modules = anatomy.model.named_modules(remove_duplicate=False)  # blocks may share some
        tables = {name for name, module in modules if _holds_matrix(module)}
        require_matches("include", self.include, linears, "Linear in the blocks")
        require_matches("exclude", self.exclude, fused | tables, "matrix in the model")

    def compress_linear(
        self, name: str, weight: Tensor, stats: InputStats | None, record: StepRecord
    ) -> tuple[Edit, nn.Module] | None:
        """Decide on one weight.

        Args:
            weight: float [out, in], not to be changed in place.
            stats: of its inputs; None for a step without calibration, or when no token reached it.

        Returns:
            The edit, and the module (without bias) that it puts in place, holding the result; None leaves the
            weight as it is.
        """
        raise TypeError(f"{type(self).__name__} does not define compress_linear()")

    def unfusing(self, block: Block) -> list[Edit]:
        """What brings the block into the shape that this step's Linears need: experts one by one."""
        experts = block.mlp
        if not isinstance(experts, Experts) or experts.gate_up is None:  # none, or unfused already
            return []
        chosen = any(self.selects(name) for name in _expert_shapes(block, experts))
        return [UnfuseExperts(module=experts.name)] if chosen else []

    def targets(self, block: Block) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of every Linear that the step compresses, as they are after `unfusing`."""
        shapes = {name: features(linear) for name, linear in block.linears().items()}
        if self.unfusing(block):
            shapes.update(_expert_shapes(block, cast(Experts, block.mlp)))
        return {name: shape for name, shape in shapes.items() if self.selects(name)}

    def follows_reference(self, anatomy: Anatomy, tokens: int) -> bool:
        widths = {width for block in anatomy.blocks for _, width in self.targets(block).values()}
        enough = tokens / REFERENCE_PART / TOKENS_PER_INPUT
        return self.needs_reference and any(width <= enough for width in widths)

    def prepare_block(self, block: Block, stream: BlockStream, record: StepRecord) -> None:
        """Bring the block into the shape that this step's Linears need, before they are listed."""
        for edit in self.unfusing(block):
            edit.apply(stream.model)
            record.edits.append(edit)

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        self.prepare_block(block, stream, record)
        if reference is not None:  # the same shape there, so that names agree
            self.prepare_block(block_of(reference, block), reference, StepRecord())
        shared = shared_modules(stream.model)  # decided in an earlier block
        names = [name for name in block.linears() if self.selects(name) and not counterpart(name, shared)]
        visitor = _Visitor(self, stream, record)
        if not self.needs_calibration:
            for name in names:
                visitor.decide(name, None)
            return
        from llmslim.calibration.statistics import with_stats

        references: dict[str, list[Tensor]] = {}
        if reference is not None:
            lane = reference.lanes["calibration"]
            # a token may go to another expert than in the uncompressed model: there, rows do not pair
            experts = f"{block.mlp.name}." if isinstance(block.mlp, Experts) else "\0"
            widths = {name: features(linear)[1] for name, linear in block.linears().items()}
            enough = sum(hidden.shape[:-1].numel() for hidden in lane.hidden) / TOKENS_PER_INPUT
            paired = [name for name in names if not name.startswith(experts) and widths[name] <= enough]
            references = reference.inputs_of(block_of(reference, block), lane, paired)
        stream.walk(block, stream.lanes["calibration"], names, with_stats(visitor.decide, references))
        for name in names:
            if name not in visitor.done:
                record.note(name, "no calibration token reached it: decided without statistics")
                visitor.decide(name, None)


class _Visitor:
    """Has the step decide on each Linear that a walk halts at, and puts the result in place."""

    def __init__(self, step: LinearStep, stream: BlockStream, record: StepRecord) -> None:
        self.step, self.stream, self.record = step, stream, record
        self.done: set[str] = set()

    def decide(self, name: str, stats: InputStats | None) -> None:
        model = self.stream.model
        linear = model.get_submodule(name)
        self.done.add(name)
        decided = self.step.compress_linear(name, dense_weight(linear), stats, self.record)
        if decided is None:
            return
        edit, module = decided
        getattr(module, "bias_owner", module).bias = linear.bias
        replace_module(model, name, module)
        self.record.edits.append(edit)


def _holds_matrix(module: nn.Module) -> bool:
    """Whether the module itself is a matrix, of whatever kind, an embedding or a router; fused experts are not."""
    dimensions = max((parameter.ndim for parameter in module.parameters(recurse=False)), default=0)
    return not any(module.children()) and (is_matrix(module) or dimensions == 2)


def _expert_shapes(block: Block, experts: Experts) -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of the Linears that fused experts become."""
    fused = block.model.get_parameter(str(experts.gate_up)).shape  # [E, 2I, H]
    names = [f"{experts.name}.{index}" for index in range(experts.num_experts)]
    gate_up, down = (fused[1], fused[2]), (fused[2], experts.width)
    return {
        f"{name}.{part}": shape for name in names for part, shape in (("gate_up", gate_up), ("down", down))
    }
