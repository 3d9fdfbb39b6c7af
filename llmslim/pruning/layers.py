"""Prune whole blocks."""

from __future__ import annotations

import copy
import math
import zlib
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from llmslim.anatomy import MLP, Anatomy, Block
from llmslim.anatomy.parts import dense_weight
from llmslim.calibration.stream import BlockStream
from llmslim.edit import DropBlocks, Edit
from llmslim.errors import UserError
from llmslim.pruning import _depth
from llmslim.pruning._neighbour import no_refit, refit_neighbours, refitting
from llmslim.pruning.amount import Share, check_unshared, to_nearest
from llmslim.step import StepRecord, Survey

_KEEP, _SCORE, _REFIT, _ERRORS = "keep ", "score ", "refit ", "errors "  # what a survey's tensors are called


class PruneLayers(Share):
    """Remove whole blocks, and refit the block in front of each gap.

    - `influence`: the blocks of least 1 - E[cos(x, y)], x the input and y the output of a block, mean over tokens
      (ShortGPT, arXiv:2403.03853).
    - `angular`: of all runs of that many blocks the one of least E[arccos(cos(x, y))] / pi, x in front of the run and
      y behind it (Gromov et al., arXiv:2403.17887; the mean over up to 4096 tokens instead of the last one).
    - `perplexity`: again and again the block without which the loss on the first 2048 tokens rises least (Shortened
      LLaMA, arXiv:2402.02834; SLEB, arXiv:2402.09025). To remove k of n blocks takes about k n / 2 passes of those
      tokens and k n times the head (a minute and a half of one core for each of SmolLM2-135M's blocks that goes),
      where the others take one pass.
    - `random`: by lot of the run's seed.

    The refit is of the down matrix W of the last block in front of a gap (of the first block behind it, if the gap
    begins the model): W + D minimizes E[||r + (W + D) a - t||^2 / ||t||^2] + lambda ||D||^2, where a are the inputs
    of W and r all else that the block puts out, both in the shortened model, and t what the whole model has behind
    the gap. Where a norm or a mixture follows (BERT, Gemma, Mixtral) there is no such W, and no refit.

    An encoder-decoder loses the share from each stack. Blocks that the config makes unlike the others stay: the first
    of T5, which holds the position bias, and of ModernBERT, which lacks a norm.
    """

    kind: ClassVar[str] = "layers"

    criterion: Literal["influence", "angular", "perplexity", "random"] = Field(
        "influence",
        description="influence, change of the hidden states by a block; angular, by a run of blocks; perplexity, "
        "loss without a block, one after the other (slow); random",
    )
    drop: tuple[int, ...] = Field(
        (), description="remove these blocks, counted from 0 as inspect lists them, instead of a ratio"
    )
    refit: bool = Field(True, description="refit the weights that read what stays")
    refit_damping: float = Field(
        1e-2, gt=0, le=1, description="pull to the old weights, x the mean square input"
    )

    @field_validator("drop", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """(3, 7) also from "3,7", as on the command line, and from 3."""
        if isinstance(value, str):
            return [part.strip() for part in value.split(",")]
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _one_way(self) -> PruneLayers:
        for name in ("ratio", "criterion", "target_params", "target_size", "rounds") if self.drop else ():
            if self.given(name):
                raise ValueError(f"drop says which blocks go, and {name} chooses others: give one of them")
        self.require_option("refit_damping", self.refit, "refit")
        return self

    @property
    def removes(self) -> tuple[str, str]:
        return ("drop", ",".join(map(str, self.drop))) if self.drop else super().removes

    @property
    def needs_calibration(self) -> bool:
        return self.refit or (not self.drop and self.criterion != "random")

    @property
    def needs_survey(self) -> bool:
        return True

    def check(self, anatomy: Anatomy) -> None:
        check_unshared(anatomy, self.kind)
        config = anatomy.model.config
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise UserError(
                f"This {config.model_type} model scales attention by the number of the block, which removing "
                "blocks would change: prune its heads or channels instead."
            )
        if self.drop:
            self._check_drop(anatomy)
            return
        for stack in anatomy.stacks:
            count = len(stack.blocks)
            if not 0 < self._count(count) < count:
                what = "all" if self._count(count) else "none"
                works = f"1/{count} = {1 / count:.3g} to {count - 1}/{count} = {(count - 1) / count:.3g}"
                raise UserError(
                    f"ratio {self.ratio} removes {what} of the {count} blocks of {stack.name}; "
                    + (f"ratios that work: {works}." if count > 1 else "a single block cannot go.")
                )
        if self.criterion == "perplexity" and (
            anatomy.head is None or not (anatomy.is_decoder or config.is_encoder_decoder)
        ):
            raise UserError(
                f"A {type(anatomy.model).__name__} does not predict the next token, so the criterion perplexity has no "
                "loss to go by: use influence or angular."
            )

    def _check_drop(self, anatomy: Anatomy) -> None:
        stacks, pinned = _numbered(anatomy), pinned_blocks(anatomy)
        total = sum(len(numbers) for numbers in stacks.values())
        there = ", ".join(f"{numbers[0]} to {numbers[-1]} ({name})" for name, numbers in stacks.items())
        for number in self.drop:
            if not 0 <= number < total:
                raise UserError(f"drop = {number}: there is no such block; there are {there}.")
        for name, numbers in stacks.items():
            if set(numbers) <= set(self.drop):
                raise UserError(f"drop takes out all of the blocks {there}: leave at least one of {name}.")
            if name in pinned and numbers[0] in self.drop:
                raise UserError(
                    f"drop = {numbers[0]}: the config makes the first block of {name} unlike the others (position "
                    "bias, norms), so it must stay; the others can go."
                )

    def _count(self, blocks: int) -> int:
        """How many of a stack's blocks the ratio removes."""
        return to_nearest(self.ratio, blocks)

    def amounts(self, anatomy: Anatomy) -> list[float]:
        sizes = {len(stack.blocks) for stack in anatomy.stacks}
        ratios = sorted({count / size for size in sizes for count in range(1, size)})
        return [ratio for ratio in ratios if self.with_amount(ratio).allowed(anatomy)]

    def planned_edits(self, anatomy: Anatomy) -> list[Edit]:
        """As many blocks as will go; which ones is known beforehand only of `drop`."""
        if self.drop:
            keep = self._left_by_drop(anatomy)
        else:
            sizes = {stack.name: len(stack.blocks) for stack in anatomy.stacks}
            keep = {name: list(range(size - self._count(size))) for name, size in sizes.items()}
        return list(_drops(anatomy, keep))

    def workspace_bytes(self, anatomy: Anatomy) -> int:
        blocks, hidden = anatomy.blocks, anatomy.model.config.get_text_config().hidden_size
        vocabulary: int = anatomy.model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        lanes = {
            "perplexity": _depth.LOSS_TOKENS * (len(blocks) * hidden + vocabulary) * 4,
            "angular": self._count(len(blocks)) * _depth.ANGLE_TOKENS * hidden * 4,
        }.get(self.criterion, 0)
        width = max((mlp.width for block in blocks if isinstance(mlp := block.mlp, MLP)), default=0)
        # the Hessian, its damped copy and factor; down, its copy, the change, and what is missing times the inputs
        solving = width * (28 * width + 32 * hidden) if self.refit else 0
        return max(0 if self.drop else lanes, solving)

    def survey(self, look: Survey) -> dict[str, Tensor]:
        """Which blocks stay, by stack, with the scores of all; and the refits, by name of the down matrix."""
        keep, scores = self._choose(look)
        found = {_KEEP + name: torch.tensor(indices) for name, indices in keep.items()}
        found |= {_SCORE + name: score for name, score in scores.items()}
        if self.refit:
            for name, refit in refit_neighbours(look, keep, self.refit_damping).items():
                found[_REFIT + name] = refit.weight
                found[_ERRORS + name] = torch.tensor([refit.before, refit.after], dtype=torch.float64)
        return found

    def _choose(self, look: Survey) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
        """By stack: which blocks stay, and the scores of all where there are any."""
        anatomy = look.anatomy
        if self.drop:
            return self._left_by_drop(anatomy), {}
        sizes = {stack.name: len(stack.blocks) for stack in anatomy.stacks}
        counts = {name: self._count(size) for name, size in sizes.items()}
        pinned = pinned_blocks(anatomy)
        scores: dict[str, Tensor] = {}
        if self.criterion == "perplexity":
            gone, scores = _depth.greedy(look, counts, {f"{name}.0" for name in pinned})
        elif self.criterion == "angular":
            scores = _depth.run_angles(look, counts)
            gone = {name: _best_run(score, counts[name], name in pinned) for name, score in scores.items()}
        else:
            scores = _depth.influence(look) if self.criterion == "influence" else _lots(sizes, look.seed)
            gone = {name: _lowest(score, counts[name], name in pinned) for name, score in scores.items()}
        if self.criterion == "random":
            scores = {}
        return {name: [i for i in range(sizes[name]) if i not in gone[name]] for name in sizes}, scores

    def _left_by_drop(self, anatomy: Anatomy) -> dict[str, list[int]]:
        return {
            name: [number - numbers[0] for number in numbers if number not in self.drop]
            for name, numbers in _numbered(anatomy).items()
        }

    def drops(self, anatomy: Anatomy, survey: dict[str, Tensor]) -> list[DropBlocks]:
        return _drops(anatomy, _kept(survey))

    def compress_outer(self, stream: BlockStream, record: StepRecord) -> None:
        """Nothing lies outside; but here the report gets a row for every block, also for those that go."""
        keep = _kept(record.survey)
        for stack in stream.anatomy.stacks:
            scores = record.survey.get(_SCORE + stack.name)
            for block in stack.blocks:
                row: dict[str, Any] = {"name": block.name, "block": block.name, "what": "block"}
                row |= {"kept": int(block.index in keep[stack.name]), "total": 1}
                if scores is not None and math.isfinite(scores[block.index]):
                    row["score"] = float(scores[block.index])
                record.linears.append(row)

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        """Put the refit in place. The lane stays in front: all that it could tell, the survey has told."""
        keep = _kept(record.survey)[block.name.rpartition(".")[0]]
        size = len(stream.model.get_submodule(block.name.rpartition(".")[0]))  # type: ignore[arg-type]
        if not self.refit or not refitting(block.index, keep, size):
            return
        reason = no_refit(block) or "a norm follows its down matrix, or it is scaled"
        name = "" if no_refit(block) else block.mlp.down.name  # type: ignore[union-attr]
        if _REFIT + name not in record.survey:
            record.note(block.name, f"beside removed blocks, and not refitted: {reason}")
            return
        with torch.no_grad():
            dense_weight(stream.model.get_submodule(name)).copy_(record.survey[_REFIT + name])
        before, after = record.survey[_ERRORS + name].tolist()
        row = next(row for row in record.linears if row["name"] == block.name)
        row |= {"error_without_refit": before, "error": after}


def pinned_blocks(anatomy: Anatomy) -> set[str]:
    """The stacks whose first block must stay, since the config makes no other block like that which would be first."""
    pinned = set()
    for stack in anatomy.stacks:
        size = len(stack.blocks)
        if size > 1:
            plain = _on_meta(anatomy.model, anatomy.model.config)
            DropBlocks(stack=stack.name, keep=tuple(range(1, size))).apply(plain)
            made = _on_meta(anatomy.model, plain.config)
            if [name for name, _ in made.named_parameters()] != [
                name for name, _ in plain.named_parameters()
            ]:
                pinned.add(stack.name)
    return pinned


def _on_meta(model: Any, config: Any) -> Any:
    """A model of that config, without edits or weights."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def _numbered(anatomy: Anatomy) -> dict[str, list[int]]:
    """By stack, the numbers of its blocks, counted through the model."""
    numbers, start = {}, 0
    for stack in anatomy.stacks:
        size = len(stack.blocks)
        numbers[stack.name] = list(range(start, start + size))
        start += size
    return numbers


def _drops(anatomy: Anatomy, keep: dict[str, list[int]]) -> list[DropBlocks]:
    return [
        DropBlocks(stack=stack.name, keep=tuple(keep[stack.name]))
        for stack in anatomy.stacks
        if len(keep[stack.name]) < len(stack.blocks)
    ]


def _kept(survey: dict[str, Tensor]) -> dict[str, list[int]]:
    return {
        name.removeprefix(_KEEP): keep.tolist() for name, keep in survey.items() if name.startswith(_KEEP)
    }


def _lots(sizes: dict[str, int], seed: int) -> dict[str, Tensor]:
    """Random scores, of the stack's name and the seed."""
    lots = {}
    for name, size in sizes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
        lots[name] = torch.rand(size, generator=generator)
    return lots


def _lowest(scores: Tensor, count: int, first_stays: bool) -> list[int]:
    """The `count` blocks of least score."""
    order = scores.argsort(stable=True).tolist()
    return sorted([index for index in order if index > 0 or not first_stays][:count])


def _best_run(scores: Tensor, count: int, first_stays: bool) -> list[int]:
    """The run of `count` blocks that has the least score at its first."""
    start = _lowest(scores, 1, first_stays)[0]
    return list(range(start, start + count))
