"""Memory of this process and machine."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
_THRESHOLD = 2**20
KERNELS = 128
"""Kernels that oneDNN keeps, instead of 1024, of some 0.7 MB each: one per shape of a product, of which an ordinary
model has a few dozen, and a mixture ever new ones, as other numbers of tokens go to its experts."""
KEPT = 2**30
"""Bytes of freed memory that a loop in `freed_memory_kept` may hold at the heap's end."""


def return_freed_memory() -> None:
    """Have the C library give every freed megabyte back to the system at once, now and from now on.

    glibc raises its threshold with use and then keeps tensors' memory in a heap that fragments: a run of many
    blocks would hold a third more than it needs. Elsewhere than on glibc this does nothing.
    """
    _set_threshold(_THRESHOLD)


def bound_kernels() -> None:
    """Have oneDNN keep no more than `KERNELS`; it asks the environment at its first product, and never again."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside, freed memory is kept for the next tensor: a loop that asks for the same sizes again saves a fifth."""
    _set_threshold(KEPT)
    try:
        yield
    finally:
        return_freed_memory()


def _set_threshold(size: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.mallopt(_M_MMAP_THRESHOLD, size)
        libc.mallopt(_M_TRIM_THRESHOLD, size)
        libc.malloc_trim(0)


def available_memory() -> int:
    """Bytes of memory that a new process could use now."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """Memory that this process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
