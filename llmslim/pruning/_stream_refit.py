"""Least squares that make a narrowed block follow the uncompressed one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from llmslim.anatomy import MLP, Block
from llmslim.anatomy.parts import dense_weight
from llmslim.calibration.stream import BlockStream
from llmslim.pruning import importance
from llmslim.pruning.residual import Site, Slot, Turn, stream_norms


@dataclass
class Trace:
    """What an uncompressed block did to the chunks of its lane.

    Attributes:
        states: the residual stream [..., d] in front of attention, in front of the MLP, and behind the block.
        read: by site, what attention and MLP read: `states` behind the norm.
    """

    states: tuple[list[Tensor], list[Tensor], list[Tensor]]
    read: dict[Site, list[Tensor]]


def trace(block: Block, stream: BlockStream) -> Trace:
    """Pass the lane "calibration" through a block with two norms, one in front of attention, one of the MLP."""
    lane = stream.lanes["calibration"]
    seen: dict[str, list[Tensor]] = {}
    norms = stream_norms(block)
    stream.walk(block, lane, norms, lambda name, inputs: seen.__setitem__(name, list(inputs)))
    states = [seen[name] for name in norms]
    modules = [block.model.get_submodule(name) for name in norms]
    with torch.no_grad():
        read = [[module(chunk) for chunk in chunks] for module, chunks in zip(modules, states, strict=True)]
    return Trace((states[0], states[1], list(lane.hidden)), {"attention": read[0], "mlp": read[1]})


class Refit:
    """Refits a block that is narrow already, at the halts of a walk through it.

    What reads the stream (W [out, d], all of one site alike) becomes W A, where A [d, d'] comes closest from what
    the narrow block reads to what the uncompressed one reads. What writes to it comes closest to what the
    uncompressed stream is behind it, seen in the narrow basis, less what the narrow stream is in front of it.

    Args:
        old: the tensors of the block before it was narrowed.
        wanted: of the uncompressed block, for the first chunks.
    """

    def __init__(
        self, block: Block, turn: Turn, old: dict[Slot, Tensor], wanted: Trace, damping: float
    ) -> None:
        self.block, self.turn, self.old, self.wanted, self.damping = block, turn, old, wanted, damping
        self._norms = stream_norms(block)
        self._writers = [block.attention.o.name]
        if isinstance(block.mlp, MLP):  # a mixture's tokens go to experts of their own, and do not pair
            self._writers.append(block.mlp.down.name)
        self._stream: list[Tensor] = []
        self.halts = [self._norms[0], self._writers[0], self._norms[1], *self._writers[1:]]

    def visit(self, name: str, inputs: list[Tensor]) -> None:
        if name in self._norms:
            self._stream = list(inputs)
            self._readers("attention" if name == self._norms[0] else "mlp", name, inputs)
        else:
            self._writer(name, self.wanted.states[1 + self._writers.index(name)], inputs)

    def _readers(self, site: Site, norm: str, stream: list[Tensor]) -> None:
        from llmslim.loaders.models import place  # slow: imports transformers

        module = self.block.model.get_submodule(norm)
        wanted, forward = self.wanted.read[site], type(module).forward  # its own halts the walk
        read = [cast(Tensor, forward(module, chunk)) for chunk in stream[: len(wanted)]]
        slots = [slot for slot in self.old if slot.side == "reads" and slot.site == site]
        width = self.old[slots[0]].shape[slots[0].dim]
        prior = self.turn(Slot(slots[0].name, 1, "reads", site), torch.eye(width, device=read[0].device), 1)
        matrix = importance.least_squares(*importance.moments(wanted, read), self.damping, prior)
        for slot in slots:
            new = (self.old[slot].float().movedim(slot.dim, -1) @ matrix).movedim(-1, slot.dim)
            place(self.block.model, slot.name, new.to(self.old[slot].dtype).contiguous())

    def _writer(self, name: str, states: list[Tensor], inputs: list[Tensor]) -> None:
        linear = self.block.model.get_submodule(name)
        before = self._stream[: len(states)]
        wanted = [self.seen(full) - now.float() for full, now in zip(states, before, strict=True)]
        if linear.bias is not None:
            wanted = [chunk - linear.bias.float() for chunk in wanted]  # type: ignore[operator]
        view = dense_weight(linear)
        with torch.no_grad():
            moments = importance.moments(wanted, inputs[: len(states)])
            view.copy_(importance.least_squares(*moments, self.damping, view.detach()))

    def seen(self, states: Tensor) -> Tensor:
        """The uncompressed stream [..., d] in the narrow basis: [..., d']."""
        return self.turn(Slot("", states.ndim - 1, "writes"), states.float(), states.ndim - 1)

    def error(self, hidden: Sequence[Tensor]) -> float:
        """||y - Q^T x||^2 / ||Q^T x||^2 behind the block, y the narrow stream, x the uncompressed one."""
        pairs = [
            (self.seen(full), now.float()) for full, now in zip(self.wanted.states[2], hidden, strict=False)
        ]
        lost = sum(float((full - now).square().sum()) for full, now in pairs)
        return lost / max(sum(float(full.square().sum()) for full, _ in pairs), 1e-30)
