"""Perplexity of a causal language model, with its protocol and its standard error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmslim.errors import UserError
from llmslim.evaluation.scores import Estimate, TokenScores
from llmslim.loaders.texts import TextSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]  # windows done, windows in all


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity and all that another needs to get the same figure.

    value = exp(nll); nll is the mean over the predicted tokens (seq_len - 1 of each window), in nats.
    nll_stderr is the standard error over the windows' means, stderr that of the value by the delta method
    (value * nll_stderr); both are None for one window. They tell how much another choice of windows would
    move the figure; the difference of two models on the same windows is far surer than that.
    """

    value: float
    stderr: float | None
    nll: float
    nll_stderr: float | None
    windows: int
    seq_len: int
    stride: int
    tokens: int
    bos: int | None
    join: str
    text: str
    seed: int | None
    data_hash: str
    protocol: str

    @classmethod
    def of(cls, nll: Estimate, text: TextSample) -> PerplexityResult:
        """From the mean nll of the windows of `text`."""
        perplexity = nll.exp()
        windows, seq_len = text.tokens.shape
        return cls(
            value=perplexity.value,
            stderr=perplexity.stderr,
            nll=nll.value,
            nll_stderr=nll.stderr,
            windows=windows,
            seq_len=seq_len,
            stride=seq_len,
            tokens=windows * (seq_len - 1),
            bos=text.bos,
            join=text.join,
            text=text.spec,
            seed=text.seed,
            data_hash=text.data_hash,
            protocol=text.protocol,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def perplexity(
    model: PreTrainedModel, text: TextSample, progress: Progress | None = None, chunk: int | None = None
) -> PerplexityResult:
    """exp of the mean negative log-likelihood over the windows of `text`, one window at a time.

    Windows do not overlap and share no context, so a figure depends on seq_len: compare only what has the
    same `protocol` and `data_hash`. `chunk`: see `window_logits`. A model that is not
    a causal language model raises `UserError`.
    """
    require_causal(model)
    scores = TokenScores()
    for number, window in enumerate(text.tokens, start=1):
        scores.add(window, window_logits(model, window, chunk))
        if progress:
            progress(number, len(text.tokens))
    return PerplexityResult.of(scores.result().nll, text)


@torch.no_grad()
def window_logits(model: PreTrainedModel, window: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
    """Logits [seq_len, vocab] of one window of tokens [seq_len], in the model's dtype.

    The model must be in eval mode, as the loaders hand it out: dropout would falsify the figure.

    Args:
        chunk: tokens that go through the model at a time, the next reading those before from the KV cache that the
            model makes; what a quantized cache costs shows there alone. None: all at once, without a cache.
    """
    if chunk is not None:
        return read_in_chunks(model, window[None].to(model.device), chunk)[0]
    return model(input_ids=window[None].to(model.device), use_cache=False).logits[0]


@torch.no_grad()
def read_in_chunks(model: PreTrainedModel, tokens: torch.Tensor, chunk: int) -> torch.Tensor:
    """Logits [batch, seq, vocab] of tokens [batch, seq], read in chunks through the KV cache that the model makes."""
    past, parts = None, []
    for part in tokens.split(chunk, 1):
        out = model(input_ids=part, past_key_values=past, use_cache=True)
        past = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1)


def require_causal(model: PreTrainedModel) -> None:
    """Refuse a model for which the probability of the next token is not defined."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = model.config
    name = type(model).__name__
    if config.is_encoder_decoder:
        kind = "an encoder-decoder, whose probabilities depend on a source text"
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        kind = "an encoder, which sees the words it would have to predict"
    elif not model.can_generate():
        kind = "a model without a language-model head"
    else:
        return
    raise UserError(
        f"{name} is {kind}, so it has no perplexity: give a causal language model (one that "
        "AutoModelForCausalLM loads), or measure this one by the score of a task it was trained for"
    )
