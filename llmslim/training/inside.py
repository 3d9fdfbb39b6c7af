"""What a student can learn of a teacher's inside, whatever else its loss has.

Hidden states, attention maps, relations of the last attention; distances and angles between samples and between tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from llmslim.anatomy import Anatomy, Attention
from llmslim.errors import UserError
from llmslim.training.pairing import alikenesses, ascending, outputs, projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

    from llmslim.training.forward import Inputs, Seen

RUN = 32  # consecutive tokens that are set in relation to each other


@dataclass(frozen=True)
class View:
    """What is looked at in one of the two models: outputs of modules, and scores of attentions."""

    modules: list[nn.Module]
    attentions: list[nn.Module]

    def of(self, model: nn.Module, inputs: Inputs) -> Seen:
        from llmslim.training.forward import observe

        return observe(model, inputs, self.modules, self.attentions)


Term = Callable[["Seen", "Seen", "Tensor | None"], Tensor]
"""term(seen of the student, of the teacher, mask bool [batch, seq] or None) -> scalar."""


@dataclass(frozen=True)
class Comparison:
    """How a student is compared with its teacher.

    Attributes:
        views: of the student, and of the teacher.
        projections: to the teacher's width; trained with the student.
        terms: of the loss, with their weights.
    """

    views: tuple[View, View]
    projections: nn.ModuleList
    terms: list[tuple[float, Term]]

    def losses(self, mine: Seen, its: Seen, mask: Tensor | None) -> list[Tensor]:
        """Each term, weighed; none where nothing inside is compared.

        Args:
            mask: bool [batch, seq], which tokens are no padding; all when None.
        """
        return [weight * term(mine, its, mask) for weight, term in self.terms]


class _Views:
    """Collects what terms of a loss look at; one module may serve several."""

    def __init__(self) -> None:
        self.views = View([], []), View([], [])

    def watch(self, students: Sequence[nn.Module], teachers: Sequence[nn.Module]) -> slice:
        """Where the outputs of these modules are among those seen."""
        begun = len(self.views[0].modules)
        for view, modules in zip(self.views, (students, teachers), strict=True):
            view.modules.extend(modules)
        return slice(begun, begun + len(students))


class InsideFields(BaseModel):
    """The fields of a step that compares inside; what they weigh, `llmslim.distillation.features.Features` tells."""

    layer_map: Literal["uniform", "last", "learned"] = Field(
        "uniform",
        description="the teacher's blocks that the student's learn from: evenly spaced, its last, or the most alike",
    )
    hidden: float = Field(1.0, ge=0, description="weight of the hidden states")
    attention_maps: float = Field(0.0, ge=0, description="weight of the attention scores of each block")
    attention: float = Field(1.0, ge=0, description="weight of the last attention's relations")
    relation_heads: int | None = Field(
        None,
        ge=1,
        description="parts that queries, keys and values are split into; the teacher's KV heads when not given",
    )
    distance: float = Field(0.0, ge=0, description="weight of the distances between samples")
    angle: float = Field(0.0, ge=0, description="weight of the angles between three samples")
    token_distance: float = Field(0.0, ge=0, description="weight of the distances between tokens")
    token_angle: float = Field(0.0, ge=0, description="weight of the angles between three tokens")

    @model_validator(mode="after")
    def _of_what_is_compared(self) -> Self:
        if self.relation_heads is not None and not self.attention:
            raise ValueError("relation_heads splits what attention compares, whose weight is 0")
        if self.layer_map != "uniform" and not self.hidden and not self.attention_maps:
            raise ValueError(
                f"layer_map {self.layer_map} pairs blocks for hidden and attention_maps, whose weights are 0"
            )
        return self

    @property
    def inside(self) -> list[str]:
        """The names of the weights that are not 0."""
        names = (
            *("hidden", "attention_maps", "attention"),
            *("distance", "angle", "token_distance", "token_angle"),
        )
        return [name for name in names if getattr(self, name)]

    @property
    def related(self) -> int:
        """Samples that make one relation of each kind between samples."""
        return 3 if self.angle else 2 if self.distance else 1

    def require_batch(self, size: int) -> None:
        """Refuse batches that make no relation between samples; of a validator."""
        if size < self.related:
            raise ValueError(f"a batch_size of {size} makes no such relation; {self.related} does")

    def inside_bytes(self, anatomy: Anatomy, batch: int, window: int) -> int:
        """What comparing takes beside the two models, for a batch of windows of so many tokens; for the plan."""
        held = 0
        if self.attention_maps:  # both scores as made and as scaled, their difference, its gradient: measured
            held += 7 * window**2 * sum(block.attention.num_heads for block in anatomy.blocks)
        if self.token_distance or self.token_angle:  # differences within runs, their directions, twice each
            width = anatomy.model.config.get_text_config().hidden_size
            held += 4 * window * RUN * (width + RUN)
        return 4 * batch * held

    def check_pair(self, student: Anatomy, teacher: Anatomy) -> None:
        """Refuse two models whose blocks or heads cannot be paired; on meta."""
        if self.hidden or self.attention_maps:
            chosen = self._mapped(len(student.blocks), len(teacher.blocks))
            if self.attention_maps:
                self._check_maps(student, teacher, chosen)
        if self.attention:
            self.heads([student.blocks[-1].attention, teacher.blocks[-1].attention])

    def _check_maps(self, student: Anatomy, teacher: Anatomy, chosen: Sequence[int]) -> None:
        for anatomy, who in ((student, "student"), (teacher, "teacher")):
            implementation = anatomy.model.config._attn_implementation
            if implementation != "sdpa":
                raise UserError(
                    f"attention_maps {self.attention_maps:g} needs the scores of torch's scaled_dot_product_attention, "
                    f"and the {who}, a {type(anatomy.model).__name__}, runs on {implementation!r}: take attention, the "
                    "relations of its last block."
                )
        counts = [block.attention.num_heads for block in student.blocks]
        others = [block.attention.num_heads for block in teacher.blocks]
        for number, (mine, its) in enumerate(zip(counts, (others[index] for index in chosen), strict=True)):
            if mine != its or (self.layer_map == "learned" and set(others) != {mine}):
                raise UserError(
                    f"attention_maps {self.attention_maps:g} compares head by head, and block {number} of the student "
                    f"has {mine} heads where the teacher has {its}: take attention, whose heads may differ."
                )

    def comparison(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        samples: tuple[Inputs, Inputs],
        mask: Tensor | None = None,
    ) -> Comparison:
        """Pair the parts of two models.

        Args:
            samples: what projections are fitted to, and the most alike blocks found by, before training: the same
                sentences, as each of the two takes them.
            mask: of the sample, which tokens are no padding.
        """
        models, seen, projections = (student, teacher), _Views(), nn.ModuleList()
        terms: list[tuple[float, Term]] = []
        if self.hidden or self.attention_maps:
            students, teachers = (Anatomy(model).blocks for model in models)
            chosen = [teachers[index] for index in self._mapped(len(students), len(teachers))]
            mine, its = [block.module for block in students], [block.module for block in chosen]
            if self.layer_map == "learned":
                every = [block.module for block in teachers]
                states, targets = outputs(models, (mine, every), samples, mask)
                order = ascending(alikenesses(states, targets))
                chosen, targets = [teachers[index] for index in order], [targets[index] for index in order]
                its = [block.module for block in chosen]
            elif self.hidden:
                states, targets = outputs(models, (mine, its), samples, mask)
            if self.hidden:
                projections.extend(projection(x, y) for x, y in zip(states, targets, strict=True))
                terms.append((self.hidden, _hidden(seen.watch(mine, its), projections)))
            if self.attention_maps:
                for view, blocks in zip(seen.views, (students, chosen), strict=True):
                    view.attentions.extend(block.attention.module for block in blocks)
                terms.append((self.attention_maps, _maps))
        if self.attention:
            terms.append((self.attention, self._relations(models, seen)))
        if self.distance or self.angle or self.token_distance or self.token_angle:
            place = seen.watch([_last(student)], [_last(teacher)]).start
            terms += self._relating(place)

        return Comparison(seen.views, projections, terms)

    def _relations(self, models: tuple[PreTrainedModel, PreTrainedModel], seen: _Views) -> Term:
        """Of queries, keys and values of the last blocks."""
        from llmslim.training.losses import self_relations

        attentions = [Anatomy(model).blocks[-1].attention for model in models]
        heads = self.heads(attentions)
        parts = [(a.q, a.k, a.v) for a in attentions]
        place = seen.watch(*[[part.module for part in three] for three in parts])

        def term(mine: Seen, its: Seen, mask: Tensor | None) -> Tensor:
            total = mine.given[place.start].new_zeros(())
            for x, y, rows, its_rows in zip(mine.given[place], its.given[place], *parts, strict=True):
                x, y = x[..., rows.rows.to(x.device)], y[..., its_rows.rows.to(y.device)]
                total = total + self_relations(x, y, heads, mask) / len(parts[0])
            return total

        return term

    def _relating(self, place: int) -> list[tuple[float, Term]]:
        """Of samples and tokens, by the last hidden states, which stand at a place of what is seen."""
        from llmslim.training import losses

        def samples(loss: Callable[[Tensor, Tensor], Tensor]) -> Term:
            def term(mine: Seen, its: Seen, mask: Tensor | None) -> Tensor:
                return loss(_averages(mine.given[place], mask), _averages(its.given[place], mask))

            return term

        def tokens(loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Term:
            def term(mine: Seen, its: Seen, mask: Tensor | None) -> Tensor:
                x, y = (one.given[place] for one in (mine, its))
                if mask is None:
                    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
                return loss(_runs(x), _runs(y), _runs(mask[..., None])[..., 0])

            return term

        weighted = [
            (self.distance, samples(losses.distances)),
            (self.angle, samples(losses.angles)),
            (self.token_distance, tokens(losses.distances)),
            (self.token_angle, tokens(losses.angles)),
        ]
        return [(weight, term) for weight, term in weighted if weight]

    def _mapped(self, students: int, teachers: int) -> list[int]:
        """For each block of the student the index of its block of the teacher; of `learned`, before it looks."""
        if students > teachers:
            raise UserError(
                f"The student has {students} blocks and the teacher {teachers}: features are learned from a teacher "
                "with as many or more; set hidden and attention_maps to 0, or use response."
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


def _hidden(place: slice, projections: nn.ModuleList) -> Term:
    """The mean over blocks."""
    from llmslim.training.losses import hidden_states

    def term(mine: Seen, its: Seen, mask: Tensor | None) -> Tensor:
        total = mine.given[place.start].new_zeros(())
        for project, x, y in zip(projections, mine.given[place], its.given[place], strict=True):
            if mask is not None:
                x, y = x[mask], y[mask]
            total = total + hidden_states(project(x), y) / len(projections)
        return total

    return term


def _maps(mine: Seen, its: Seen, mask: Tensor | None) -> Tensor:
    """The mean over blocks."""
    from llmslim.training.losses import attention_scores

    total = mine.scores[0].values.new_zeros(())
    for x, y in zip(mine.scores, its.scores, strict=True):
        total = total + attention_scores(x, y, mask) / len(mine.scores)
    return total


def _averages(states: Tensor, mask: Tensor | None) -> Tensor:
    """Of [batch, seq, width] the means over tokens that are no padding: [batch, width]."""
    if mask is None:
        return states.float().mean(1)
    return (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)


def _runs(states: Tensor) -> Tensor:
    """[batch, seq, width] in runs of tokens, the last one padded: [batch, runs, RUN, width]."""
    short = -states.shape[1] % RUN
    return F.pad(states, (0, 0, 0, short)).unflatten(1, (-1, RUN))


def _last(model: PreTrainedModel) -> nn.Module:
    """The module that gives the last hidden states."""
    anatomy = Anatomy(model)
    return anatomy.final_norm[1] if anatomy.final_norm else anatomy.blocks[-1].module
