"""What a model is differentiated for: the loss of one window of text, by what the model was made to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmslim.anatomy import Anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Objective = Callable[[Tensor, torch.Generator], Tensor]
"""A window [1, seq] and a CPU generator for what is random -> the loss, a scalar."""

MASKED = 0.15  # share of a window's tokens that a masked language model is asked for, as in its training
IGNORED = -100  # label of a position that is not asked for


def objective_of(model: PreTrainedModel, mask_token: int | None = None) -> Objective:
    """The loss that fits the model; a mean over the predicted tokens, in nats, for all that predict tokens.

    - causal language model: the next token.
    - encoder-decoder (T5): the same text on both sides.
    - masked language model: 15% of the tokens, replaced by `mask_token` (default: the config's mask_token_id). With
      neither known by random tokens, which masked models meet in their training too (Devlin et al. 2019,
      arXiv:1810.04805: a tenth of what is asked for). The id of the padding would be no stand-in: RoBERTa counts
      positions by it.
    - no language-model head (AutoModel, classifiers): <r, output> with a standard normal r. Over many r its squared
      gradient has the mean diag(J^T J), the diagonal of the Gauss-Newton matrix of the squared output error. Its
      mean gradient goes to 0, so only what is taken per window says something of such a model.
    """
    anatomy = Anatomy.of(model)
    if anatomy.head is None:
        return lambda window, generator: random_projection(model, window, generator)
    if model.config.is_encoder_decoder or anatomy.is_decoder:
        return lambda window, generator: model(input_ids=window, labels=window).loss
    mask_token = getattr(model.config, "mask_token_id", None) if mask_token is None else mask_token
    return lambda window, generator: masked_tokens(model, window, generator, mask_token)


def masked_tokens(
    model: PreTrainedModel, window: Tensor, generator: torch.Generator, mask_token: int | None
) -> Tensor:
    """-log p of the tokens at 15% of the positions (one at least), in nats, given the others; window [1, seq]."""
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    tokens, labels = masked(window, generator, mask_token, vocabulary)
    return model(input_ids=tokens, labels=labels).loss


def masked(
    window: Tensor, generator: torch.Generator, mask_token: int | None, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """A window [1, seq] with other tokens at 15% of the positions, and what was there; IGNORED elsewhere."""
    length = window.shape[1]
    positions = torch.randperm(length, generator=generator)[: max(1, round(MASKED * length))]
    tokens = torch.randint(0, vocabulary, positions.shape, generator=generator)
    if mask_token is not None:
        tokens.fill_(mask_token)
    positions, tokens = positions.to(window.device), tokens.to(window.device)
    labels = torch.full_like(window, IGNORED)
    labels[0, positions] = window[0, positions]
    return window.index_copy(1, positions, tokens[None]), labels


def random_projection(model: PreTrainedModel, window: Tensor, generator: torch.Generator) -> Tensor:
    """<r, h> with r ~ N(0, 1), for the model's first output h (the last hidden states, or a classifier's logits)."""
    inputs = {"input_ids": window}
    if model.config.is_encoder_decoder and not _is_encoder(model):
        inputs["decoder_input_ids"] = window
    output = model(**inputs)[0].float()
    return (output * torch.randn(output.shape, generator=generator).to(output.device)).sum()


def _is_encoder(model: PreTrainedModel) -> bool:
    """Whether it is the encoder alone of an encoder-decoder (T5EncoderModel)."""
    return not hasattr(model, "decoder") and not hasattr(getattr(model, "model", None), "decoder")
