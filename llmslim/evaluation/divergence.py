"""How far a model has moved from its base: KL divergence and top-1 agreement on the same tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llmslim.evaluation.perplexity import PerplexityResult, Progress, require_causal, window_logits
from llmslim.evaluation.scores import Estimate, Scores, TokenScores
from llmslim.loaders.texts import TextSample

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Comparison:
    """Both perplexities, and the divergence per predicted token, each with its standard error over windows.

    nll_increase is the mean of the paired differences nll(model) - nll(base): on the same windows most of
    the spread cancels, so its standard error, not those of the perplexities, tells whether they differ.
    """

    perplexity: PerplexityResult
    base_perplexity: PerplexityResult
    nll_increase: Estimate
    kl: Estimate
    top1_agreement: Estimate

    @classmethod
    def of(cls, scores: Scores, text: TextSample) -> Comparison:
        """From scores that were added up with a base."""
        assert scores.base_nll and scores.nll_increase and scores.kl and scores.top1_agreement
        return cls(
            perplexity=PerplexityResult.of(scores.nll, text),
            base_perplexity=PerplexityResult.of(scores.base_nll, text),
            nll_increase=scores.nll_increase,
            kl=scores.kl,
            top1_agreement=scores.top1_agreement,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def compare(
    model: PreTrainedModel,
    base: PreTrainedModel,
    text: TextSample,
    progress: Progress | None = None,
    chunk: int | None = None,
) -> Comparison:
    """Run both models over the windows of `text`, one window at a time, and compare them token by token.

    Both are held in memory. KL is KL(base || model) in nats, computed in fp32. `chunk`: of the
    model alone, see `window_logits`. `UserError` for models that
    are not causal or do not share a vocabulary.
    """
    require_causal(model)
    require_causal(base)
    scores = TokenScores()
    for number, window in enumerate(text.tokens, start=1):
        scores.add(window, window_logits(model, window, chunk), window_logits(base, window))
        if progress:
            progress(number, len(text.tokens))
    return Comparison.of(scores.result(), text)
