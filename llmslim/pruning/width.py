"""Prune the residual stream: one smaller hidden size for the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy, Block
from llmslim.anatomy.parts import features
from llmslim.calibration.statistics import InputStats
from llmslim.calibration.stream import BlockStream
from llmslim.edit import Edit
from llmslim.errors import UserError
from llmslim.pruning._stream_refit import Refit, trace
from llmslim.pruning.amount import Share
from llmslim.pruning.residual import (
    NarrowOuter,
    NarrowResidual,
    Site,
    Slot,
    Turn,
    block_slots,
    narrow_block,
    narrow_outer,
    outer_slots,
    stream_norms,
    stream_width,
    untie,
)
from llmslim.step import Outlook, StepRecord, Survey, block_of

_CHOICES = 6  # so many ratios are named when none is near


class PruneWidth(Share):
    """Make the residual stream (the hidden size) narrower, everywhere alike; the result is a plain smaller model.

    The stream x [d] becomes Q^T x [d'], Q [d, d'] with orthonormal columns, one for the whole model: what writes to
    it (embeddings, o, down) takes Q^T W, what reads it W diag(g) Q, g the weight of the norm in between.

    `channels` (Minitron, arXiv:2407.14679): Q picks the channels with the largest mean |g x / rms(x)| over the
    calibration tokens, summed over all norms. `pca` (SliceGPT, arXiv:2401.15024): Q holds the first eigenvectors of
    the sum over all norms of X^T X, rows x / rms(x). SliceGPT has a Q for each block and rotates the shortcut in
    between, which no standard architecture does; here one Q serves all. It asks for RMSNorms in front of attention
    and MLP, and nowhere else, and for a head of its own: tied embeddings are untied.

    An RMSNorm over d' channels divides by sqrt(d/d') too much when the rest was nothing, which its weight makes good.

    With `refit` every block is then fitted in closed form to the uncompressed model, on a third of the windows: what
    reads the stream to its old outputs, what writes to it to Q^T x of the uncompressed stream x behind it. It asks for
    norms in front of attention and MLP; experts' down projections are left as they are.
    """

    kind: ClassVar[str] = "width"

    multiple_of: int = Field(8, ge=1, description="the hidden size that stays is a multiple of this")
    basis: Literal["channels", "pca"] = Field(
        "channels", description="what stays: the most active channels, or principal components"
    )
    refit: bool = Field(False, description="refit the weights that read what stays")
    refit_damping: float = Field(
        1e-4, gt=0, le=1, description="pull to the old weights, x the mean square input"
    )

    @model_validator(mode="after")
    def _consistent(self) -> PruneWidth:
        self.require_option("refit_damping", self.refit, "refit")
        return self

    @property
    def needs_calibration(self) -> bool:
        return True

    @property
    def needs_survey(self) -> bool:
        return True

    @property
    def needs_reference(self) -> bool:
        return self.refit

    def check(self, anatomy: Anatomy) -> None:
        self.check_dense(anatomy)
        family, width = anatomy.family, stream_width(anatomy.blocks[0])
        if len(anatomy.stacks) > 1:
            raise UserError(
                f"{family} has an encoder and a decoder, and width prunes models of one stack only."
            )
        if width != anatomy.model.config.get_text_config().hidden_size:
            raise UserError("An earlier step of the recipe narrows the width: remove it all in one step.")
        try:
            outer_slots(anatomy)
            for block in anatomy.blocks:
                block_slots(block)
        except ValueError as error:
            raise UserError(f"The width of {family} cannot be pruned: {error}.") from error
        if self.basis == "pca" or self.refit:
            self._check_norms(anatomy)
        self._width(anatomy)

    @property
    def _asks(self) -> str:
        """What needs to know where the norms stand, and how to do without."""
        return "refit" if self.basis == "channels" else "basis 'pca'"

    def _check_norms(self, anatomy: Anatomy) -> None:
        """Refuse other blocks than x += attention(norm(x)); x += mlp(norm(x)), and for a rotation other norms."""
        for block in anatomy.blocks:
            norms = {name: block.model.get_submodule(name) for name in stream_norms(block)}
            if len(norms) != 2:
                raise UserError(
                    f"{self._asks} needs one norm in front of attention and one in front of the MLP, and {block.name} "
                    f"has {len(norms)}; basis 'channels' without refit takes any."
                )
            if anatomy.final_norm is not None:
                norms |= dict([anatomy.final_norm])
            other = next((name for name, module in norms.items() if not _is_rms(module)), None)
            if other and self.basis == "pca":
                raise UserError(
                    f"basis 'pca' needs RMSNorms, and {other} is a {type(norms[other]).__name__}, whose mean no "
                    "rotation leaves alone; basis 'channels' takes any."
                )

    def _width(self, anatomy: Anatomy) -> int:
        """The width that stays: of the multiples that the config accepts, the nearest; the smaller of two."""
        before = stream_width(anatomy.blocks[0])
        if not self.ratio:
            return before
        target = before * (1 - self.ratio)
        multiples = range(self.multiple_of, before, self.multiple_of)
        nearest = sorted([*multiples, before], key=lambda width: (abs(width - target), width))
        width = next(width for width in nearest if width == before or _accepts(anatomy, width))
        if width == before:
            fitting = [width for width in multiples if _accepts(anatomy, width)]
            named = sorted({round(1 - width / before, 4) for width in fitting})
            near = sorted(sorted(named, key=lambda ratio: abs(ratio - self.ratio))[:_CHOICES])
            can = f"ratios that fit: {', '.join(map(str, near))}" if near else "try a smaller multiple_of"
            raise UserError(
                f"ratio {self.ratio} removes none of the {before} channels in multiples of {self.multiple_of} that "
                f"the config of {anatomy.family} accepts; {can}."
            )
        return width

    def amounts(self, anatomy: Anatomy) -> list[float]:
        before = stream_width(anatomy.blocks[0])
        widths = [
            width for width in range(self.multiple_of, before, self.multiple_of) if _accepts(anatomy, width)
        ]
        ratios = sorted(1 - width / before for width in widths)
        return [ratio for ratio in ratios if self.with_amount(ratio).allowed(anatomy)]

    def parts(self, shares: list[float], outlook: Outlook) -> list[PruneWidth]:
        raise UserError(f"rounds {len(shares)}: width is chosen once for the whole model; leave rounds at 1.")

    def planned_edits(self, anatomy: Anatomy) -> list[Edit]:
        width = self._width(anatomy)
        blocks = [NarrowResidual(block=block.name, width=width) for block in anatomy.blocks]
        return [NarrowOuter(width=width, untied=self._unties(anatomy)), *blocks]

    def _unties(self, anatomy: Anatomy) -> bool:
        return self.basis == "pca" and anatomy.tied

    def workspace_bytes(self, anatomy: Anatomy) -> int:
        width = stream_width(anatomy.blocks[0])
        table = max((parameter.numel() for parameter in anatomy.model.parameters()), default=0)
        if self.refit:  # H, damped and factored in float64, the cross moments
            width = max(
                features(linear)[1] for block in anatomy.blocks for linear in block.linears().values()
            )
        return 8 * table + (40 * width * width if self.refit or self.basis == "pca" else 0)

    def survey(self, look: Survey) -> dict[str, Tensor]:
        """`kept` int64 [d'], or `components` float32 [d, d']."""
        width = self._width(look.anatomy)
        pca = self.basis == "pca"
        seen = _Seen(stream_width(look.anatomy.blocks[0]), pca, alone=pca or self.refit, in_turn=self.refit)
        for block, stream in look.blocks():
            lane = stream.lanes["calibration"]
            with seen.watching(block):
                stream.forward(block, lane)
            final = stream.anatomy.final_norm
            if block.index == len(look.anatomy.blocks) - 1 and final is not None:
                for chunk in lane.hidden:
                    seen.add(chunk, final[1](chunk))
        if pca:
            return {"components": components(seen.moments.finish().hessian, width)}
        return {"kept": seen.activity.topk(width).indices.sort().values.cpu()}

    def compress_outer(self, stream: BlockStream, record: StepRecord) -> None:
        anatomy = stream.anatomy
        untied = self._unties(anatomy)
        if untied:
            untie(anatomy)
        norm = anatomy.final_norm
        gains: dict[Site, Tensor] = {}
        if self.basis == "pca" and norm is not None:
            gains = {"outside": _gain(norm[1])}
        turn = turning(record.survey, gains, anatomy.model)
        before = stream_width(anatomy.blocks[0])
        width = narrow_outer(anatomy, turn)
        for stack in anatomy.stacks:  # no block has the new width yet: none can be run to see what it returns
            stream.tails.setdefault(stack.name, 0)
        record.edits.append(NarrowOuter(width=width, untied=untied))
        record.note("residual stream", f"{width} of {before} channels stay, the nearest width that fits")
        if untied:
            head = anatomy.head
            assert head is not None
            count = anatomy.model.get_parameter(f"{head[0]}.weight").numel()
            record.note(head[0], f"no longer tied to the embeddings, which costs {count:,} parameters")

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        before, names = stream_width(block), stream_norms(block)
        gains: dict[Site, Tensor] = {}
        if self.basis == "pca":
            gains = {
                "attention": _gain(block.model.get_submodule(names[0])),
                "mlp": _gain(block.model.get_submodule(names[1])),
            }
        turn = turning(record.survey, gains, block.model)
        lane = stream.lanes["calibration"]
        row = {"name": block.name, "block": block.name, "what": "residual", "total": before}
        if reference is None:
            narrow_block(block, turn)
            stream.forward(block, lane)
        else:
            old = {slot: block.model.get_parameter(slot.name).detach() for slot in block_slots(block)}
            narrow_block(block, turn)
            refit = Refit(block, turn, old, trace(block_of(reference, block), reference), self.refit_damping)
            stream.walk(block, lane, refit.halts, refit.visit)
            row["output_error"] = refit.error(lane.hidden)
        record.edits.append(NarrowResidual(block=block.name, width=stream_width(block)))
        record.linears.append({**row, "kept": stream_width(block)})


def components(moments: Tensor, width: int) -> Tensor:
    """The `width` first eigenvectors of X^T X [d, d], largest first: float32 [d, width].

    Of each vector the sign is fixed (its largest entry is positive), so that the same moments give the same bytes.
    """
    vectors = torch.linalg.eigh(moments.double()).eigenvectors.flip(1)[:, :width]
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return (vectors * largest.sign()).float().contiguous()


def turning(found: dict[str, Tensor], gains: dict[Site, Tensor], model: nn.Module) -> Turn:
    """How every tensor of the stream is brought into the narrow one.

    Args:
        found: what the survey found: `kept` or `components`.
        gains: with `components`: g [d] of the norm in front of each site.
    """
    kept, basis = found.get("kept"), found.get("components")

    def select(slot: Slot, tensor: Tensor, dim: int) -> Tensor:
        assert kept is not None
        result = tensor.index_select(dim, kept.to(tensor.device))
        if slot.side == "norm" and slot.name.endswith(".weight"):
            norm = model.get_submodule(slot.name.rpartition(".")[0])
            if _is_rms(norm):
                offset = _offset(norm)
                return (result.float() + offset) * (tensor.shape[dim] / len(kept)) ** 0.5 - offset
        return result

    def rotate(slot: Slot, tensor: Tensor, dim: int) -> Tensor:
        assert basis is not None
        turn = basis.to(tensor.device)
        if slot.side == "norm":
            offset = _offset(model.get_submodule(slot.name.rpartition(".")[0]))
            return torch.full((turn.shape[1],), 1.0 - offset, device=tensor.device)
        if slot.side == "reads":
            scale = (turn.shape[0] / turn.shape[1]) ** 0.5
            gain = gains.get(slot.site)
            turn = turn * scale if gain is None else gain[:, None] * turn * scale
        return (tensor.float().movedim(dim, -1) @ turn).movedim(-1, dim)

    return select if kept is not None else rotate


class _Seen:
    """What stands in the residual stream in front of every norm, as sums over tokens.

    Args:
        second_moments: sum X^T X, not activity.
        alone: refuse a block whose norms are not each right in front of attention and MLP.
        in_turn: refuse one that runs attention and MLP side by side.
    """

    def __init__(self, width: int, second_moments: bool, alone: bool, in_turn: bool) -> None:
        self.activity = torch.zeros(width)
        self.moments = InputStats(width, torch.device("cpu"))
        self._second_moments, self._alone, self._in_turn = second_moments, alone, in_turn

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """The stream [..., d] in front of a norm, and what the norm makes of it."""
        if self._second_moments:
            rows = inputs.float()
            self.moments.add((rows * rows.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()).cpu())
        else:
            self.activity += outputs.float().abs().flatten(0, -2).mean(0).cpu()

    @contextmanager
    def watching(self, block: Block) -> Iterator[None]:
        """Adds what the norms of a block see while it runs."""
        last: dict[str, tuple[Tensor, Tensor]] = {}
        names, handles = stream_norms(block), []

        def behind(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
                last[name] = args[0], output
                self.add(args[0], output)
                if self._in_turn and name == names[1] and _same(args[0], last[names[0]][0]):
                    raise UserError(
                        f"{block.name} runs attention and MLP side by side, which refit does not know how to follow: "
                        "give --no-refit."
                    )

            return hook

        def in_front(norm: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor]) -> None:
                if norm not in last or not _same(args[0], last[norm][1]):
                    raise UserError(
                        "A rotation or a refit needs a norm right in front of attention and one of the MLP, and "
                        f"{norm} is not; basis 'channels' without refit takes any."
                    )

            return hook

        for name in names:
            handles.append(block.model.get_submodule(name).register_forward_hook(behind(name)))
        if self._alone:
            slots = [slot for slot in reversed(block_slots(block)) if slot.side == "reads"]
            readers = {slot.site: slot.name.rpartition(".")[0] for slot in slots}
            for norm, reader in zip(names, (readers["attention"], readers["mlp"]), strict=True):
                module = block.model.get_submodule(reader)
                handles.append(module.register_forward_pre_hook(in_front(norm)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether it is one tensor in memory, maybe of another shape."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _is_rms(norm: nn.Module) -> bool:
    return "rms" in type(norm).__name__.lower()


@torch.no_grad()
def _gain(norm: nn.Module) -> Tensor:
    """What an RMSNorm multiplies by, float32 [d]: its weight, or 1 + weight in some families."""
    return norm.weight.detach().float() + _offset(norm)  # type: ignore[operator,union-attr]


def _offset(norm: nn.Module) -> float:
    weight: Tensor = norm.weight  # type: ignore[assignment]
    outputs = norm(torch.full_like(weight, 64.0))  # all alike: their root mean square is 64
    return float((outputs.float() - weight.float()).mean().round())


def _accepts(anatomy: Anatomy, width: int) -> bool:
    """Whether a config of the family can have that hidden size, with the heads that there are."""
    attention = anatomy.blocks[0].attention
    config = copy.deepcopy(anatomy.model.config)
    config.hidden_size, config.head_dim = width, attention.head_dim
    config.num_attention_heads = attention.num_heads
    try:
        type(config).from_dict(config.to_dict())
    except Exception:  # each family refuses sizes in its own way
        return False
    return True
