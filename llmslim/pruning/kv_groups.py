"""Fewer KV heads for the same query heads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmslim.anatomy import Anatomy, Attention, Block
from llmslim.anatomy.parts import dense_weight
from llmslim.calibration.stream import BlockStream
from llmslim.edit import Edit
from llmslim.errors import UserError
from llmslim.pruning import importance
from llmslim.pruning.amount import check_dense
from llmslim.pruning.edits import PoolKVHeads, pool_kv_heads
from llmslim.step import BlockStep, StepRecord

_FIELD = "num_key_value_heads"


class KVGroups(BlockStep):
    """Pool the KV heads of each group into their mean: grouped-query attention; all query heads stay.

    Rows of k and v (with their biases) are averaged over consecutive heads, as GQA converts multi-head attention
    before it trains on (Ainslie et al. 2023, arXiv:2305.13245). With `refit`, o then comes closest to what the block's
    attention gave before, by least squares on the same inputs of the block.
    """

    kind: ClassVar[str] = "kv_groups"
    verb: ClassVar[str] = "prune"

    kv_heads: int | None = Field(
        None,
        ge=1,
        description="KV heads that stay, a divisor of how many there are; their largest below it when not given",
    )
    refit: bool = Field(True, description="refit the weights that read what stays")
    refit_damping: float = Field(
        1e-4, gt=0, le=1, description="pull to the old weights, x the mean square input"
    )

    @model_validator(mode="after")
    def _consistent(self) -> KVGroups:
        self.require_option("refit_damping", self.refit, "refit")
        return self

    @property
    def needs_calibration(self) -> bool:
        return self.refit

    def check(self, anatomy: Anatomy) -> None:
        check_dense(anatomy, self.kind)
        config = anatomy.model.config
        if not hasattr(type(config), _FIELD) and _FIELD not in config.attribute_map:
            raise UserError(
                f"The config of a {anatomy.family} model has no {_FIELD}, so that each query head needs a KV head of "
                "its own; kv_groups is for families that have it (llama, mistral, qwen2, qwen3)."
            )
        for block in anatomy.blocks:
            count, fitting = block.attention.num_kv_heads, _fitting(block.attention)
            if not fitting:
                raise UserError(
                    f"{block.name} has one KV head, which all query heads read: none can be pooled."
                )
            if self.kv_heads is not None and self.kv_heads not in fitting:
                raise UserError(
                    f"kv_heads {self.kv_heads} is no smaller divisor of the {count} KV heads of {block.name}; "
                    f"possible: {', '.join(map(str, fitting))}."
                )

    def planned_edits(self, anatomy: Anatomy) -> list[Edit]:
        return [PoolKVHeads(block=b.name, kv_heads=self._count(b.attention)) for b in anatomy.blocks]

    def workspace_bytes(self, anatomy: Anatomy) -> int:
        """Of the refit: H, damped and factored in float64, and the cross moments."""
        width = max((len(block.attention.o.rows) for block in anatomy.blocks), default=0)
        hidden = anatomy.model.config.get_text_config().hidden_size
        return width * (20 * width + 24 * hidden) if self.refit else 0

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        name, stay = block.attention.o.name, self._count(block.attention)
        row: dict[str, Any] = {"name": name, "block": block.name, "what": "KV heads", "kept": stay}
        row["total"] = block.attention.num_kv_heads
        lane = stream.lanes.get("calibration")
        if not self.refit or lane is None:
            record.edits.append(pool_kv_heads(block, stay))
            if lane is not None:
                stream.forward(block, lane)
        else:
            start = list(lane.hidden)
            weight = dense_weight(block.attention.o.module).detach()
            wanted = [chunk @ weight.T for chunk in stream.inputs_of(block, lane, [name])[name]]
            lane.hidden[:] = start  # once more, through the pooled heads
            record.edits.append(pool_kv_heads(block, stay))
            errors: list[float] = []
            stream.walk(
                block, lane, [name], lambda _, inputs: errors.append(self._refit(block, wanted, inputs))
            )
            row |= {"output_error": errors[0], "tokens": sum(chunk[..., 0].numel() for chunk in wanted)}
        record.linears.append(row)

    def _count(self, attention: Attention) -> int:
        return _fitting(attention)[-1] if self.kv_heads is None else self.kv_heads

    @torch.no_grad()
    def _refit(self, block: Block, wanted: list[Tensor], inputs: list[Tensor]) -> float:
        """Put o in place that gives `wanted` [..., hidden] best; ||wanted - W' X||^2 / ||wanted||^2."""
        weight = dense_weight(block.attention.o.module)
        weight.copy_(
            importance.least_squares(*importance.moments(wanted, inputs), self.refit_damping, weight)
        )
        lost = sum(
            float((full.float() - (chunk @ weight.T).float()).square().sum())
            for full, chunk in zip(wanted, inputs, strict=True)
        )
        return lost / max(sum(float(full.float().square().sum()) for full in wanted), 1e-30)


def _fitting(attention: Attention) -> list[int]:
    """The numbers of KV heads that pooling can leave, ascending."""
    count = attention.num_kv_heads
    return [number for number in range(1, count) if count % number == 0]
