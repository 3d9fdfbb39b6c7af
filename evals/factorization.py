"""Quality of low-rank factorization of SmolLM2-135M: which decomposition, at how many parameters.

    python evals/factorization.py [--variants '*/svd_llm*']    --list names the variants

Calibration: 32 x 512 tokens of WikiText-2 valid; nothing is trained. See variants.py for how a variant is judged.
"""

from __future__ import annotations

import record
import tables
import variants
from variants import Steps

CHOICES = {
    "svd": {"svd": {}},
    "asvd": {"asvd": {}},
    "svd_llm": {"svd_llm": {}},
    "svd_llm-error": {"svd_llm": {"allocation": "error"}},
    "svd-update": {"svd": {"update": True}},
}


def recipes() -> dict[str, Steps]:
    """Name -> steps. A name is which matrices / share of the blocks' parameters / by which decomposition."""
    found: dict[str, Steps] = {"base": []}
    for share in (10, 20, 30):
        for name, choice in CHOICES.items():
            kind, fields = next(iter(choice.items()))
            found[f"linears/{share}%/{name}"] = [{kind: {"ratio": share / 100, **fields}}]
    for rank in (384, 256):
        only_table = {"include": ["no Linear"]}
        found[f"embeddings/rank-{rank}/svd"] = [{"svd": {"embeddings_rank": rank, **only_table}}]
    return found


if __name__ == "__main__":
    options = record.parse(variants.parser(__doc__ or "", "factorization"))
    variants.run(options, recipes(), tables.by_share)
