"""Which of several processes that train together this one is, and what they do one after the other, or alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


def first() -> bool:
    """Whether this process is the only one, or the first of several."""
    return rank() == 0


def rank() -> int:
    """The place of this process among those that train together, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many processes train together; 1 outside of training in several."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def first_alone() -> Iterator[None]:
    """Inside is the first process alone; others follow when it is through, and find what it wrote."""
    if not first():
        all_here()
    yield
    if first():
        all_here()


def all_here() -> None:
    """Wait until every process has come so far; all must ask."""
    if processes() > 1:
        dist.barrier()


def agreed(value: float) -> float:
    """What the first process has for a value, so that all decide alike; all must ask."""
    if processes() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said)
    return said[0]
