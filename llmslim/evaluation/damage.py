"""Where a model differs from its base: by position in the window, by kind of text, and at which tokens most."""

from __future__ import annotations

import heapq
import itertools
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from llmslim.errors import UserError
from llmslim.evaluation.scores import TokenScores
from llmslim.loaders.texts import TextSample, sample

BINS = 16
WORST = 10
CONTEXT = 12  # tokens shown in front of a damaged one
DOMAIN_WINDOWS = 2  # of each other kind of text: a look, not a measurement
DOMAINS = {"builtin:test": "Python's documentation", "builtin:code": "Python source code"}


class Damage:
    """A `Watch` over the first windows that are scored: those of the evaluation text, tokens [windows, seq_len].

    Holds the sums of each position and the `WORST` tokens by the rise of their negative log-likelihood.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.windows, self.predicted = len(tokens), tokens.shape[1] - 1
        self.sums = {
            name: torch.zeros(self.predicted, dtype=torch.float64) for name in ("kl", "nll_increase")
        }
        self.seen = 0  # predicted tokens
        self._worst: list[tuple[float, int, dict[str, Any]]] = []

    def __call__(
        self,
        tokens: Tensor,
        start: int,
        base_logits: Tensor | None,
        logits: Tensor,
        values: dict[str, Tensor],
    ) -> None:
        if self.seen >= self.windows * self.predicted:
            return  # windows of other texts
        assert base_logits is not None
        count = len(logits)
        for name, total in self.sums.items():
            total[start : start + count] += values[name].double().cpu()
        rises = values["nll_increase"]
        for row in rises.topk(min(WORST, count)).indices.tolist():
            position = start + row
            found: dict[str, Any] = {
                "before": tokens[max(0, position + 1 - CONTEXT) : position + 1].tolist(),
                "token": int(tokens[position + 1]),
                "nll_increase": float(rises[row]),
                "probability": float((-values["nll"][row]).exp()),
                "base_probability": float((-values["base_nll"][row]).exp()),
                "likeliest": int(logits[row].argmax()),
                "base_likeliest": int(base_logits[row].argmax()),
            }
            heapq.heappush(
                self._worst, (found["nll_increase"], -self.seen - row, found)
            )  # of equals the first
            if len(self._worst) > WORST:
                heapq.heappop(self._worst)
        self.seen += count

    def to_dict(
        self, tokenizer: Any, scores: TokenScores, text: TextSample, others: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Plain JSON: by_position, by_domain and tokens.

        Args:
            scores: of the windows of `text` and then of those of `others`, by name, in order.
        """
        return {
            "by_position": self._by_position(),
            "by_domain": _by_domain(scores, text, others),
            "tokens": [
                self._told(tokenizer, found)
                for *_, found in sorted(self._worst, key=lambda e: (-e[0], -e[1]))
            ],
        }

    def _by_position(self) -> list[dict[str, Any]]:
        """Means over windows and over runs of positions; positions count the tokens in front."""
        edges = sorted({round(i * self.predicted / BINS) for i in range(BINS + 1)})
        return [
            {
                "first": low + 1,
                "last": high,
                **{name: float(total[low:high].mean()) / self.windows for name, total in self.sums.items()},
            }
            for low, high in itertools.pairwise(edges)
        ]

    @staticmethod
    def _told(tokenizer: Any, found: dict[str, Any]) -> dict[str, Any]:
        words = {key: found[key] for key in ("before", "token", "likeliest", "base_likeliest")}
        return {**found, **{key: tokenizer.decode(tokens) for key, tokens in words.items()}}


def other_domains(spec: str, tokenizer: Any, windows: int, seq_len: int) -> dict[str, Tensor]:
    """A few windows of prose and code that every Python has, beside the evaluation text: by spec, tokens.

    A text too short for windows of that length is left out, and `spec`, the evaluation text itself.
    """
    found = {}
    for other in DOMAINS:
        if other != _settled(spec):
            with suppress(UserError):
                found[other] = sample(other, tokenizer, min(DOMAIN_WINDOWS, windows), seq_len).tokens
    return found


def _by_domain(scores: TokenScores, text: TextSample, others: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows, start = [], 0
    named = {_settled(text.spec): text.tokens, **others}
    for spec, tokens in named.items():
        found = scores.result(slice(start, start + len(tokens)))
        start += len(tokens)
        row: dict[str, Any] = {"text": spec, "name": DOMAINS.get(spec, spec), "windows": len(tokens)}
        for name in ("kl", "nll_increase", "top1_agreement", "nll", "base_nll"):
            estimate = getattr(found, name)
            row[name] = {"value": estimate.value, "stderr": estimate.stderr}
        rows.append(row)
    return rows


def _settled(spec: str) -> str:
    return "builtin:test" if spec == "builtin" else spec
