"""Quality of sharing weights between the 30 blocks of SmolLM2-135M, at equal numbers of unique parameters.

    python evals/sharing.py [--variants '22-blocks/*']    --list names the variants

Calibration: 32 x 512 tokens of WikiText-2 valid; nothing is trained. See variants.py for how a variant is judged.
A block has 3.54 million weights; a correction of rank r of all 30 blocks has r x 0.305 million, so that 15 different
blocks with corrections of rank 80 have what 22 different blocks have.
"""

from __future__ import annotations

import record
import render
import variants
from variants import Steps

PLAIN = {
    "sequential": {"grouping": "sequential"},
    "cyclic": {"grouping": "cyclic"},
    "similarity": {},
    "similarity-mean": {"init": "mean"},
    "similarity-first": {"init": "first"},
}


def recipes() -> dict[str, Steps]:
    """Name -> steps. A name is the size in unique blocks / what is shared and how."""
    found: dict[str, Steps] = {"base": []}
    for name, fields in PLAIN.items():
        found[f"22-blocks/{name}"] = [{"share": {"unique_blocks": 22, **fields}}]
    for name, fields in {"similarity": {}, "sequential": PLAIN["sequential"]}.items():
        found[f"22-blocks/15-and-deltas-{name}"] = [
            {"share": {"unique_blocks": 15, "delta_rank": 80, **fields}}
        ]
    found["22-blocks/18-and-deltas-similarity"] = [{"share": {"unique_blocks": 18, "delta_rank": 48}}]
    for name in ("sequential", "similarity"):
        found[f"15-blocks/{name}"] = [{"share": {"unique_blocks": 15, **PLAIN[name]}}]
    found["15-blocks/10-and-deltas-similarity"] = [{"share": {"unique_blocks": 10, "delta_rank": 56}}]
    for part in ("attention", "mlp"):
        found[f"15-blocks/similarity-{part}"] = [{"share": {"unique_blocks": 15, "part": part}}]
    return found


if __name__ == "__main__":
    options = record.parse(variants.parser(__doc__ or "", "sharing"))
    variants.run(options, recipes(), render.by_bytes)
