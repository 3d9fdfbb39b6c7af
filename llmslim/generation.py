"""Text from a model, handed out piece by piece as it is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmslim.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COLDEST = 1e-3
"""Logits divided by less would overflow."""


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    write: Callable[[str], object] = lambda piece: None,
    *,
    max_new_tokens: int = 40,
    chat: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The continuation of a prompt.

    Args:
        write: called with each piece of it as soon as it is a whole word.
        chat: the prompt is a message of the user, put into the tokenizer's chat template.
        temperature: 0 is greedy.
        seed: of the sampling.

    Raises:
        UserError: the model does not generate, has no chat template, or the prompt is too long for it.
    """
    import torch
    from transformers import TextStreamer

    from llmslim.evaluation.samples import decoding
    from llmslim.loaders.heads import require_vocabulary

    tokens = prompt_tokens(model, tokenizer, prompt, chat).to(model.device)
    require_vocabulary(tokens, model, "the model")
    check(model, tokens.shape[1], max_new_tokens, temperature, seed)
    pieces: list[str] = []

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            write(text)

    torch.manual_seed(seed)
    model.generate(  # type: ignore[operator]
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        streamer=Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **decoding(tokenizer, temperature),
    )
    return "".join(pieces)


def check(
    model: PreTrainedModel, prompt_len: int, max_new_tokens: int, temperature: float, seed: int
) -> None:
    """Refuse what cannot be generated.

    Raises:
        UserError: too many tokens, or too few, a temperature that is none, or a seed out of range.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens} is too few: it takes at least 1.")
    if temperature != 0 and not COLDEST <= temperature < math.inf:
        raise UserError(
            f"temperature = {temperature:g} cannot be sampled at: 0 is greedy, 0.7 is usual, {COLDEST:g} the least."
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed = {seed} is no seed: it takes 0 to {2**32 - 1}.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and prompt_len + max_new_tokens > limit:
        raise UserError(
            f"The prompt's {prompt_len} tokens and {max_new_tokens} new ones are more than the "
            f"{limit} positions that the model has: shorten one of them."
        )


def prompt_tokens(model: PreTrainedModel, tokenizer: Any, prompt: str, chat: bool) -> Any:
    """The prompt's tokens [1, n], with the special tokens that the model expects."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UserError(
            f"{type(model).__name__} does not continue texts: generate takes a causal language model."
        )
    if not prompt:
        raise UserError("The prompt is empty: give some words to continue.")
    if not chat:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not tokenizer.chat_template:
        raise UserError("The model has no chat template: leave out --chat, or use a chat or instruct model.")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
