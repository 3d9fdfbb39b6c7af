"""Prune the channels of MLPs, and of the experts of a mixture."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmslim.anatomy import MLP, Anatomy, Block, Experts
from llmslim.anatomy.parts import dense_weight
from llmslim.edit import Edit
from llmslim.errors import UserError
from llmslim.experts import unfused
from llmslim.pruning.edits import NarrowExperts, NarrowMLP, narrow_experts, narrow_mlp
from llmslim.pruning.structured import Choice, Site, Structured, row_power
from llmslim.step import StepRecord

ALIGNED = 8  # channels: 16 bytes of a 16-bit type


class PruneMLP(Structured):
    """Remove channels of every MLP: row j of gate and up with column j of down.

    A channel matters by what its removal adds to ||(W - W') X||^2, W the down matrix and X its inputs. `obs` removes
    the cheapest, lets all others take over, and looks again (optimal brain surgeon, in groups); what stays is then
    refitted in closed form: W'_S = W_S + W_R H_RS (H_SS + lambda I)^-1, H = X^T X. Of a mixture, every expert
    chooses its own channels, equally many; the expert that all tokens share is left alone.
    """

    kind: ClassVar[str] = "mlp"

    multiple_of: int = Field(32, ge=1, description="the width that stays is a multiple of this")

    def sites(self, block: Block, removes: dict[str, int] | None = None) -> list[Site]:
        mlp = block.mlp
        if mlp is None:
            return []
        names = [mlp.down.name] if isinstance(mlp, MLP) else _downs(mlp)
        remove, least = self._remove(mlp.width), min(self.multiple_of, mlp.width)
        units = torch.arange(mlp.width).view(1, -1, 1)
        if removes is not None and names:
            remove = self._round(mlp.width, mlp.width - removes[names[0]])
        return [Site(name, units, remove, least) for name in names]

    def _remove(self, width: int) -> int:
        return self._round(width, width * (1 - self.ratio)) if self.ratio else 0

    def _round(self, width: int, kept: float) -> int:
        """Channels to remove so that the nearest multiple to `kept` stays; of two equally near the smaller."""
        multiples = max(1, math.ceil(kept / self.multiple_of - 0.5 - 1e-9))
        return max(0, width - multiples * self.multiple_of)

    def check(self, anatomy: Anatomy) -> None:
        self.check_dense(anatomy)
        for block in anatomy.blocks:
            mlp = block.mlp
            if mlp is not None and self.ratio and not self._remove(mlp.width):
                share = min(1.0, self.multiple_of / mlp.width)
                raise UserError(
                    f"ratio {self.ratio} removes none of the {mlp.width} channels of {block.name} in multiples of "
                    f"{self.multiple_of}; a ratio of {math.ceil(share * 1000) / 1000} or a smaller multiple_of does."
                )
            if isinstance(mlp, Experts) and self.ratio:
                self._check_experts(mlp, block.name)

    def _check_experts(self, mlp: Experts, block: str) -> None:
        """Refuse widths that torch's grouped products, one for all experts, cannot take."""
        left = mlp.width - self._remove(mlp.width)
        uneven = self.allocation == "sensitivity" and self.multiple_of % ALIGNED
        if left % ALIGNED or uneven:
            what = "channels by sensitivity" if uneven else f"{left} channels"
            raise UserError(
                f"multiple_of {self.multiple_of} leaves {what} to each expert of {block}, and experts compute at "
                f"multiples of {ALIGNED}: give a multiple of {ALIGNED}."
            )

    def amounts(self, anatomy: Anatomy) -> list[float]:
        self.check_dense(anatomy)
        widths = {block.mlp.width for block in anatomy.blocks if block.mlp is not None}
        shares: set[float] = set()
        for width in widths:
            kept = range(self.multiple_of, width, self.multiple_of)
            shares |= {round(1 - count / width, 6) for count in kept}
            if len(widths) > 1:  # blocks change at different ratios: also those at which one does
                shares |= {round(1 - (count + self.multiple_of / 2) / width + 1e-6, 6) for count in kept}
        steps = {share: self.with_amount(share) for share in sorted(shares)}
        return [share for share, step in steps.items() if all(step._remove(width) for width in widths)]

    def planned_edits(self, anatomy: Anatomy) -> list[Edit]:
        edits: list[Edit] = []
        for number, block in enumerate(anatomy.blocks):
            mlp = block.mlp
            if mlp is None or not self._remove(mlp.width):
                continue
            width = mlp.width - self._remove(mlp.width)
            if self.allocation == "sensitivity":  # known later; the format must hold uneven widths
                width = max(1, width - number % 2)
            if isinstance(mlp, Experts):
                edits.append(NarrowExperts(block=block.name, experts=None, width=width))
            else:
                edits.append(NarrowMLP(block=block.name, width=width))
        return edits

    def power(self, block: Block, site: Site) -> Tensor:
        mlp = block.mlp
        if isinstance(mlp, MLP):
            parts = [part for part in (mlp.down, mlp.up, mlp.gate) if part is not None]
            return torch.stack([row_power(part, self.exponent) for part in parts]).sum(0)[None]
        model, expert = block.model, site.name.rpartition(".")[0]
        both = dense_weight(model.get_submodule(f"{expert}.gate_up")).float().abs().pow(self.exponent).sum(1)
        down = dense_weight(model.get_submodule(site.name)).float().abs().pow(self.exponent).sum(0)
        return (down + both.view(2, -1).sum(0))[None]

    def opened(self, block: Block) -> AbstractContextManager[None]:
        """Fused experts are Linears meanwhile, to halt in front of each one's down."""
        return unfused(block)

    def narrow(self, block: Block, choices: dict[str, Choice], record: StepRecord) -> None:
        columns = [choice.columns for choice in choices.values()]
        if not columns or all(bool(choice.keep.all()) for choice in choices.values()):
            return
        mlp = block.mlp
        edit = narrow_mlp(block, columns[0]) if isinstance(mlp, MLP) else narrow_experts(block, None, columns)
        record.edits.append(edit)


def _downs(experts: Experts) -> list[str]:
    """Names of the experts' down matrices, as they are when unfused."""
    return [f"{experts.name}.{index}.down" for index in range(experts.num_experts)]
