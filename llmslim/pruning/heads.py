"""Prune attention heads: query heads one by one, or with the KV head that they read."""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from llmslim.anatomy import Anatomy, Attention, Block
from llmslim.calibration.stream import BlockStream
from llmslim.edit import Edit
from llmslim.errors import UserError
from llmslim.pruning.edits import NarrowAttention, narrow_attention
from llmslim.pruning.structured import Choice, Site, Structured, row_power
from llmslim.step import StepRecord


class PruneHeads(Structured):
    """Remove attention heads: rows of q, k and v with the columns of o that read them.

    A head matters by what its removal adds to ||(W - W') X||^2, W the o matrix and X its inputs: tr(W_h H_hh W_h^T)
    before the others are refitted, tr(W_h [H^-1]_hh^-1 W_h^T) after (`obs`). Cross-attention is pruned too. Where
    blocks share a table of position biases by head (T5), all keep the heads that the first one keeps.
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
                remove = _count(self.ratio, units.shape[1])
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
            wholes = [run * (groups - _count(self.ratio, groups)), groups * (run - _count(self.ratio, run))]
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
                    taken = _count(self.ratio, size)
                    raise UserError(
                        f"ratio {self.ratio} takes {taken} of the {size} {site.what}{run} of {block.name}, "
                        f"which is none or all; ratios that fit: {fitting}."
                    )
        if self.allocation == "sensitivity" and _shares_bias(anatomy):
            raise UserError(
                "allocation 'sensitivity' gives blocks different heads, but this model's blocks share one table of "
                "position biases by head; use 'uniform'."
            )

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
        rows = row_power(attention.o) + row_power(attention.q)
        if site.units.shape[0] == 1:  # whole groups: with their KV head
            run = attention.num_heads // attention.num_kv_heads
            kv = (row_power(attention.k) + row_power(attention.v)).view(attention.num_kv_heads, -1)
            rows = rows + (kv / run).repeat_interleave(run, 0).reshape(-1)
        power = torch.empty_like(rows)
        power[attention.o.rows] = rows
        return power[site.units].sum(2)

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        super().compress_block(block, stream, reference, record)
        _narrow_biases(block, stream, record)

    def narrow(self, block: Block, choices: dict[str, Choice], record: StepRecord) -> None:
        for name, choice in choices.items():
            if choice.keep.all():
                continue
            attention = _attention_of(block, name)
            heads = (choice.columns.view(-1, attention.head_dim)[:, 0] // attention.head_dim).to(torch.int64)
            record.edits.append(narrow_attention(block, heads, cross=attention.name != block.attention.name))

    def forced(self, block: Block, site: Site, record: StepRecord) -> Tensor | None:
        if not _reads_bias(block) or _attention_of(block, site.name).name != block.attention.name:
            return None
        first = _first(block).attention.o.name
        row = next(row for row in record.linears if row["name"] == first)
        keep = torch.zeros(site.units.shape[:2], dtype=torch.bool)
        keep.view(-1)[row["units"]] = True
        return keep


def _count(ratio: float, size: int) -> int:
    """How many of `size` units a ratio removes: to nearest, halves up."""
    return math.floor(ratio * size + 0.5)


def _fits(ratio: float, size: int) -> bool:
    return 0 < _count(ratio, size) < size


def _attention_of(block: Block, name: str) -> Attention:
    """The attention whose o matrix has this name."""
    cross = block.cross_attention
    return cross if cross is not None and cross.o.name == name else block.attention


def _edit(block: Block, attention: Attention, site: Site, remove: int, cross: bool) -> NarrowAttention:
    queries, groups = attention.num_heads, attention.num_kv_heads
    if site.units.shape[0] == 1:  # whole groups
        run, groups = queries // groups, groups - remove
        return NarrowAttention(block=block.name, heads=run * groups, kv_heads=groups, cross=cross)
    return NarrowAttention(block=block.name, heads=queries - groups * remove, kv_heads=groups, cross=cross)


def _reads_bias(block: Block) -> bool:
    """Whether the block is given its position biases by the first one of its stack."""
    return _first(block).attention.position_bias is not None and block.attention.position_bias is None


def _first(block: Block) -> Block:
    """The first block of the same stack."""
    return Block(block.model, block._family, block.name.rpartition(".")[0], 0)


def _shares_bias(anatomy: Anatomy) -> bool:
    return any(_reads_bias(block) for block in anatomy.blocks)


def _narrow_biases(block: Block, stream: BlockStream, record: StepRecord) -> None:
    """Cut the biases that the block's recorded calls bring along to the heads that stayed."""
    attentions = {"position_bias": block.attention, "encoder_decoder_position_bias": block.cross_attention}
    names = [name for name in inspect.signature(type(block.module).forward).parameters if name != "self"]
    units = {row["name"]: row["units"] for row in record.linears if row.get("block") == block.name}

    def cut(name: str, value: Any) -> Any:
        attention = attentions.get(name)
        if attention is None or not isinstance(value, Tensor) or attention.num_heads == value.shape[1]:
            return value
        return value[:, units[attention.o.name]]

    for lane in stream.lanes.values():
        for calls in {id(calls): calls for calls in lane.calls}.values():
            args, kwargs = calls[block.index]
            # the hidden states, the first argument, are not recorded
            args = tuple(cut(name, value) for name, value in zip(names[1:], args, strict=False))
            calls[block.index] = args, {name: cut(name, value) for name, value in kwargs.items()}
