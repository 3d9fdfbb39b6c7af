"""Prune whole experts of a mixture, by what the router and the experts do on a text."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from llmslim.anatomy import Anatomy, Block, Experts
from llmslim.calibration.stream import BlockStream, Lane
from llmslim.edit import Edit
from llmslim.errors import UserError
from llmslim.experts import UnfusedExperts, unfused
from llmslim.pruning.amount import Share, to_nearest
from llmslim.pruning.edits import NarrowExperts, narrow_experts
from llmslim.step import StepRecord


class PruneExperts(Share):
    """Remove whole experts of a mixture, with their rows of the router; equally many from every block.

    With g_e(x) the router's weight for expert e and f_e(x) its output, an expert e matters by the mean of
    g_e(x) ||f_e(x)|| over the tokens x that go to it (`output`: REAP, arXiv:2510.13999), or by the sum of g_e(x)
    (`routing`). Tokens of a removed expert go to the best of the others. Searching all subsets of experts
    (arXiv:2402.14800) is left out, as are merging experts and refitting those that stay.
    """

    kind: ClassVar[str] = "experts"

    ranking: Literal["output", "routing", "random"] = Field(
        "output",
        description="which experts matter least: output, by router weight x norm of what they give; routing, by "
        "router weight; random",
    )

    @property
    def needs_calibration(self) -> bool:
        return self.ranking != "random"

    def check(self, anatomy: Anatomy) -> None:
        self.check_dense(anatomy)
        for block, experts in self._mixtures(anatomy):
            count, least = experts.num_experts, experts.top_k
            if self.ratio and not self._fits(experts):
                remove = to_nearest(self.ratio, count)
                fitting = ", ".join(f"{n / count:.3g}" for n in range(1, count - least + 1)) or "none"
                raise UserError(
                    f"ratio {self.ratio:g} takes {remove} of the {count} experts of {block.name}, of which at least "
                    f"{least} must stay, since a token goes to so many; ratios that fit: {fitting}."
                )

    def amounts(self, anatomy: Anatomy) -> list[float]:
        self.check_dense(anatomy)
        mixtures = [experts for _, experts in self._mixtures(anatomy)]
        shares = {round(n / e.num_experts, 6) for e in mixtures for n in range(1, e.num_experts)}
        steps = {share: self.with_amount(share) for share in sorted(shares)}
        return [share for share, step in steps.items() if all(step._fits(experts) for experts in mixtures)]

    def planned_edits(self, anatomy: Anatomy) -> list[Edit]:
        return [
            NarrowExperts(block=block.name, experts=experts.num_experts - remove)
            for block, experts in self._mixtures(anatomy)
            if (remove := to_nearest(self.ratio, experts.num_experts))
        ]

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        experts = block.mlp
        lane = stream.lanes.get("calibration")
        if isinstance(experts, Experts) and to_nearest(self.ratio, experts.num_experts):
            self._narrow(block, experts, stream, lane, record)
        if lane is not None:
            stream.forward(block, lane)

    def _narrow(
        self, block: Block, experts: Experts, stream: BlockStream, lane: Lane | None, record: StepRecord
    ) -> None:
        mixture = experts.name.rpartition(".")[0]
        seen = Routing.of(block, experts, stream, lane) if lane is not None else None
        scores = self._scores(experts, seen)
        remove = to_nearest(self.ratio, experts.num_experts)
        stay = scores.argsort(stable=True)[remove:].sort().values
        row: dict[str, Any] = {
            "name": experts.name,
            "block": block.name,
            "what": "experts",
            "kept": len(stay),
            "total": experts.num_experts,
            "units": stay.tolist(),
        }
        record.edits.append(narrow_experts(block, stay))
        if seen is not None:
            row["tokens"] = sum(len(inputs) for inputs in seen.inputs)
            row["output_error"] = seen.error(block.model.get_submodule(mixture))
            for expert in (seen.tokens == 0).nonzero()[:, 0].tolist():
                record.note(
                    f"{experts.name}.{expert}", "no calibration token reached it: it counts as nothing"
                )
        record.linears.append(row)

    def _scores(self, experts: Experts, seen: Routing | None) -> Tensor:
        """[experts], how much each matters."""
        if seen is None:  # random: of the name, the same in every run
            generator = torch.Generator().manual_seed(zlib.crc32(experts.name.encode()))
            return torch.rand(experts.num_experts, generator=generator)
        return seen.weight if self.ranking == "routing" else seen.output / seen.tokens.clamp_min(1)

    def _mixtures(self, anatomy: Anatomy) -> list[tuple[Block, Experts]]:
        found = [(block, mlp) for block in anatomy.blocks if isinstance(mlp := block.mlp, Experts)]
        if not found:
            raise UserError(
                f"A {anatomy.family} model has no experts to prune; --method mlp prunes its channels."
            )
        return found

    def _fits(self, experts: Experts) -> bool:
        return 0 < to_nearest(self.ratio, experts.num_experts) <= experts.num_experts - experts.top_k


@dataclass
class Routing:
    """What the experts of a block do with a text, as sums over its tokens.

    Attributes:
        tokens, weight, output: float64 [experts]: how many tokens go to each, the sum of the router's weights
            g, and the sum of g x norm of the expert's output.
        inputs, outputs: of the whole mixture, [tokens, hidden] per chunk.
    """

    tokens: Tensor
    weight: Tensor
    output: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, block: Block, experts: Experts, stream: BlockStream, lane: Lane) -> Routing:
        """Of a lane in front of the block, which stays there."""
        zeros = torch.zeros(3, experts.num_experts, dtype=torch.float64)
        seen = cls(zeros[0], zeros[1], zeros[2])
        with unfused(block), seen._watching(block, experts):
            stream.forward(block, replace(lane, hidden=list(lane.hidden)))
        return seen

    @contextmanager
    def _watching(self, block: Block, experts: Experts) -> Iterator[None]:
        module = block.model.get_submodule(experts.name)
        mixture = block.model.get_submodule(experts.name.rpartition(".")[0])
        handles = [
            module.register_forward_pre_hook(lambda module, args: self.add(module, *args)),
            mixture.register_forward_hook(lambda module, args, output: self._keep(args[0], output)),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, experts: UnfusedExperts, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """Add tokens: hidden [tokens, H], the experts index [tokens, k] they go to, and with what weights."""
        for number in range(len(experts)):
            token, slot = torch.where(index == number)
            if len(token):
                weight = weights[token, slot].double()
                norm = experts[number](hidden[token], experts.act_fn).double().norm(dim=-1)
                self.tokens[number] += len(token)
                self.weight[number] += weight.sum().cpu()
                self.output[number] += (weight * norm).sum().cpu()

    def _keep(self, inputs: Tensor, output: Tensor) -> None:
        self.inputs.append(inputs.flatten(0, -2))
        self.outputs.append(output.flatten(0, -2))

    @torch.no_grad()
    def error(self, mixture: nn.Module) -> float:
        """||y - y'||^2 / ||y||^2 of what the mixture gave and what it gives now."""
        lost = power = 0.0
        for inputs, output in zip(self.inputs, self.outputs, strict=True):
            now = mixture(inputs[None])[0]
            lost += float((output - now).double().square().sum())
            power += float(output.double().square().sum())
        return lost / max(power, 1e-30)
