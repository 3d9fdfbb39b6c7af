"""Pruning of single weights: which of them stay, and what the ones that stay become."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.anatomy.parts import dense_weight
from llmslim.calibration.factor import factor_of
from llmslim.calibration.statistics import InputStats, output_error
from llmslim.edit import Edit
from llmslim.errors import UserError
from llmslim.linear_step import LinearStep
from llmslim.masks import COLUMNS, Pattern, Scope, check_pattern, choose, nonzeros, zeros_last
from llmslim.pruning.allocation import Histogram
from llmslim.pruning.amount import Amount
from llmslim.pruning.layer_sparsity import by_error, by_outliers, wanda_score
from llmslim.pruning.rewind import Rewind
from llmslim.pruning.sparsegpt import sparsegpt
from llmslim.sparse import SparseLinear, SparsifyLinear
from llmslim.step import Outlook, Step, StepRecord, Survey
from llmslim.training.step import TrainStep

if TYPE_CHECKING:
    from typing_extensions import Self


class WeightPruner(Amount, LinearStep):
    """A step that takes out single weights. Subclasses define `score`, or `prune` if they change what stays.

    The result is a `SparseLinear`: smaller on disk, and neither smaller in memory nor faster. Weights that are
    zero already go first, and stay zero: masks of several rounds are nested.
    """

    amount = "sparsity"

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of the weights that goes")
    pattern: Pattern = Field(
        "unstructured", description="2:4 and 4:8: of each 4 (8) consecutive inputs 2 (4) stay"
    )
    layer_sparsity: Literal["uniform", "owl", "error"] = Field(
        "uniform",
        description="owl: blocks with more outliers lose less (arXiv:2310.05175); "
        "error: each Linear loses what makes the sum of relative output errors least",
    )
    owl_outlier: float = Field(
        5.0, gt=0, description="owl: a weight is an outlier above so many times the mean score of its block"
    )
    sparsity_range: float = Field(
        0.08, gt=0, le=0.5, description="owl, error: how far a sparsity may be from the mean"
    )

    rewind: bool = Field(
        False,
        description="lottery tickets: train before the first round as well, and before each retraining put the weights "
        "that are left back to the first ones",
    )

    def before(self) -> list[Step]:
        return super().between() if self.rewind else []

    def between(self) -> list[Step]:
        return [*([Rewind()] if self.rewind else []), *super().between()]

    @model_validator(mode="after")
    def _consistent(self) -> WeightPruner:
        if self.rewind and not self.retrain:
            raise ValueError("rewind is for a ticket that is trained again: set retrain as well")
        if any(isinstance(step, TrainStep) and step.distills and not step.teacher for step in self.before()):
            raise ValueError(
                "rewind trains before it prunes, and a model learns nothing from itself: let retrain learn from the "
                "text, as full:objective=next_token does, or from another teacher"
            )
        if self.pattern != "unstructured":
            if self.sparsity != 0.5:
                raise ValueError(f"pattern {self.pattern} keeps half of the weights: leave sparsity at 0.5")
            if self.uneven:
                raise ValueError(
                    f"pattern {self.pattern} takes the same from every weight; use pattern unstructured"
                )
            if self.rounds > 1 or self.target_size is not None:
                what = "target_size" if self.rounds == 1 else f"rounds {self.rounds}"
                raise ValueError(
                    f"pattern {self.pattern} takes half at once: {what} needs pattern unstructured"
                )
        self.require_option("owl_outlier", self.layer_sparsity == "owl", "layer_sparsity owl")
        self.require_option(
            "sparsity_range", self.layer_sparsity != "uniform", "layer_sparsity owl and error"
        )
        return self

    @property
    def uneven(self) -> str:
        return "" if self.layer_sparsity == "uniform" else f"layer_sparsity {self.layer_sparsity}"

    def amounts(self, anatomy: Anatomy) -> list[float]:
        """In thousandths."""
        return [count / 1000 for count in range(1, 1000)]

    def parts(self, shares: list[float], outlook: Outlook) -> list[Self]:
        """Each step has all weights in view; those that are zero already count as gone."""
        return [self.with_amount(share) for share in shares]

    @property
    def scope(self) -> Scope:
        """Where weights are compared with each other, for patterns without one of their own."""
        return "layer"

    @property
    def needs_calibration(self) -> bool:
        return self.layer_sparsity != "uniform"

    @property
    def needs_survey(self) -> bool:
        """Whether sparsities are settled in a look at the whole model before the first block is pruned."""
        return bool(self.uneven)

    def check(self, anatomy: Anatomy) -> None:
        chosen = {name: shape for block in anatomy.blocks for name, shape in self.targets(block).items()}
        for block in anatomy.blocks:
            for path, module in block.module.named_modules():
                if hasattr(module, "weight_packed") and self.selects(f"{block.name}.{path}"):
                    raise UserError(
                        f"{block.name}.{path} is quantized, and packed weights cannot be pruned: "
                        "prune before quantizing."
                    )
        if not chosen:
            raise UserError(
                f"Nothing to prune: include={list(self.include)} and exclude={list(self.exclude)} leave no Linear."
            )
        super().check(anatomy)
        for name, (rows, width) in chosen.items():
            check_pattern(name, width, self.pattern)
            if not self._nonzeros(rows, width):
                raise UserError(
                    f"sparsity {self.sparsity:g} leaves nothing of {name}, which is {rows} x {width}; use less."
                )

    def planned_edits(self, anatomy: Anatomy) -> list[Edit]:
        edits: list[Edit] = []
        for block in anatomy.blocks:
            edits += self.unfusing(block)
            for name, shape in self.targets(block).items():
                edits.append(SparsifyLinear(module=name, nonzeros=self._nonzeros(*shape)))
        return edits

    def _nonzeros(self, rows: int, width: int) -> int:
        return nonzeros(rows, width, self.sparsity, self.pattern, self.scope)

    def workspace_bytes(self, anatomy: Anatomy) -> int:
        shapes = [shape for block in anatomy.blocks for shape in self.targets(block).values()]
        deciding = max((self._workspace(*shape) for shape in shapes), default=0)
        if self.layer_sparsity != "error":
            return deciding
        # the statistics of two inputs for a moment; the weight, what is left of it, its scores and their order
        measuring = max((4 * width * (2 * width + 8 * rows) for rows, width in shapes), default=0)
        return max(deciding, measuring)

    def _workspace(self, rows: int, width: int) -> int:
        """Bytes that deciding on one weight [rows, width] takes: scores and their int64 order above all."""
        return 28 * rows * width

    def survey(self, look: Survey) -> dict[str, Tensor]:
        """The sparsity of each weight by name, float64 [], decided from the whole uncompressed model."""
        return {
            name: torch.tensor(share, dtype=torch.float64) for name, share in self.sparsities(look).items()
        }

    def sparsities(self, look: Survey) -> dict[str, float]:
        """How much each weight loses, by name, where that differs."""
        return by_error(self, look) if self.layer_sparsity == "error" else by_outliers(self, look)

    def share(self, name: str, record: StepRecord) -> float:
        """How much the weight of that name loses."""
        return float(record.survey[name]) if self.uneven else self.sparsity

    def compress_linear(
        self, name: str, weight: Tensor, stats: InputStats | None, record: StepRecord
    ) -> tuple[Edit, nn.Module]:
        full = weight.float()
        sparsity = self.share(name, record)
        pruned, mask = self.prune(name, full, sparsity, stats, record)
        if not bool(mask.any()):  # of a global threshold
            mask.view(-1)[full.abs().argmax()] = True
            pruned = torch.where(mask, full, 0)
            record.note(name, f"sparsity {sparsity:g} leaves nothing: the largest weight was kept")
        sparse = SparseLinear.from_dense(pruned.to(weight.dtype), mask)
        row = {"name": name, "sparsity": 1 - sparse.nonzeros / mask.numel(), "shape": list(mask.shape)}
        if stats is not None:
            row["output_error"] = output_error(full, sparse.weight.detach().float(), stats.hessian)
            row["tokens"] = stats.tokens
        record.linears.append(row)
        return SparsifyLinear(module=name, nonzeros=sparse.nonzeros), sparse

    def prune(
        self, name: str, weight: Tensor, sparsity: float, stats: InputStats | None, record: StepRecord
    ) -> tuple[Tensor, Tensor]:
        """The new weight and the bool mask of what stays, for a float32 weight [out, in]."""
        return weight, self._mask(weight, self.score(name, weight, stats, record), sparsity)

    def _mask(self, weight: Tensor, score: Tensor, sparsity: float) -> Tensor:
        """What stays by a score of at least 0; never a weight that is zero."""
        alive = weight != 0
        return choose(zeros_last(score, alive), sparsity, self.pattern, self.scope) & alive

    def score(self, name: str, weight: Tensor, stats: InputStats | None, record: StepRecord) -> Tensor:
        """What each weight is worth, float [out, in], at least 0."""
        raise TypeError(f"{type(self).__name__} does not define score()")


class ThresholdPruner(WeightPruner):
    """A step whose scores can be compared over the whole model.

    `threshold` says among which weights the lowest are sought: of each row, of each matrix, or of all matrices of the
    model, whose sparsities then differ and are `sparsity` on the whole.
    """

    threshold: Literal["row", "layer", "global"] | None = Field(
        None,
        description="where the lowest scores are sought: in each row, each matrix, or all of them "
        "(default: layer; taylor, snip and grasp: global, where pattern and layer_sparsity allow it)",
    )

    @property
    def among(self) -> Literal["row", "layer", "global"]:
        """`threshold`, or what the step takes by default."""
        return self.threshold or "layer"

    @model_validator(mode="after")
    def _one_allocation(self) -> ThresholdPruner:
        if self.threshold == "global" and self.layer_sparsity != "uniform":
            raise ValueError(
                f"threshold global and layer_sparsity {self.layer_sparsity} both say how much a weight loses; use one"
            )
        return self

    @property
    def scope(self) -> Scope:
        return "row" if self.among == "row" else "layer"

    @property
    def uneven(self) -> str:
        return "threshold global" if self.among == "global" else super().uneven


class Magnitude(ThresholdPruner):
    """Magnitude pruning: the smallest weights go (Han et al. 2015, arXiv:1506.02626); needs no calibration.

    Single weights rank by |w|, which is their L1 norm as it is their L2 norm. `threshold` says among which weights:
    of each row, of each matrix, or of all matrices of the model, whose sparsities then differ and are `sparsity` on
    the whole.
    """

    kind: ClassVar[str] = "magnitude"

    def sparsities(self, look: Survey) -> dict[str, float]:
        if self.threshold != "global":
            return super().sparsities(look)
        magnitudes = Histogram()
        for block, stream in look.blocks():
            self.prepare_block(block, stream, StepRecord())
            for name in self.targets(block):
                magnitudes.add(name, dense_weight(stream.model.get_submodule(name)).abs())
        return magnitudes.sparsities(self.sparsity)

    def score(self, name: str, weight: Tensor, stats: InputStats | None, record: StepRecord) -> Tensor:
        return weight.abs()


class Wanda(WeightPruner):
    """Wanda: in each row the weights of least |W_ij| ||X_j||_2 go (Sun et al. 2023, arXiv:2306.11695).

    X_j is input j over the calibration tokens, as it arrives through the already pruned part of the model. The
    weights that stay are not changed.
    """

    kind: ClassVar[str] = "wanda"

    @property
    def scope(self) -> Scope:
        return "row"

    @property
    def needs_calibration(self) -> bool:
        return True

    def score(self, name: str, weight: Tensor, stats: InputStats | None, record: StepRecord) -> Tensor:
        return weight.abs() if stats is None else wanda_score(weight, stats.hessian.diagonal())


class SparseGPT(WeightPruner):
    """SparseGPT: error feedback through the inverse Hessian (Frantar & Alistarh 2023, arXiv:2301.00774).

    min ||(W - W_s) X||^2 per Linear over mask and values, X the calibration inputs as they arrive through the
    already pruned part of the model: of every 128 columns, the weights of least w^2 / U[j, j]^2 go, and the
    columns to come make good what they can. Columns are taken in their natural order.
    """

    kind: ClassVar[str] = "sparsegpt"

    damp_percent: float = Field(
        0.01, gt=0, le=1, description="damping as a share of the Hessian's mean diagonal"
    )

    @property
    def needs_calibration(self) -> bool:
        return True

    def _nonzeros(self, rows: int, width: int) -> int:
        widths = [min(COLUMNS, width - start) for start in range(0, width, COLUMNS)]
        return sum(nonzeros(rows, part, self.sparsity, self.pattern, self.scope) for part in widths)

    def _workspace(self, rows: int, width: int) -> int:
        return 4 * 5 * rows * width + 5 * 4 * width * width

    def prune(
        self, name: str, weight: Tensor, sparsity: float, stats: InputStats | None, record: StepRecord
    ) -> tuple[Tensor, Tensor]:
        solved = factor_of(stats, self.damp_percent, act_order=False) if stats is not None else None
        if solved is None or solved.inverse is None:
            if solved is not None:
                record.note(name, "the Hessian cannot be factorized with any damping: pruned by magnitude")
            return weight, self._mask(weight, weight.abs(), sparsity)
        if solved.damp_percent != self.damp_percent:
            record.note(name, f"damping raised from {self.damp_percent:g} to {solved.damp_percent:g}")
        return sparsegpt(weight, solved, sparsity, self.pattern)


class Random(WeightPruner):
    """Random pruning: the floor that every other choice must beat; needs no calibration."""

    kind: ClassVar[str] = "random"

    draw: int = Field(0, ge=0, description="seed of the choice; each Linear has its own draw")

    def score(self, name: str, weight: Tensor, stats: InputStats | None, record: StepRecord) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.draw} {name}".encode()))
        return torch.rand(weight.shape, generator=generator).to(weight.device)
