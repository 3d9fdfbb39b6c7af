"""Which blocks matter least: scores from hidden states in front of and behind blocks, and a greedy search by loss."""

from __future__ import annotations

from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor

from llmslim.calibration.stream import BlockStream, Lane
from llmslim.step import Survey

ANGLE_TOKENS = (
    4096  # so many tokens tell the angle of a run; their states are held for as many blocks as it has
)
LOSS_TOKENS = 2048  # so many tokens of the calibration text tell a loss (in whole chunks of the stream)

Counts = dict[str, int]
"""By stack, how many blocks to remove."""


def mean_cosine(before: list[Tensor], after: list[Tensor]) -> float:
    """The mean over tokens of the cosine of two hidden states [windows, seq, hidden], given in chunks."""
    sums = [F.cosine_similarity(a.float(), b.float(), dim=-1) for a, b in zip(before, after, strict=True)]
    return float(torch.cat([chunk.reshape(-1) for chunk in sums]).double().mean())


def mean_angle(before: Tensor, after: Tensor) -> float:
    """The mean over tokens [tokens, hidden] of arccos(cosine) / pi."""
    cosine = F.cosine_similarity(before.float(), after.float(), dim=-1).clamp(-1, 1)
    return float((cosine.arccos() / torch.pi).double().mean())


def influence(look: Survey) -> dict[str, Tensor]:
    """1 - mean cosine of each block's input and output (ShortGPT): stack -> [blocks]."""
    scores: dict[str, list[float]] = {}
    for block, stream in look.blocks():
        lane = stream.lanes["calibration"]
        before = list(lane.hidden)
        stream.forward(block, lane)
        scores.setdefault(_stack(block.name), []).append(1 - mean_cosine(before, lane.hidden))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in scores.items()}


def run_angles(look: Survey, counts: Counts) -> dict[str, Tensor]:
    """Angular distance of input and output of the run that begins at each block: stack -> [blocks].

    A run has as many blocks as its stack loses; where none fits any more, the distance is infinite.
    """
    scores: dict[str, list[float]] = {}
    held: deque[Tensor] = deque()
    for block, stream in look.blocks():
        name, lane = _stack(block.name), stream.lanes["calibration"]
        if name not in scores:
            scores[name] = []
            held.clear()
        held.append(_some_tokens(lane))
        stream.forward(block, lane)
        if len(held) == counts[name]:
            scores[name].append(mean_angle(held.popleft(), _some_tokens(lane)))
    return {
        name: torch.tensor([*values, *[torch.inf] * (counts[name] - 1)], dtype=torch.float64)
        for name, values in scores.items()
    }


def _some_tokens(lane: Lane) -> Tensor:
    """Evenly chosen hidden states [tokens, hidden] in front of the next block."""
    total = sum(chunk.shape[0] * chunk.shape[1] for chunk in lane.hidden)
    every = -(-total // ANGLE_TOKENS)
    return torch.cat([chunk.reshape(-1, chunk.shape[-1])[::every] for chunk in lane.hidden])


def greedy(look: Survey, counts: Counts, pinned: set[str]) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Remove again and again the block without which the loss is least (Shortened LLaMA, SLEB).

    A turn passes the blocks once, with a lane for every block that might go, which joins where that block is left
    out: what comes before is shared, so that a turn costs half as much as one pass for each.

    Returns:
        By stack: the blocks that go, ascending; and by how much the loss in nats rose when each went, or, for
        those that stay, would have risen in the last turn that asked.
    """
    gone: dict[str, list[int]] = {name: [] for name in counts}
    totals = {stack.name: len(stack.blocks) for stack in look.anatomy.stacks}
    scores = {name: torch.full((totals[name],), torch.nan, dtype=torch.float64) for name in counts}
    while open_ := {name for name in counts if len(gone[name]) < counts[name]}:
        losses = _losses(look, gone, open_, pinned)
        base = losses.pop("")
        for name, loss in losses.items():
            scores[_stack(name)][int(name.rpartition(".")[2])] = loss - base
        best = min(losses, key=losses.__getitem__)
        gone[_stack(best)].append(int(best.rpartition(".")[2]))
    return {name: sorted(indices) for name, indices in gone.items()}, scores


def _losses(look: Survey, gone: dict[str, list[int]], open_: set[str], pinned: set[str]) -> dict[str, float]:
    """The loss without each block of the stacks that may lose one; under "" that of the model as it is."""
    stream: BlockStream | None = None
    for block, stream in look.blocks():
        stack, lane = _stack(block.name), stream.lanes["calibration"]
        chunks = max(1, LOSS_TOKENS // lane.hidden[0][..., 0].numel())
        lane.inputs, lane.hidden, lane.calls = lane.inputs[:chunks], lane.hidden[:chunks], lane.calls[:chunks]
        if block.index in gone[stack]:
            continue
        branch = copy_lane(lane, block.name)
        for other in stream.lanes.values():
            stream.forward(block, other)
        if stack in open_ and block.name not in pinned:
            stream.add(branch)
    assert stream is not None
    return {
        "" if name == "calibration" else name: _mean_loss(stream, lane) for name, lane in stream.lanes.items()
    }


def _mean_loss(stream: BlockStream, lane: Lane) -> float:
    """-log p of the next token, in nats, over all windows of a lane that has passed all blocks."""
    sums = []
    for inputs, output in stream.outputs(lane):
        tokens = inputs.get("decoder_input_ids", inputs["input_ids"])
        for window, logits in zip(tokens, output.logits, strict=True):
            losses = F.cross_entropy(logits[:-1].float(), window[1:].to(logits.device), reduction="none")
            sums.append(losses.double())
    return float(torch.cat(sums).mean())


def copy_lane(lane: Lane, name: str) -> Lane:
    """A lane that goes its own way from here."""
    return Lane(name, lane.inputs, list(lane.hidden), lane.calls, dict(lane.finished))


def _stack(block: str) -> str:
    return block.rpartition(".")[0]
