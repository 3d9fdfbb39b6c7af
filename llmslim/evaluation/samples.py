"""What a model writes behind a few prompts, so that a person can look at base and result side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, a small robot")


def decoding(tokenizer: Any, temperature: float = 0.0) -> dict[str, Any]:
    """What `generate` is given to decode greedily, or to sample at a temperature."""
    # a checkpoint's own sampling settings, left in place, draw a warning when decoding is greedy
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    how: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else greedy
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {**how, "pad_token_id": pad}


@torch.no_grad()
def continuations(model: PreTrainedModel, tokenizer: Any, new_tokens: int = 32) -> list[dict[str, str]]:
    """Greedy continuations [{"prompt", "text"}] of `PROMPTS`, of `new_tokens` tokens at most."""
    made = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        out = model.generate(  # type: ignore[operator]
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new_tokens,
            **decoding(tokenizer),
        )
        text = tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)
        made.append({"prompt": prompt, "text": text})
    return made
