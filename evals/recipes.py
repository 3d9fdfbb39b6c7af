"""What the recipes in configs/ make of SmolLM2-135M: bytes against perplexity, beside single methods.

    python evals/recipes.py [--variants '*4bit*']    --list names the recipes

Each keeps its steps and takes the same text as the other scripts, 32 x 512 tokens of WikiText-2 valid; the encoder has
its own measure in pruning_encoder.py, and long-context, whose weights are those of gptq-4bit, in kv_cache.py. See
variants.py for how a recipe is judged.
"""

from __future__ import annotations

import record
import tables
import variants
import yaml
from variants import Steps


def recipes() -> dict[str, Steps]:
    """Name of the file -> its steps."""
    found: dict[str, Steps] = {"base": []}
    for path in sorted((record.ROOT / "configs").glob("*.yaml")):
        if path.stem not in ("encoder", "long-context"):
            found[f"configs/{path.stem}"] = yaml.safe_load(path.read_text("utf-8"))["steps"]
    return found


if __name__ == "__main__":
    options = record.parse(variants.parser(__doc__ or "", "recipes"))
    variants.run(options, recipes(), tables.by_bytes)
