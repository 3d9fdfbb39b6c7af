"""Quality of sharing weights between the 30 blocks of SmolLM2-135M, at equal numbers of unique parameters.

    python evals/sharing.py [--variants '22-blocks/*']    --list names the variants

Calibration: 32 x 512 tokens of WikiText-2 valid; nothing is trained. See variants.py for how a variant is judged.
A block has 3.54 million weights; a correction of rank r of all 30 blocks has r x 0.305 million, so that 15 different
blocks with corrections of rank 80 have what 22 different blocks have.
"""

from __future__ import annotations

from typing import Any

import record
import tables
import variants
from variants import Steps


def recipes() -> dict[str, Steps]:
    """Name -> steps. A name is the size in unique blocks / what is shared and how."""
    similarity, sequential = {"grouping": "similarity"}, {"grouping": "sequential"}
    plain, half = {"unique_blocks": 22, **similarity}, {"unique_blocks": 15, **similarity}
    deltas = {**half, "delta_rank": 80}
    found: dict[str, dict[str, Any]] = {
        "22-blocks/similarity": plain,
        "22-blocks/15-and-deltas": deltas,
        "22-blocks/sequential": {**plain, **sequential},
        "22-blocks/15-and-deltas-sequential": {**deltas, **sequential},
        "22-blocks/similarity-mean": {**plain, "init": "mean"},
        "15-blocks/similarity": half,
        "15-blocks/10-and-deltas": {**similarity, "unique_blocks": 10, "delta_rank": 56},
        "15-blocks/sequential": {**half, **sequential},
    }
    return {"base": [], **{name: [{"share": fields}] for name, fields in found.items()}}


if __name__ == "__main__":
    options = record.parse(variants.parser(__doc__ or "", "sharing"))
    variants.run(options, recipes(), tables.by_bytes)
