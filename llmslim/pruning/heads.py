"""Prune attention heads: query heads one by one, or with the KV head that they read."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmslim.anatomy import Anatomy, Attention, Block
from llmslim.edit import Edit
from llmslim.errors import UserError
from llmslim.pruning._position_bias import takes_position_bias
from llmslim.pruning.amount import Share, to_nearest
from llmslim.pruning.edits import NarrowAttention, narrow_attention
from llmslim.pruning.structured import Choice, Site, Structured, row_power
from llmslim.step import Outlook, StepRecord

if TYPE_CHECKING:
    from typing_extensions import Self


class PruneHeads(Structured):
    """Remove attention heads: rows of q, k and v with the columns of o that read them.

    A head matters by what its removal adds to ||(W - W') X||^2, W the o matrix and X its inputs: tr(W_h H_hh W_h^T)
    before the others are refitted, tr(W_h [H^-1]_hh^-1 W_h^T) after (`obs`). Cross-attention is pruned too.
    """

    kind: ClassVar[str] = "heads"

    unit: Literal["auto", "group", "query"] = Field(
        "auto",
        description="group: a KV head and its readers; query: query heads, equally many of every group; "
        "auto: groups, if the ratio takes out a whole one",
    )

    def sites(self, block: Block, removes: dict[str, int] | None = None) -> list[Site]:
        sites: list[Site] = []
        for attention in (block.attention, block.cross_attention):
            if attention is not None:
                units = self._units(attention, block.model.config.hidden_size)
                remove = to_nearest(self.ratio, units.shape[1])
                if removes is not None:
                    remove = removes[attention.o.name]
                whole = units.shape[0] == 1 and attention.num_heads > attention.num_kv_heads
                what = "KV groups" if whole else "heads"
                together = "cross" if attention is not block.attention and sites else "self"
                sites.append(Site(attention.o.name, units, remove, what=what, together=together))
        return sites

    def _units(self, attention: Attention, hidden: int) -> Tensor:
        """Columns of o: [1, groups, group width] or [groups, heads of one, head_dim]."""
        queries, groups = attention.num_heads, attention.num_kv_heads
        by_group = attention.o.rows.view(1, groups, -1)
        by_query = attention.o.rows.view(groups, queries // groups, -1)
        if self.unit != "auto":
            return by_group if self.unit == "group" else by_query
        if not _fits(self.ratio, groups):
            return by_query
        run = queries // groups
        if _fits(
            self.ratio, run
        ):  # both do: prefer heads that divide the hidden size, as many configs want it
            wholes = [
                run * (groups - to_nearest(self.ratio, groups)),
                groups * (run - to_nearest(self.ratio, run)),
            ]
            if hidden % wholes[0] and not hidden % wholes[1]:
                return by_query
        return by_group

    def check(self, anatomy: Anatomy) -> None:
        self.check_dense(anatomy)
        for block in anatomy.blocks:
            for site in self.sites(block):
                size = site.units.shape[1]
                if self.ratio and not _fits(self.ratio, size):
                    run = "" if site.units.shape[0] == 1 else " of every group"
                    fitting = ", ".join(f"{n / size:.3g}" for n in range(1, size)) or "none"
                    taken = to_nearest(self.ratio, size)
                    raise UserError(
                        f"ratio {self.ratio} takes {taken} of the {size} {site.what}{run} of {block.name}, "
                        f"which is none or all; ratios that fit: {fitting}."
                    )

    def amounts(self, anatomy: Anatomy) -> list[float]:
        """By what they leave: with unit auto a larger ratio may take less, going by query heads."""
        self.check_dense(anatomy)
        halves: set[tuple[int, int]] = set()  # 2 n of n / size, and of (n - 1/2) / size, where counts change
        for block in anatomy.blocks:
            for attention in (block.attention, block.cross_attention):
                if attention is not None:
                    groups, run = attention.num_kv_heads, attention.num_heads // attention.num_kv_heads
                    halves |= {(n, size) for size in (groups, run) for n in range(1, 2 * size)}
        ratios: dict[int, float] = {}
        for twice, size in sorted(halves, key=lambda half: (half[0] % 2, half)):  # the round ones first
            step = self.with_amount(round(twice / (2 * size) + 1e-6 * (twice % 2), 6))
            if step.allowed(anatomy):
                planned = [edit for edit in step.planned_edits(anatomy) if isinstance(edit, NarrowAttention)]
                ratios.setdefault(sum(edit.heads + edit.kv_heads for edit in planned), step.ratio)
        return [ratios[left] for left in sorted(ratios, reverse=True)]

    def parts(self, shares: list[float], outlook: Outlook) -> list[Self]:
        """By the same units in every round, those that unit auto takes for the whole."""
        whole, hidden = self.with_amount(shares[-1]), outlook.anatomy.model.config.hidden_size
        found = set()
        for block in outlook.anatomy.blocks:
            for attention in (block.attention, block.cross_attention):
                if attention is not None:
                    sizes = whole._units(attention, hidden).shape
                    found.add("group" if sizes[:2] == (1, attention.num_kv_heads) else "query")
        unit = found.pop() if len(found) == 1 else "auto"
        return Share.parts(self.model_copy(update={"unit": unit}), shares, outlook)

    def planned_edits(self, anatomy: Anatomy) -> list[Edit]:
        edits: list[Edit] = []
        for number, block in enumerate(anatomy.blocks):
            for cross, site in enumerate(self.sites(block)):
                if not site.remove:
                    continue
                attention = block.cross_attention if cross else block.attention
                assert attention is not None
                remove = site.remove
                if self.allocation == "sensitivity":  # known later; the format must hold uneven counts
                    remove -= number % 2
                edits.append(_edit(block, attention, site, remove, bool(cross)))
        return edits

    def power(self, block: Block, site: Site) -> Tensor:
        attention = _attention_of(block, site.name)
        rows = row_power(attention.o, self.exponent) + row_power(attention.q, self.exponent)
        if site.units.shape[0] == 1:  # whole groups: with their KV head
            run = attention.num_heads // attention.num_kv_heads
            kv = row_power(attention.k, self.exponent) + row_power(attention.v, self.exponent)
            kv = kv.view(attention.num_kv_heads, -1)
            rows = rows + (kv / run).repeat_interleave(run, 0).reshape(-1)
        power = torch.empty_like(rows)
        power[attention.o.rows] = rows
        return power[site.units].sum(2)

    def narrow(self, block: Block, choices: dict[str, Choice], record: StepRecord) -> None:
        for name, choice in choices.items():
            if choice.keep.all():
                continue
            attention = _attention_of(block, name)
            heads = (choice.columns.view(-1, attention.head_dim)[:, 0] // attention.head_dim).to(torch.int64)
            record.edits.append(narrow_attention(block, heads, cross=attention.name != block.attention.name))


def _fits(ratio: float, size: int) -> bool:
    return 0 < to_nearest(ratio, size) < size


def _attention_of(block: Block, name: str) -> Attention:
    """The attention whose o matrix has this name."""
    cross = block.cross_attention
    return cross if cross is not None and cross.o.name == name else block.attention


def _edit(block: Block, attention: Attention, site: Site, remove: int, cross: bool) -> NarrowAttention:
    """The edit as it will be, except for which heads stay: the first ones, where the edit notes that."""
    run, groups = attention.num_heads // attention.num_kv_heads, attention.num_kv_heads
    if site.units.shape[0] == 1:  # whole groups
        groups -= remove
    else:
        run -= remove
    heads = run * groups
    kept = tuple(range(heads)) if takes_position_bias(attention.module) else None
    return NarrowAttention(block=block.name, heads=heads, kv_heads=groups, cross=cross, kept=kept)
