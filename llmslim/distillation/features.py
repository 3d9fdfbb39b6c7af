"""Distil what the teacher has inside: hidden states, and relations of the last attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy, Attention
from llmslim.distillation._beside import BesideResponse
from llmslim.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

    from llmslim.training.loop import Loss

SAMPLE = 4096  # tokens that projections are fitted to before training
DAMP = 1e-3  # of that fit, as a share of the mean square of a student's channel


class Features(BesideResponse):
    """Train a student to have the teacher's hidden states, and the relations of its last attention.

    - hidden: what each block of the student gives against what its block of the teacher gives (TinyBERT, Jiao et al.
      2019, arXiv:1909.10351), as a share of the latter's square, token by token. Where widths differ, each such
      block has a projection to the teacher's width: fitted by least squares, trained with the student, thrown away.
    - attention: queries, keys and values of the last block, each in its relations among the tokens, so that heads and
      widths may differ (MiniLMv2, Wang et al. 2020, arXiv:2012.15828); their mean. They are taken as the projections
      give them: before rotary positions and norms of heads, without a causal mask.

    Which block learns from which: `learned` takes those with the outputs most alike in the sum, in order, by linear CKA
    on the first windows (Kornblith et al. 2019, arXiv:1905.00414), before training.

    TinyBERT's attention maps (which fast attention does not give) and embeddings are left out.
    """

    kind: ClassVar[str] = "features"
    verb: ClassVar[str] = "distill"

    layer_map: Literal["uniform", "last", "learned"] = Field(
        "uniform",
        description="the teacher's blocks that the student's learn from: evenly spaced, its last, or the most alike",
    )
    hidden: float = Field(1.0, ge=0, description="weight of the hidden states")
    attention: float = Field(1.0, ge=0, description="weight of the last attention's relations")
    relation_heads: int | None = Field(
        None,
        ge=1,
        description="parts that queries, keys and values are split into; the teacher's KV heads when not given",
    )

    @model_validator(mode="after")
    def _something_inside(self) -> Self:
        if not self.hidden and not self.attention:
            raise ValueError(
                "hidden and attention are both 0, which leaves nothing inside; use method response"
            )
        return self

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if self.attention:
            self._heads([anatomy.blocks[-1].attention])

    def criterion(
        self, model: PreTrainedModel, teacher: PreTrainedModel | None, tokens: Tensor
    ) -> tuple[Loss, list[nn.Parameter]]:
        from llmslim.training.losses import hidden_states, self_relations

        assert teacher is not None
        students, teachers = Anatomy(model).blocks, Anatomy(teacher).blocks
        pairs = list(zip(students, self._chosen(model, teacher, tokens), strict=True)) if self.hidden else []
        blocks = [s.module for s, _ in pairs], [teachers[t].module for _, t in pairs]
        projections = fitted(model, teacher, *blocks, tokens) if pairs else nn.ModuleList()
        attentions = [students[-1].attention, teachers[-1].attention] if self.attention else []
        heads = self._heads(attentions) if attentions else 0
        parts = [(a.q, a.k, a.v) for a in attentions]
        modules = [
            [*some, *(part.module for part in ps)] for some, ps in zip(blocks, parts or ((), ()), strict=True)
        ]

        def inside(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
            value = found[0].new_zeros(())
            count = len(pairs)
            for project, mine, its in zip(projections, found[:count], wanted[:count], strict=True):
                value = value + self.hidden / count * hidden_states(project(mine), its)
            if parts:
                for mine, its, rows, its_rows in zip(found[count:], wanted[count:], *parts, strict=True):
                    mine, its = mine[..., rows.rows.to(mine.device)], its[..., its_rows.rows.to(its.device)]
                    value = value + self.attention / 3 * self_relations(mine, its, heads)
            return value

        return self.beside(teacher, (modules[0], modules[1]), inside), list(projections.parameters())

    def _chosen(self, model: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor) -> list[int]:
        """For each block of the student, the index of its block of the teacher."""
        blocks, targets = ([block.module for block in Anatomy(one).blocks] for one in (model, teacher))
        fixed = self._mapped(len(blocks), len(targets))
        if self.layer_map != "learned":
            return fixed
        mine, its = outputs(model, teacher, blocks, targets, tokens)
        return ascending(torch.tensor([[alikeness(x, y) for y in its] for x in mine]))

    def _mapped(self, students: int, teachers: int) -> list[int]:
        """The same where it does not depend on what the blocks do."""
        if students > teachers:
            raise UserError(
                f"The student has {students} blocks and the teacher {teachers}: features are learned from a teacher "
                "with as many or more; set hidden to 0, or use response."
            )
        if self.layer_map == "last":
            return list(range(teachers - students, teachers))
        return [(index + 1) * teachers // students - 1 for index in range(students)]

    def _heads(self, attentions: Sequence[Attention]) -> int:
        """Into how many parts the queries, keys and values of all these are split."""
        common = math.gcd(*(len(part.rows) for a in attentions for part in (a.q, a.k, a.v)))
        if self.relation_heads is None:
            return max(n for n in range(1, attentions[-1].num_kv_heads + 1) if common % n == 0)
        if common % self.relation_heads:
            raise UserError(
                f"relation_heads {self.relation_heads} does not divide the widths of queries, keys and values: a "
                f"divisor of {common} does."
            )
        return self.relation_heads


@torch.no_grad()
def fitted(
    student: nn.Module,
    teacher: nn.Module,
    blocks: Sequence[nn.Module],
    targets: Sequence[nn.Module],
    tokens: Tensor,
) -> nn.ModuleList:
    """For each block, what takes its output to the width of its target's: nothing, or a Linear without bias.

    Args:
        tokens: int64 [windows, seq]; the first windows, at least one, are what the Linears are fitted to.
    """
    mine, its = outputs(student, teacher, blocks, targets, tokens)
    return nn.ModuleList(projection(x, y) for x, y in zip(mine, its, strict=True))


@torch.no_grad()
def outputs(
    student: nn.Module,
    teacher: nn.Module,
    blocks: Sequence[nn.Module],
    targets: Sequence[nn.Module],
    tokens: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """What blocks of the student, and of the teacher, give for the first windows: [tokens, width] each."""
    from llmslim.training.forward import observe

    some = tokens[: max(1, SAMPLE // tokens.shape[1])].to(next(student.parameters()).device)
    mine, its = observe(student, some, blocks)[1], observe(teacher, some, targets)[1]
    return [x.flatten(0, -2) for x in mine], [y.flatten(0, -2) for y in its]


def alikeness(x: Tensor, y: Tensor) -> float:
    """Linear CKA: ||Y^T X||^2 / (||X^T X|| ||Y^T Y||) of centred rows, Frobenius; 0 to 1.

    1 where y is x turned and scaled as a whole (Kornblith et al. 2019, arXiv:1905.00414).

    Args:
        x, y: [tokens, width]; widths may differ.
    """
    x, y = (z.float() - z.float().mean(0) for z in (x, y))
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).square().sum() / scale.clamp_min(1e-30))


def ascending(scores: Tensor) -> list[int]:
    """A column for each row, each to the right of the one before, of the largest sum; [rows, columns >= rows]."""
    rows, columns = scores.shape
    best = [[0.0] * (columns + 1)]  # [row][column]: of so many rows in so many columns
    for row in range(rows):
        sums = [-math.inf] * (columns + 1)
        for column in range(row + 1, columns + 1):
            sums[column] = max(sums[column - 1], best[row][column - 1] + float(scores[row, column - 1]))
        best.append(sums)
    chosen, column = [], columns
    for row in range(rows, 0, -1):
        while column > row and best[row][column - 1] == best[row][column]:
            column -= 1
        column -= 1
        chosen.append(column)
    return chosen[::-1]


def projection(x: Tensor, y: Tensor) -> nn.Module:
    """The Linear of least mean square of W x - y, slightly damped; Identity for rows of the same width.

    Args:
        x, y: [tokens, width].
    """
    if x.shape[1] == y.shape[1]:
        return nn.Identity()
    x, y = x.float(), y.float()
    gram = x.T @ x
    gram.diagonal().add_(DAMP * gram.diagonal().mean())
    linear = nn.Linear(x.shape[1], y.shape[1], bias=False, device=x.device)
    linear.weight.copy_(torch.linalg.solve(gram, x.T @ y).T)
    return linear
