"""Carry lanes through a checkpoint with one block of it in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmslim.anatomy import Block
from llmslim.calibration.stream import BlockStream
from llmslim.checkpoint.reader import CheckpointReader
from llmslim.loaders.models import release


@torch.no_grad()
def walk_blocks(reader: CheckpointReader, stream: BlockStream) -> Iterator[Block]:
    """Yield each block, filled, with all lanes in front of it; the consumer passes the lanes through it.

    Args:
        stream: over a skeleton of the reader's. What lies outside the blocks stays filled, so that
            `stream.outputs` works when the walk is over.
    """
    model, device, dtype = stream.model, stream.device, stream.dtype
    reader.fill([model], None, dtype, device=device)
    for stack in stream.anatomy.stacks:
        for block in stack.blocks:
            reader.fill([model], block.name, dtype, device=device)
            if block.index == 0:
                stream.enter(stack)
            yield block
            release(model, block.name)
        stream.leave(stack)
