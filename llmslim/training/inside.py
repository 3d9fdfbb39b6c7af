"""What a student can learn of a teacher's inside, whatever else its loss has: hidden states, relations of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from llmslim.anatomy import Anatomy, Attention
from llmslim.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmslim.training.forward import Inputs

DAMP = 1e-3  # of the fit of projections, as a share of the mean square of a student's channel


@dataclass(frozen=True)
class Comparison:
    """How a student is compared with its teacher.

    Attributes:
        modules: those of the student, and of the teacher, whose outputs are compared.
        projections: to the teacher's width; trained with the student.
        value: value(outputs of the student's modules, of the teacher's, mask bool [batch, seq] or None) -> scalar.
    """

    modules: tuple[list[nn.Module], list[nn.Module]]
    projections: nn.ModuleList
    value: Callable[[list[Tensor], list[Tensor], Tensor | None], Tensor]


class InsideFields(BaseModel):
    """The fields of a step that compares inside; what they weigh, `llmslim.distillation.features.Features` tells."""

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

    def check_pair(self, student: Anatomy, teacher: Anatomy) -> None:
        """Refuse two models whose blocks or heads cannot be paired; on meta."""
        if self.hidden:
            self._mapped(len(student.blocks), len(teacher.blocks))
        if self.attention:
            self.heads([student.blocks[-1].attention, teacher.blocks[-1].attention])

    def comparison(
        self, student: PreTrainedModel, teacher: PreTrainedModel, sample: Inputs, mask: Tensor | None = None
    ) -> Comparison:
        """Pair the parts of two models.

        Args:
            sample: what projections are fitted to, and the most alike blocks found by, before training.
            mask: of the sample, which tokens are no padding.
        """
        from llmslim.training.losses import hidden_states, self_relations

        students, teachers = Anatomy(student).blocks, Anatomy(teacher).blocks
        chosen = self._chosen(student, teacher, sample, mask) if self.hidden else []
        pairs = list(zip(students, chosen, strict=True)) if self.hidden else []
        blocks = [s.module for s, _ in pairs], [teachers[t].module for _, t in pairs]
        given = zip(*outputs(student, teacher, *blocks, sample, mask), strict=True) if pairs else ()
        projections = nn.ModuleList(projection(x, y) for x, y in given)
        attentions = [students[-1].attention, teachers[-1].attention] if self.attention else []
        heads = self.heads(attentions) if attentions else 0
        parts = [(a.q, a.k, a.v) for a in attentions]
        modules = [
            [*some, *(part.module for part in ps)] for some, ps in zip(blocks, parts or ((), ()), strict=True)
        ]

        def value(found: list[Tensor], wanted: list[Tensor], mask: Tensor | None) -> Tensor:
            total = found[0].new_zeros(())
            count = len(pairs)
            for project, mine, its in zip(projections, found[:count], wanted[:count], strict=True):
                if mask is not None:
                    mine, its = mine[mask], its[mask]
                total = total + self.hidden / count * hidden_states(project(mine), its)
            if parts:
                for mine, its, rows, its_rows in zip(found[count:], wanted[count:], *parts, strict=True):
                    mine, its = mine[..., rows.rows.to(mine.device)], its[..., its_rows.rows.to(its.device)]
                    total = total + self.attention / 3 * self_relations(mine, its, heads, mask)
            return total

        return Comparison((modules[0], modules[1]), projections, value)

    def _chosen(
        self, student: PreTrainedModel, teacher: PreTrainedModel, sample: Inputs, mask: Tensor | None
    ) -> list[int]:
        """For each block of the student, the index of its block of the teacher."""
        blocks, targets = ([block.module for block in Anatomy(one).blocks] for one in (student, teacher))
        fixed = self._mapped(len(blocks), len(targets))
        if self.layer_map != "learned":
            return fixed
        mine, its = outputs(student, teacher, blocks, targets, sample, mask)
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

    def heads(self, attentions: Sequence[Attention]) -> int:
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
def outputs(
    student: nn.Module,
    teacher: nn.Module,
    blocks: Sequence[nn.Module],
    targets: Sequence[nn.Module],
    sample: Inputs,
    mask: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """What blocks of the student, and of the teacher, give for a sample: [tokens, width] each.

    Args:
        sample: on the models' device.
        mask: bool [batch, seq], which of its tokens are no padding; all when None.
    """
    from llmslim.training.forward import observe

    rows = slice(None) if mask is None else mask.flatten()
    mine, its = observe(student, sample, blocks)[1], observe(teacher, sample, targets)[1]
    return [x.flatten(0, -2)[rows] for x in mine], [y.flatten(0, -2)[rows] for y in its]


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


@torch.no_grad()
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
