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

    layer_map: Literal["uniform", "last"] = Field(
        "uniform",
        description="the teacher's blocks that the student's learn from: evenly spaced, or its last ones",
    )
    hidden: float = Field(1.0, ge=0, description="weight of the hidden states")
    attention: float = Field(1.0, ge=0, description="weight of the last attention's relations")
    relation_heads: int | None = Field(
        None,
        ge=1,
        description="parts that queries, keys and values are split into; the teacher's KV heads when not given",
    )

    def comparison(
        self, student: PreTrainedModel, teacher: PreTrainedModel, sample: Inputs, mask: Tensor | None = None
    ) -> Comparison:
        """Pair the parts of two models.

        Args:
            sample: what projections are fitted to before training.
            mask: of the sample, which tokens are no padding.
        """
        from llmslim.training.losses import hidden_states, self_relations

        students, teachers = Anatomy(student).blocks, Anatomy(teacher).blocks
        pairs = (
            list(zip(students, self._mapped(len(students), len(teachers)), strict=True))
            if self.hidden
            else []
        )
        blocks = [s.module for s, _ in pairs], [teachers[t].module for _, t in pairs]
        projections = fitted(student, teacher, *blocks, sample, mask) if pairs else nn.ModuleList()
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

    def _mapped(self, students: int, teachers: int) -> list[int]:
        """For each block of the student, the index of its block of the teacher."""
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
def fitted(
    student: nn.Module,
    teacher: nn.Module,
    blocks: Sequence[nn.Module],
    targets: Sequence[nn.Module],
    sample: Inputs,
    mask: Tensor | None = None,
) -> nn.ModuleList:
    """For each block, what takes its output to the width of its target's: nothing, or a Linear without bias.

    Args:
        sample: what the Linears are fitted to, on the models' device.
        mask: bool [batch, seq], which of its tokens are no padding; all when None.
    """
    from llmslim.training.forward import observe

    outputs = observe(student, sample, blocks)[1], observe(teacher, sample, targets)[1]
    rows = slice(None) if mask is None else mask.flatten()
    return nn.ModuleList(
        projection(x.flatten(0, -2)[rows], y.flatten(0, -2)[rows]) for x, y in zip(*outputs, strict=True)
    )


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
