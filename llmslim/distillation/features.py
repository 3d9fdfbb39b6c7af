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

    TinyBERT's attention maps (which fast attention does not give) and embeddings are left out.
    """

    kind: ClassVar[str] = "features"
    verb: ClassVar[str] = "distill"

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
        pairs = (
            list(zip(students, self._mapped(len(students), len(teachers)), strict=True))
            if self.hidden
            else []
        )
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
    from llmslim.training.forward import observe

    some = tokens[: max(1, SAMPLE // tokens.shape[1])].to(next(student.parameters()).device)
    outputs = observe(student, some, blocks)[1], observe(teacher, some, targets)[1]
    return nn.ModuleList(
        projection(x.flatten(0, -2), y.flatten(0, -2)) for x, y in zip(*outputs, strict=True)
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
