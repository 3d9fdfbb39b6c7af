"""Do transformers with optimum and GPTQModel load checkpoints of ours in the GPTQ layout, and say the same?

    python evals/peers/gptqmodel_loads.py --checkpoints '4-bit gptq=out/gptq4' --dtypes float32

Runs in GPTQModel's own environment (evals/README.md says how to make it). Its greedy text is compared with that of
the dense model whose weights are read off the stored integers by `gptq_perplexity.py`, without a GPTQ library.
"""

from __future__ import annotations

import os
from argparse import Namespace

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import greedy


def by_gptqmodel(folder: str, dtype: str, options: Namespace) -> list[greedy.Answer]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    print({type(m).__name__ for m in model.modules() if hasattr(m, "qweight")})
    return greedy.answers(model, folder, options)


if __name__ == "__main__":
    greedy.compare(__doc__ or "", "GPTQModel", by_gptqmodel)
