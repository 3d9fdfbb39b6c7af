"""An FP8 KV cache for vLLM: a scale for the keys and one for the values of each layer, stored in the checkpoint.

vLLM and compressed-tensors read `kv_cache_scheme` in config.json and tensors [1] named `k_scale` and `v_scale` of each
attention. What goes into the cache is then round(x / scale) in float8 e4m3. llmslim keeps the scales and computes
without them.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmslim.anatomy.block import CACHE_SCALES, Block
from llmslim.calibration.stream import BlockStream, Lane
from llmslim.edit import Edit

LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448, the largest number of float8 e4m3."""
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
"""What `kv_cache_scheme` says of it."""


class ScaleCache(Edit):
    """Give the attention at `module` empty scales of its keys and values, [1] each."""

    kind: ClassVar[str] = "scale_cache"
    only_format: ClassVar[str] = "compressed-tensors"
    module: str

    def apply(self, model: nn.Module) -> None:
        attention = model.get_submodule(self.module)
        for name in CACHE_SCALES:
            if hasattr(attention, name):
                raise ValueError(f"{self.module} has a {name} already")
            attention.register_buffer(name, torch.empty(1, device="meta"))


def knows(attention: nn.Module, config: Any) -> bool:
    """Whether compressed-tensors finds such a module, and so its scales, by names in it and in the decoder's config."""
    named = "attention" in type(attention).__name__.lower() and hasattr(config, "num_key_value_heads")
    projected = any(hasattr(attention, name) for name in ("k_proj", "v_proj", "qkv_proj"))
    return named and projected and "past_key_values" in inspect.signature(attention.forward).parameters


class Greatest:
    """Takes a cache's place in one attention, and keeps the greatest magnitudes that it was given."""

    def __init__(self) -> None:
        self.found = [0.0, 0.0]

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        now = (float(keys.abs().amax()), float(values.abs().amax()))
        self.found = [max(pair) for pair in zip(self.found, now, strict=True)]
        return keys, values


def scales(block: Block, stream: BlockStream, lane: Lane) -> dict[str, Tensor]:
    """`k_scale` and `v_scale` [1], float32, with which the greatest of a lane is the largest of float8.

    The lane passes through the block.
    """
    seen = Greatest()

    def instead(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "past_key_values": seen}

    hook = block.attention.module.register_forward_pre_hook(instead, with_kwargs=True)
    try:
        stream.forward(block, lane)
    finally:
        hook.remove()
    return {
        name: torch.tensor([max(most, 1e-12) / LARGEST])
        for name, most in zip(CACHE_SCALES, seen.found, strict=True)
    }
