"""What all factorizations share: ranks, which Linears they apply to, and how the factors are put in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.calibration.statistics import InputStats, check_inputs, output_error
from llmslim.edit import Edit
from llmslim.errors import UserError
from llmslim.factorization.edits import FactorizeEmbedding, FactorizeLinear, LowRankEmbedding
from llmslim.factorization.ranks import by_error
from llmslim.linear_step import LinearStep
from llmslim.lowrank import Decomposition, LowRankLinear, decompose, refit_second, worthwhile
from llmslim.sparse import SparseLinear
from llmslim.step import StepRecord, Survey

if TYPE_CHECKING:
    from llmslim.calibration.stream import BlockStream

TABLE_ROWS = 4096
"""Rows of a table that are looked at at a time."""


class Factorizer(LinearStep):
    """A step that puts two factors in the place of Linears. Subclasses define `root`.

    How much goes is a `ratio` of the weights, a `rank`, or what keeps an `energy`; `allocation error` gives more to
    the Linears that lose most. A Linear that two factors would not make smaller stays as it is.
    """

    verb = "factorize"
    weighs_inputs: ClassVar[bool] = True
    """Whether `root` looks at the inputs."""

    ratio: float = Field(
        0.2, gt=0, lt=1, description="share of the weights to remove from the chosen Linears"
    )
    rank: int | None = Field(None, ge=1, description="the same rank for all, instead of a ratio")
    energy: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="instead of a ratio: the least rank that keeps this share of the outputs' power",
    )
    allocation: Literal["uniform", "error"] = Field(
        "uniform",
        description="error: one budget, spent over all Linears where it saves most relative output error",
    )
    multiple_of: int = Field(
        8, ge=1, description="ranks are multiples of it; the group size, if factors are quantized afterwards"
    )
    embeddings_rank: int | None = Field(
        None,
        ge=1,
        description="also factorize the token embedding and a head tied to it, with so many columns",
    )

    @model_validator(mode="after")
    def _one_amount(self) -> Factorizer:
        said = list(filter(self.given, ("ratio", "rank", "energy")))
        if len(said) > 1:
            raise ValueError(f"{said[0]} and {said[1]} both say how much goes; use one")
        if self.allocation == "error" and (self.rank is not None or self.energy is not None):
            other = "rank" if self.rank is not None else "energy"
            raise ValueError(f"{other} settles every rank by itself; allocation error needs a ratio")
        return self

    @property
    def needs_calibration(self) -> bool:
        return self.weighs_inputs

    @property
    def needs_survey(self) -> bool:
        return self.allocation == "error"

    @property
    def updates(self) -> bool:
        """Whether the second factor is refitted by the inputs."""
        return False

    def root(self, stats: InputStats | None) -> Tensor | None:
        """S, with S S^T what an input's error is weighed by: see `lowrank.decompose`."""
        raise TypeError(f"{type(self).__name__} does not define root()")

    def check(self, anatomy: Anatomy) -> None:
        for block in anatomy.blocks:
            for path, module in block.module.named_modules():
                name = f"{block.name}.{path}"
                if not self.selects(name):
                    continue
                if hasattr(module, "weight_packed"):
                    raise UserError(
                        f"{name} is quantized, and packed weights cannot be factorized: factorize before quantizing."
                    )
                if isinstance(module, SparseLinear):
                    raise UserError(
                        f"{name} has pruned single weights, which factors would fill again: factorize first."
                    )
                if isinstance(module, LowRankLinear):
                    what = "is factored" if module.base is None else "shares its weight and has a correction"
                    raise UserError(f"{name} {what} already: factorize the original model instead.")
        chosen = {name: shape for block in anatomy.blocks for name, shape in self.targets(block).items()}
        if not chosen and self.embeddings_rank is None:
            raise UserError(
                f"Nothing to factorize: include={list(self.include)} and exclude={list(self.exclude)} leave no Linear."
            )
        super().check(anatomy)
        ranks = {name: self.rank_of(*shape) for name, shape in chosen.items()}
        if chosen and not any(ranks.values()):
            name, shape = max(chosen.items(), key=lambda entry: worthwhile(*entry[1]))
            most = worthwhile(*shape) // self.multiple_of * self.multiple_of
            asked = next(
                f"{key} {said:g}" for key in ("rank", "energy", "ratio") if (said := getattr(self, key))
            )
            raise UserError(
                f"{asked} saves nothing: the largest rank that makes {name} ({shape[0]} x {shape[1]}) smaller, and is "
                f"a multiple of {self.multiple_of}, is {most}."
                if most
                else f"{asked}: no multiple of {self.multiple_of} is a rank that makes a Linear of this model "
                f"smaller; use a smaller multiple_of."
            )
        self._check_embedding(anatomy)

    def _check_embedding(self, anatomy: Anatomy) -> None:
        if self.embeddings_rank is None:
            return
        name, table = _table(anatomy)
        if not isinstance(table, nn.Embedding):
            what = "factored" if isinstance(table, LowRankEmbedding) else "quantized"
            raise UserError(
                f"{name} is {what} already, so embeddings_rank {self.embeddings_rank} cannot be had."
            )
        most = worthwhile(*table.weight.shape)
        if self.embeddings_rank > most:
            raise UserError(
                f"embeddings_rank {self.embeddings_rank} saves nothing: the largest rank that makes {name} "
                f"({table.num_embeddings} x {table.embedding_dim}) smaller is {most}."
            )

    def rank_of(self, out_features: int, in_features: int) -> int:
        """The rank of a Linear of that shape, as far as it is known beforehand; 0: it stays as it is."""
        most = worthwhile(out_features, in_features)
        if self.rank is not None:
            return self.rank if self.rank <= most else 0
        if self.energy is not None:  # known in the run: at most
            return most // self.multiple_of * self.multiple_of
        wanted = (1 - self.ratio) * out_features * in_features / (out_features + in_features)
        return self.rounded(wanted, most)

    def rounded(self, rank: float, most: int) -> int:
        """The nearest multiple, at least one; 0 when it is more than `most`."""
        nearest = max(1, round(rank / self.multiple_of)) * self.multiple_of
        return nearest if nearest <= most else most // self.multiple_of * self.multiple_of

    def planned_edits(self, anatomy: Anatomy) -> list[Edit]:
        edits: list[Edit] = [*self._outer_edits(anatomy)]
        for block in anatomy.blocks:
            edits += self.unfusing(block)
            for name, shape in self.targets(block).items():
                if rank := self.rank_of(*shape):
                    edits.append(FactorizeLinear(module=name, rank=rank))
        return edits

    def _outer_edits(self, anatomy: Anatomy) -> list[FactorizeEmbedding]:
        if self.embeddings_rank is None:
            return []
        head = anatomy.head[0] if anatomy.head is not None and anatomy.tied else None
        return [FactorizeEmbedding(module=_table(anatomy)[0], rank=self.embeddings_rank, tied_head=head)]

    def workspace_bytes(self, anatomy: Anatomy) -> int:
        shapes = [shape for block in anatomy.blocks for shape in self.targets(block).values()]
        return max((4 * (5 * rows * width + 6 * width * width) for rows, width in shapes), default=0)

    def outer_bytes(self, anatomy: Anatomy) -> int:
        """Of the table: its columns twice, what a slice takes, and the decomposition of its Gram matrix."""
        if self.embeddings_rank is None:
            return 0
        rows, width = cast(nn.Embedding, _table(anatomy)[1]).weight.shape
        return 4 * (2 * rows * self.embeddings_rank + 2 * TABLE_ROWS * width) + 8 * 5 * width * width

    def survey(self, look: Survey) -> dict[str, Tensor]:
        """The rank of each Linear by name, int64 []; 0 for those that stay as they are."""
        ranks = by_error(self, look)
        return {name: torch.tensor(rank) for name, rank in ranks.items()}

    def compress_outer(self, stream: BlockStream, record: StepRecord) -> None:
        from llmslim.loaders.models import tie  # brings transformers, which help must not wait for

        for edit in self._outer_edits(stream.anatomy):
            weight = cast(Tensor, stream.model.get_submodule(edit.module).weight)
            columns, projection, lost = _columns(weight, edit.rank)
            edit.apply(stream.model)
            module = cast(LowRankEmbedding, stream.model.get_submodule(edit.module))
            dtype = module.table.dtype
            module.table = nn.Parameter(columns.to(dtype), requires_grad=False)
            module.projection = nn.Parameter(projection.to(dtype), requires_grad=False)
            tie(stream.model)
            record.linears.append(
                {"name": edit.module, "rank": edit.rank, "shape": list(weight.shape), "weight_error": lost}
            )
            record.edits.append(edit)

    def compress_linear(
        self, name: str, weight: Tensor, stats: InputStats | None, record: StepRecord
    ) -> tuple[Edit, nn.Module] | None:
        full = weight.float()
        check_inputs(name, stats, "factorized")
        found = decompose(full, self.root(stats))
        rank = self._settled_rank(name, found, full, record)
        row = {"name": name, "rank": rank or min(full.shape), "shape": list(full.shape)}
        record.linears.append(row)
        if not rank:
            return None
        factors = found.factors(full, rank)
        if self.updates and stats is not None and bool(stats.hessian.any()):  # else no input settles it
            factors = refit_second(full, factors.v, stats.hessian)
        if stats is not None:
            row["output_error"] = output_error(full, factors.u @ factors.v, stats.hessian)
            row["tokens"] = stats.tokens
        return FactorizeLinear(module=name, rank=rank), LowRankLinear.of(factors, weight.dtype)

    def _settled_rank(self, name: str, found: Decomposition, weight: Tensor, record: StepRecord) -> int:
        if self.needs_survey:
            return int(record.survey[name])
        rank, most = self.rank_of(*weight.shape), worthwhile(*weight.shape)
        if self.energy is not None:
            kept = found.powers.cumsum(0) / found.powers.sum().clamp_min(1e-30)
            needed = -(-int((kept < self.energy).sum() + 1) // self.multiple_of) * self.multiple_of
            rank = needed if needed <= most else 0
        if not rank:
            record.note(name, "left as it is: no rank that suffices makes it smaller")
        return rank


def _table(anatomy: Anatomy) -> tuple[str, nn.Module]:
    """The token embedding, by the name that its tie goes by."""
    model = anatomy.model
    wanted = model.get_input_embeddings()
    return next((name, module) for name, module in model.named_modules() if module is wanted)


def _columns(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The components that the rows of a table have most of: how much of each, in its type, them, and what is lost.

    Of a table T [rows, width], P [width, rank] are the first eigenvectors of the small matrix T^T T, T P [rows, rank]
    the first factor, and the share of T's power that is lost that of the other eigenvalues. Only slices of rows are
    ever in float32.

    Returns:
        T P in the type of T, P in float32, and the share.
    """
    slices, width = weight.split(TABLE_ROWS), weight.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=weight.device)
    for part in slices:
        values = part.float()
        gram += values.T @ values
    powers, vectors = torch.linalg.eigh(gram)
    projection = vectors.flip(1)[:, :rank].float()
    columns = torch.cat([(part.float() @ projection).to(weight.dtype) for part in slices])
    return columns, projection, float(powers[: width - rank].clamp_min(0).sum() / powers.sum())


class Updating(Factorizer):
    """A factorization whose factors are not the best for the outputs, so that one of them can be refitted."""

    update: bool = Field(
        False,
        description="refit the second factor in closed form to the outputs on the inputs as they arrive",
    )

    @property
    def needs_calibration(self) -> bool:
        return self.weighs_inputs or self.update

    @property
    def updates(self) -> bool:
        return self.update
