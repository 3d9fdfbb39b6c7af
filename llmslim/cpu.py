"""What this CPU is quick at."""

from __future__ import annotations

import os
import time
from functools import cache

import torch

ANSWER = "LLMSLIM_FAST_BFLOAT16"
"""0 or 1 in the environment: what was found, for processes that this one starts, or what a user knows better."""
_ROUNDS = 5
_SIDE = 512


@cache
def fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are quicker than in float32 here, as products of both tell (0.1 s, once).

    What the CPU says of itself does not tell it: with AVX512-BF16 they take between half the time of float32 (AMD Zen
    4) and 1.7 times as long (Intel Sapphire Rapids where AMX is hidden); without, 8 times as long.
    """
    if os.environ.get(ANSWER) in ("0", "1"):
        return os.environ[ANSWER] == "1"
    values = torch.ones(_SIDE, _SIDE, dtype=torch.float32, device="cpu")
    sides = {torch.bfloat16: values.bfloat16(), torch.float32: values}
    best = dict.fromkeys(sides, float("inf"))
    for turn in range(_ROUNDS + 1):
        for dtype, side in sides.items():  # in turn, so that what else the machine does slows both
            begun = time.perf_counter()
            with torch.autocast("cpu", enabled=False):
                side @ side
            if turn:  # the first one prepares
                best[dtype] = min(best[dtype], time.perf_counter() - begun)
    found = best[torch.bfloat16] < best[torch.float32]
    os.environ[ANSWER] = str(int(found))
    return found
