"""Does vLLM on a CPU load checkpoints of ours and answer with the greedy text of transformers?

    python evals/peers/vllm_loads.py --checkpoints '4-bit=out/4bit' --dtypes bfloat16 float16

Runs in vLLM's own environment (evals/README.md says how to make it). A row has both texts of every prompt and
the tokens that are equal before the first difference; where vLLM refuses a checkpoint, its error.
"""

from __future__ import annotations

import os
from argparse import Namespace

import greedy

# One process, bound to nothing but what it inherits, a small cache, no network.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def by_vllm(folder: str, dtype: str, options: Namespace) -> list[greedy.Answer]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        llm = LLM(folder, dtype=dtype, max_model_len=512, enforce_eager=True, seed=options.seed)
        wanted = SamplingParams(temperature=0, max_tokens=options.new_tokens)
        made = llm.generate(list(greedy.PROMPTS), wanted)
        return [(list(one.outputs[0].token_ids), one.outputs[0].text) for one in made]
    finally:
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    greedy.compare(__doc__ or "", "vLLM", by_vllm)
