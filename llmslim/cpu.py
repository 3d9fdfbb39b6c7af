"""What this CPU is quick at."""

from __future__ import annotations

import time
from functools import cache

import torch

_ROUNDS = 5
_SIDE = 512


@cache
def fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are quicker than in float32 here, as products of both tell (0.1 s, once).

    What the CPU says of itself does not tell it: with AVX512-BF16 they take between half the time of float32 (AMD Zen
    4) and 1.7 times as long (Intel Sapphire Rapids where AMX is hidden); without, 8 times as long.
    """
    values = torch.ones(_SIDE, _SIDE)
    sides = {torch.bfloat16: values.bfloat16(), torch.float32: values}
    best = dict.fromkeys(sides, float("inf"))
    for turn in range(_ROUNDS + 1):
        for dtype, side in sides.items():  # in turn, so that what else the machine does slows both
            begun = time.perf_counter()
            with torch.autocast("cpu", enabled=False):
                side @ side
            if turn:  # the first one prepares
                best[dtype] = min(best[dtype], time.perf_counter() - begun)
    return best[torch.bfloat16] < best[torch.float32]
