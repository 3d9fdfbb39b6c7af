"""A model in memory as lm-eval's language model; importing this imports lm-eval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from llmslim.evaluation.kept import Kept
from llmslim.evaluation.perplexity import read_in_chunks
from llmslim.memory import available_memory

Progress = Callable[[int, int], None]
MOST = {"cpu": 16, "other": 64}  # rows of a batch: more gain nothing


class Harness(HFLM):
    """`HFLM` of a loaded model, with a batch size from the memory that is free, and progress.

    Args:
        batch_size: rows at a time; what fits when None.
        chunk: tokens that a row is read in at a time, so that those after read the KV cache that the model makes; all
            at once when None.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int | None,
        progress: Progress = lambda done, total: None,
        chunk: int | None = None,
        kept: Kept | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or "auto")
        self._kept = kept
        if kept is not None:
            self.set_cache_hook(kept)  # type: ignore[arg-type]
        self._progress, self._done, self._asked, self._chunk = progress, 0, 0, chunk

    def loglikelihood(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        return self._answered("loglikelihood", super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        return self._answered("loglikelihood_rolling", super().loglikelihood_rolling, requests)

    def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        return self._answered("generate_until", super().generate_until, requests)

    def _answered(self, kind: str, ask: Callable[..., Any], requests: Any) -> Any:
        """Requests that are kept are not asked; the bars of lm-eval are not shown."""

        def quietly(some: list[Any]) -> Any:
            return ask(some, disable_tqdm=True)

        return quietly(requests) if self._kept is None else self._kept.asked(kind, requests, quietly)

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        length = self.max_length
        if requests:
            _, context, continuation = requests[pos]
            length = min(length, len(context) + len(continuation))
        return fitting(self._model, length)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> Any:
        self._done, self._asked = 0, len(requests)
        answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        self._progress(self._asked, self._asked)
        return answers

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._chunk is None:
            logits = super()._model_call(inps, *args, **kwargs)
        else:
            logits = read_in_chunks(self.model, inps, self._chunk)
        if self._asked:
            self._done += len(inps)  # at most: requests that share a context are run once
            self._progress(min(self._done, self._asked), self._asked)
        return logits

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: lm-eval would ask the Hub."""
        return {}


def fitting(model: Any, length: int) -> int:
    """Rows of `length` tokens whose logits, keys, values and channels take half of the free memory; 16 at most on a
    CPU."""
    config, device = model.config.get_text_config(), model.device
    hidden, layers = config.hidden_size, config.num_hidden_layers
    channels = getattr(config, "intermediate_size", None) or 4 * hidden
    size = torch.finfo(model.dtype).bits // 8 if model.dtype.is_floating_point else 4
    row = length * size * (2 * config.vocab_size + 2 * layers * hidden + 4 * channels)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return max(1, min(MOST.get(device.type, MOST["other"]), free // 2 // row))
