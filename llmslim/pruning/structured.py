"""What pruning of heads and of channels share: a matrix whose inputs go in units, which stay, and its refit."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy, Block, Experts
from llmslim.anatomy.parts import Projection, dense_weight, is_conv1d
from llmslim.calibration.statistics import InputStats, check_inputs, output_error, output_power
from llmslim.calibration.stream import BlockStream
from llmslim.pruning import importance
from llmslim.pruning.amount import Share
from llmslim.step import StepRecord, Survey

_LOOKS = 64  # how often the costs of what is left are looked at anew while channels are removed
_REMOVE = "remove "  # begins the name under which a survey keeps how many units a matrix loses
_LISTED = 256  # so many units, and the report names those that stay


@dataclass
class Site:
    """One matrix whose inputs are pruned.

    Attributes:
        name: dotted name of the matrix (o, down) that reads what is pruned.
        units: int64 [pools, size, width], its columns by unit; every pool loses equally many units.
        remove: units to remove from every pool.
        least: units of every pool that must stay.
        what: what a unit is called in the report.
        together: sites of a block with the same word here keep equally many units.
    """

    name: str
    units: Tensor
    remove: int
    least: int = 1
    what: str = "channels"
    together: str = ""


@dataclass
class Choice:
    """What stays at a site: `keep` bool [pools, size], and the columns of the matrix that stay, ascending."""

    keep: Tensor
    columns: Tensor


class Moments:
    """Second moments of a matrix's inputs, as choosing and refitting need them.

    Attributes:
        affine: the mean, `mean` [in], is left to the bias: moments are those of the centered inputs.
        hessian: X^T X, float32 [in, in].
        damped: H + lambda I, float64, computed when first asked for.
    """

    def __init__(self, inputs: Sequence[Tensor], affine: bool, damping: float) -> None:
        self.stats, self.affine, self.damping = InputStats.of(inputs), affine, damping
        self.hessian = self.stats.hessian
        if affine:
            rows = (chunk.reshape(-1, chunk.shape[-1]).float() for chunk in inputs)
            self.mean = torch.stack([chunk.sum(0) for chunk in rows]).sum(0) / self.stats.tokens
            centered = InputStats(len(self.mean), self.mean.device)
            for chunk in inputs:  # taken off the sums, a mean that is large would leave rounding errors alone
                centered.add(chunk.float() - self.mean)
            self.hessian = centered.finish().hessian

    @cached_property
    def damped(self) -> Tensor:
        return importance.damped(self.hessian, self.damping)

    def bias_shift(self, weight: Tensor, new: Tensor) -> Tensor:
        """[out], what the bias gains so that the mean output stays what it is with `weight`."""
        return (weight - new) @ self.mean


class Structured(Share):
    """A step that removes units of a block's inner width. Subclasses say which (`sites`) and do it (`narrow`)."""

    criterion: Literal["obs", "output", "magnitude", "magnitude-l1", "taylor", "random"] = Field(
        "obs",
        description="what matters least: obs, output error after refit; output, before it; magnitude, "
        "L2 norm of the weights; magnitude-l1; taylor, gradient x weight; random",
    )
    refit: bool = Field(True, description="refit the weights that read what stays")
    refit_damping: float = Field(
        1e-4, gt=0, le=1, description="pull to the old weights, x the mean square input"
    )
    allocation: Literal["uniform", "sensitivity"] = Field(
        "uniform",
        description="the same width in every block, or more removed where it costs least",
    )
    ratio_range: float = Field(
        0.1, gt=0, le=1, description="allocation sensitivity: how far a block's ratio may be from the mean"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Structured:
        self.require_option(
            "refit_damping", self.refit or self.criterion == "obs", "refit and of criterion obs"
        )
        self.require_option("ratio_range", self.allocation == "sensitivity", "allocation sensitivity")
        return self

    @property
    def uneven(self) -> str:
        return "allocation sensitivity" if self.allocation == "sensitivity" else ""

    @property
    def needs_calibration(self) -> bool:
        return self.refit or self.criterion in ("obs", "output", "taylor") or self.needs_survey

    @property
    def needs_survey(self) -> bool:
        """Whether the uncompressed model is looked at before the first block is changed."""
        return self.allocation == "sensitivity" or self.criterion == "taylor"

    @property
    def exponent(self) -> int:
        """Of the norm that magnitudes are taken by: L1, or L2 squared."""
        return 1 if self.criterion == "magnitude-l1" else 2

    def sites(self, block: Block, removes: dict[str, int] | None = None) -> list[Site]:
        """What is pruned in a block, in order of execution.

        Args:
            removes: by matrix, how many units to remove from every pool; the same share everywhere when None.
        """
        raise TypeError(f"{type(self).__name__} does not define sites()")

    def power(self, block: Block, site: Site) -> Tensor:
        """[pools, size], the sum of |w|^`exponent` over all weights that a unit takes with it."""
        raise TypeError(f"{type(self).__name__} does not define power()")

    def opened(self, block: Block) -> AbstractContextManager[None]:
        """Has the block's sites as Linears meanwhile."""
        return nullcontext()

    def narrow(self, block: Block, choices: dict[str, Choice], record: StepRecord) -> None:
        """Take out of a block what does not stay; `choices` by matrix, in the order of `sites`."""
        raise TypeError(f"{type(self).__name__} does not define narrow()")

    def workspace_bytes(self, anatomy: Anatomy) -> int:
        widths = [site.units.numel() for block in anatomy.blocks for site in self.sites(block)]
        hidden = anatomy.model.config.get_text_config().hidden_size
        # the Hessian and its damped copy, inverse and factor; the weight, its copy and the moved one
        return max((width * (64 * width + 24 * hidden) for width in widths), default=0)

    @property
    def survey_copies(self) -> int:
        return 1 if self.criterion == "taylor" else 0

    def survey(self, look: Survey) -> dict[str, Tensor]:
        """Scores of all units of the uncompressed model: matrix name -> [pools, size].

        With sensitivity also how many units each matrix loses, settled here, where no block is narrowed yet.
        """
        scores = self._taylor(look) if self.criterion == "taylor" else self._streamed(look)
        found = {name: score.cpu() for name, score in scores.items()}
        if self.allocation == "sensitivity":
            removes = self._removes(look.anatomy, found)
            found.update({_REMOVE + name: torch.tensor(count) for name, count in removes.items()})
        return found

    def _streamed(self, look: Survey) -> dict[str, Tensor]:
        """The scores, block by block."""
        scores: dict[str, Tensor] = {}
        for block, stream in look.blocks():
            sites = {site.name: site for site in self.sites(block)}

            def visit(name: str, inputs: list[Tensor], block=block, stream=stream, sites=sites) -> None:
                site, linear = sites[name], stream.model.get_submodule(name)
                weight, moments = dense_weight(linear).float(), self._moments(linear, inputs)
                check_inputs(name, moments.stats, "pruned", "mend the model")
                cost, stats = self._scores(block, site, weight, moments, None), moments.stats
                # an error counts by its share of the output, so that blocks of any scale compare
                power = output_power(weight, stats.hessian).clamp_min(1e-30)
                scores[name] = cost / power if self.criterion in ("obs", "output") else cost / cost.mean()

            with self.opened(block):
                stream.walk(block, stream.lanes["calibration"], list(sites), visit)
                for name in sites.keys() - scores.keys():  # an expert that no token reached: nothing lost
                    scores[name] = torch.zeros(sites[name].units.shape[:2])
        return scores

    def _taylor(self, look: Survey) -> dict[str, Tensor]:
        """(sum of gradient x weight over a unit's columns)^2, summed over windows (Molchanov et al. 2019)."""
        from llmslim.calibration.gradients import Reduce, accumulate, channel_taylor, unit_taylor

        modules = dict(look.anatomy.model.named_modules())
        reduces: dict[str, Reduce] = {}
        places: dict[
            str, tuple[str, int | None]
        ] = {}  # of each matrix: parameter, and expert if they are fused
        for block in look.anatomy.blocks:
            for site in self.sites(block):
                if site.name in modules:
                    name, expert = f"{site.name}.weight", None
                    reduces[name] = unit_taylor(site.units, 0 if is_conv1d(modules[site.name]) else 1)
                else:
                    experts = block.mlp
                    assert isinstance(experts, Experts) and experts.down is not None
                    name, expert = experts.down, int(site.name.rsplit(".", 2)[1])
                    reduces[name] = channel_taylor(experts)
                places[site.name] = name, expert
        squared: dict[str, Reduce] = {
            name: lambda weight, gradient, reduce=reduce: reduce(weight, gradient).square()  # type: ignore[misc]
            for name, reduce in reduces.items()
        }
        sums = accumulate(look.loaded(), look.tokens, squared, look.seed, look.progressed, look.mask_token)
        return {
            site: sums[name] if expert is None else sums[name][expert][None]
            for site, (name, expert) in places.items()
        }

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        survey = record.survey
        settled = {name: int(count) for name, count in survey.items() if name.startswith(_REMOVE)}
        removes = {name.removeprefix(_REMOVE): count for name, count in settled.items()} or None
        sites = {site.name: site for site in self.sites(block, removes)}
        choices: dict[str, Choice] = {}

        def visit(name: str, inputs: list[Tensor]) -> None:
            linear = stream.model.get_submodule(name)
            moments = self._moments(linear, inputs) if inputs else None
            choices[name] = self._choose(block, sites[name], linear, moments, survey.get(name), record)

        with self.opened(block):
            if self.needs_calibration:  # the lane goes on through weights that do not read what will go
                stream.walk(block, stream.lanes["calibration"], list(sites), visit)
            for name in [name for name in sites if name not in choices]:
                if self.needs_calibration:
                    record.note(name, "no calibration token reached it: chosen by magnitude, not refitted")
                visit(name, [])
        self.narrow(block, {name: choices[name] for name in sites}, record)

    def _removes(self, anatomy: Anatomy, survey: dict[str, Tensor]) -> dict[str, int]:
        """Widths by one ranking of all blocks' scores: matrix -> units to remove from every pool.

        Within `ratio_range`: errors of one block do not tell what later blocks make of them, and without it the demo
        model lost nearly all channels of its first ones, where a few tokens have most of the power.
        """
        together: dict[str, list[Site]] = {}  # the experts of a block keep one width
        for block in anatomy.blocks:
            for site in self.sites(block):
                together.setdefault(f"{block.name} {site.together}", []).append(site)
        costs = [
            torch.stack([survey[site.name].sort(dim=1).values.sum(0) for site in sites]).mean(0)
            for sites in together.values()
        ]
        budget = sum(sites[0].remove for sites in together.values())
        first = [self._within(sites[0], -1) for sites in together.values()]
        open_ = [cost.sort().values[begin:] for cost, begin in zip(costs, first, strict=True)]
        least = [sites[0].units.shape[1] - self._within(sites[0], 1) for sites in together.values()]
        counts = importance.allocate(open_, budget - sum(first), least)
        return {
            site.name: begin + count
            for sites, begin, count in zip(together.values(), first, counts, strict=True)
            for site in sites
        }

    def _within(self, site: Site, side: int) -> int:
        """The least (side -1) or most (1) units that a pool may lose by `ratio_range`; `site.remove` lies between."""
        size = site.units.shape[1]
        share = min(1.0, max(0.0, self.ratio + side * self.ratio_range)) * size
        if side < 0:
            return min(site.remove, math.ceil(share))
        return min(size - site.least, max(site.remove, math.floor(share)))

    def _keep(
        self, block: Block, site: Site, weight: Tensor, moments: Moments | None, surveyed: Tensor | None
    ) -> Tensor:
        """bool [pools, size] on the CPU, where `units` are: the units that stay."""
        if self.criterion == "obs" and moments is not None:
            at_once = -(-site.remove // _LOOKS)
            return importance.eliminate(weight, moments.damped, site.units, site.remove, at_once)
        return importance.keep_best(self._scores(block, site, weight, moments, surveyed).cpu(), site.remove)

    def _scores(
        self, block: Block, site: Site, weight: Tensor, moments: Moments | None, surveyed: Tensor | None
    ) -> Tensor:
        """[pools, size]: how much each unit matters."""
        if self.criterion == "taylor":
            assert surveyed is not None
            return surveyed
        if self.criterion == "random":  # of the matrix's name: the same in every run
            generator = torch.Generator().manual_seed(zlib.crc32(site.name.encode()))
            return torch.rand(site.units.shape[:2], generator=generator)
        if self.criterion in ("magnitude", "magnitude-l1") or moments is None:
            return self.power(block, site)
        if self.criterion == "output":
            return importance.output_increase(weight, moments.hessian, site.units)
        inverse = torch.cholesky_inverse(importance.cholesky(moments.damped)).to(weight.dtype)
        return importance.refit_increase(weight, inverse, site.units)

    def _moments(self, linear: nn.Module, inputs: Sequence[Tensor]) -> Moments:
        """Of a matrix's inputs; where it is refitted and has a bias, that takes the mean, and the rest is centered."""
        return Moments(inputs, self.refit and linear.bias is not None, self.refit_damping)

    def _choose(
        self,
        block: Block,
        site: Site,
        linear: nn.Module,
        moments: Moments | None,
        surveyed: Tensor | None,
        record: StepRecord,
    ) -> Choice:
        """Decide what stays, and put weights in place that read nothing else."""
        view = dense_weight(linear)
        weight = view.detach().float()
        if moments is not None:
            check_inputs(site.name, moments.stats, "pruned", "mend the model")
        keep = self._keep(block, site, weight, moments, surveyed)
        columns = site.units[keep].reshape(-1).sort().values
        new = torch.zeros_like(weight)
        if self.refit and moments is not None and site.remove:
            new[:, columns] = importance.refit(weight, moments.damped, columns)
            if moments.affine:
                bias = cast(Tensor, linear.bias)
                with torch.no_grad():
                    bias += moments.bias_shift(weight, new).to(bias.dtype)
        else:
            new[:, columns] = weight[:, columns]
        row: dict[str, Any] = {
            "name": site.name,
            "block": block.name,
            "what": site.what,
            "kept": int(keep.sum()),
            "total": keep.numel(),
        }
        if keep.numel() <= _LISTED:
            row["units"] = keep.view(-1).nonzero()[:, 0].tolist()
        if moments is not None:
            row["output_error"] = output_error(weight, new, moments.hessian)
            row["tokens"] = moments.stats.tokens
        record.linears.append(row)
        with torch.no_grad():
            view.copy_(new)
        return Choice(keep, columns)


def row_power(projection: Projection, exponent: int) -> Tensor:
    """sum |w|^exponent over each row (for o and down: column) of a projection, in its order."""
    weight = dense_weight(projection.module).detach().float()
    return weight.abs().pow(exponent).sum(1 if projection.side == "out" else 0)[projection.rows]
