"""Running a model in training: without a cache, with a look at what its modules give, and to write text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | Mapping[str, Tensor]
"""Tokens int64 [batch, seq], or all that a model takes, by name."""


def run(model: nn.Module, inputs: Inputs) -> Any:
    """The output of a model; no cache is made."""
    caches = bool(getattr(model.config, "use_cache", False))
    named = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    return model(**named, use_cache=False) if caches else model(**named)


def observe(model: nn.Module, inputs: Inputs, modules: Sequence[nn.Module]) -> tuple[Any, list[Tensor]]:
    """The output, and what each of these modules of the model gave in between (the first, of a tuple)."""
    given: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        given[module] = output[0] if isinstance(output, tuple) else output

    hooks = [module.register_forward_hook(keep) for module in dict.fromkeys(modules)]
    try:
        output = run(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return output, [given[module] for module in modules]


@torch.no_grad()
def sampled(model: nn.Module, prompt: Tensor, length: int) -> Tensor:
    """The prompt, int64 [batch, seq], and `length` tokens drawn from a causal model's own distribution.

    Temperature 1, nothing cut off, whatever the model's generation config says; an end-of-text token ends nothing, as
    in the windows of a text. Drawn by torch's own generator, in eval mode.
    """
    training = model.training
    model.eval()
    text, asked, cache = prompt, prompt, None
    for _ in range(length):
        output = model(input_ids=asked, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        asked = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1)
        text = torch.cat([text, asked], 1)
    model.train(training)
    return text
