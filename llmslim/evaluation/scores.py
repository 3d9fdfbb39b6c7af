"""What one model's logits say of a text, token by token, and how sure the mean over windows is.

Everything here takes logits, not models: a whole model's forward feeds it, and so does a streamed run that
has only the last hidden states and the head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F

from llmslim.errors import UserError

CHUNK_ELEMENTS = 8_000_000  # logits held in fp32 at a time: 32 MB a copy, whatever the vocabulary


class Logits(Protocol):
    """Logits [seq_len, vocab] that are asked for by slices of positions: a tensor, or what makes them."""

    def __getitem__(self, positions: slice, /) -> torch.Tensor: ...


@dataclass(frozen=True)
class Estimate:
    """A mean over windows and its standard error (None of a single window, which tells no spread)."""

    value: float
    stderr: float | None

    @classmethod
    def of(cls, samples: list[float]) -> Estimate:
        """Mean of the samples; standard error = standard deviation (n - 1) / sqrt(n)."""
        values = torch.tensor(samples, dtype=torch.float64)
        stderr = float(values.std() / math.sqrt(len(samples))) if len(samples) > 1 else None
        return cls(float(values.mean()), stderr)

    def exp(self) -> Estimate:
        """exp of the mean; its standard error by the delta method, exp(mean) * stderr."""
        value = float(torch.tensor(self.value, dtype=torch.float64).exp())  # inf where math.exp raises
        return Estimate(value, None if self.stderr is None else value * self.stderr)


@dataclass(frozen=True)
class Scores:
    """Means per predicted token: nll in nats, and, where a base was given, its nll, the paired difference
    nll - base_nll, KL(base || model) in nats, and the share of tokens with the same most probable next."""

    nll: Estimate
    base_nll: Estimate | None = None
    nll_increase: Estimate | None = None
    kl: Estimate | None = None
    top1_agreement: Estimate | None = None


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target) in nats, [tokens], from logits [tokens, vocab] that predict targets [tokens]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def token_kl(base_logits: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per token: KL(base || model) = sum_v p_base(v) (log p_base(v) - log p(v)) in nats, and whether the
    most probable token is the same. Both logits [tokens, vocab]; computed in fp32; results [tokens]."""
    base_log_p = F.log_softmax(base_logits.float(), dim=-1)
    log_p = F.log_softmax(logits.float(), dim=-1)
    kl = (base_log_p.exp() * (base_log_p - log_p)).sum(-1)
    return kl, base_logits.argmax(-1) == logits.argmax(-1)


class Watch(Protocol):
    """Sees every slice of a window as it is scored: its tokens [seq_len], the first position of the slice, the
    logits [n, vocab] of base and model there, and the fields of `Scores` per token [n]."""

    def __call__(
        self,
        tokens: torch.Tensor,
        start: int,
        base_logits: torch.Tensor | None,
        logits: torch.Tensor,
        values: dict[str, torch.Tensor],
    ) -> None: ...


@dataclass
class TokenScores:
    """Adds up windows: `add` each, then `result`. Holds a few numbers per window, whatever the vocabulary.

    Windows, not tokens, are the samples of the standard errors: neighbouring tokens are not independent.
    """

    watch: Watch | None = None
    _windows: dict[str, list[float]] = field(default_factory=dict)

    def add(self, tokens: torch.Tensor, logits: Logits, base_logits: Logits | None = None) -> None:
        """One window: tokens [seq_len], logits [seq_len, vocab] of the model and, to compare, of its base.

        Position i predicts token i + 1, so a window has seq_len - 1 predicted tokens. Logits are asked for
        and turned to fp32 a slice at a time. All windows must have one length, and all a base or none.
        `UserError` for logits that are not finite and for a base with another vocabulary.
        """
        predicted = len(tokens) - 1
        step = max(1, CHUNK_ELEMENTS // logits[:1].shape[-1])
        sums: dict[str, float] = {}
        for start in range(0, predicted, step):
            rows = slice(start, min(start + step, predicted))
            targets = tokens[rows.start + 1 : rows.stop + 1]
            base = None if base_logits is None else base_logits[rows]
            own = logits[rows]
            scored = _score(targets, own, base)
            for name, values in scored.items():
                sums[name] = sums.get(name, 0.0) + float(values.double().sum())
            if self.watch is not None:
                self.watch(tokens, start, base, own, scored)
        if any(map(math.isnan, sums.values())):
            raise UserError(
                "the model's logits hold NaN or infinity, so nothing can be measured: look for such values "
                "in its weights, or load it with dtype float32 if it was made for a wider range"
            )
        for name, total in sums.items():
            self._windows.setdefault(name, []).append(total / predicted)

    def result(self, windows: slice = slice(None)) -> Scores:
        """The means over all windows added so far (at least one), or over some of them, in the order of adding."""
        return Scores(**{name: Estimate.of(means[windows]) for name, means in self._windows.items()})


def _score(
    targets: torch.Tensor, logits: torch.Tensor, base_logits: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The fields of `Scores`, per token [tokens]."""
    nll = token_nll(logits, targets.to(logits.device))
    if base_logits is None:
        return {"nll": nll}
    if base_logits.shape[-1] != logits.shape[-1]:
        raise UserError(
            f"the base has a vocabulary of {base_logits.shape[-1]} tokens and the model of "
            f"{logits.shape[-1]}: a divergence takes two models with the same tokenizer"
        )
    base_logits = base_logits.to(logits.device)
    kl, same = token_kl(base_logits, logits)
    base_nll = token_nll(base_logits, targets.to(logits.device))
    return {
        "nll": nll,
        "base_nll": base_nll,
        "nll_increase": nll - base_nll,
        "kl": kl,
        "top1_agreement": same,
    }
