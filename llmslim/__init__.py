"""llmslim makes a Hugging Face model smaller and faster and proves what that cost.

    model, tokenizer = llmslim.load("demo")
    result = llmslim.compress("demo", [llmslim.GPTQ(bits=4, group_size=64)], output="out/demo")

Everything below is imported when first used: `import llmslim` alone loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmslim.anatomy import Anatomy
    from llmslim.checkpoint.load import load
    from llmslim.errors import UserError
    from llmslim.evaluation.glue import evaluate_glue
    from llmslim.evaluation.lm import evaluate_tasks
    from llmslim.evaluation.run import evaluate
    from llmslim.hub import push
    from llmslim.inspection import inspect
    from llmslim.kvcache.allocation import allocate_kv_bits
    from llmslim.kvcache.components import fit_kv_components
    from llmslim.kvcache.runtime.cache import KVCache, kv_cache
    from llmslim.pipeline import Result, compress
    from llmslim.quantization.gptq import GPTQ
    from llmslim.quantization.rtn import RTN
    from llmslim.recipe import Calibration, Evaluation, Recipe
    from llmslim.recovery.lora import with_adapter

__version__ = "0.1.0"

_HOMES = {
    "Anatomy": "llmslim.anatomy",
    "load": "llmslim.checkpoint.load",
    "UserError": "llmslim.errors",
    "evaluate": "llmslim.evaluation.run",
    "evaluate_glue": "llmslim.evaluation.glue",
    "evaluate_tasks": "llmslim.evaluation.lm",
    "with_adapter": "llmslim.recovery.lora",
    "push": "llmslim.hub",
    "inspect": "llmslim.inspection",
    "KVCache": "llmslim.kvcache.runtime.cache",
    "kv_cache": "llmslim.kvcache.runtime.cache",
    "allocate_kv_bits": "llmslim.kvcache.allocation",
    "fit_kv_components": "llmslim.kvcache.components",
    "Result": "llmslim.pipeline",
    "compress": "llmslim.pipeline",
    "Calibration": "llmslim.recipe",
    "Evaluation": "llmslim.recipe",
    "Recipe": "llmslim.recipe",
    "GPTQ": "llmslim.quantization.gptq",
    "RTN": "llmslim.quantization.rtn",
}

__all__ = [  # noqa: RUF022 - in the order of a first reading
    "load",
    "compress",
    "inspect",
    "evaluate",
    "evaluate_tasks",
    "evaluate_glue",
    "push",
    "Recipe",
    "Calibration",
    "Evaluation",
    "Result",
    "GPTQ",
    "RTN",
    "with_adapter",
    "kv_cache",
    "allocate_kv_bits",
    "fit_kv_components",
    "KVCache",
    "Anatomy",
    "UserError",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home; a capitalized name without one may be a method (a step)."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name[:1].isupper():
        steps = importlib.import_module("llmslim.step")
        steps.load_steps()
        found = [cls for cls in steps.STEPS.values() if cls.__name__ == name]
        if found:
            return found[0]
    raise AttributeError(f"module 'llmslim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
