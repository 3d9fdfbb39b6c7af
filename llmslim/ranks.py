"""Which of several processes that train together this one is, and what they do one after the other, or alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


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
    return of_all(value)[0]


def of_all(value: T) -> list[T]:
    """What each of the processes has for a value; all must ask."""
    said = [value] * processes()
    if len(said) > 1:
        dist.all_gather_object(said, value)
    return said
