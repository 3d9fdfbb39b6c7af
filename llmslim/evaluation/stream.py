"""Perplexity and divergence of models larger than memory: the same stream of blocks that calibration uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llmslim.calibration.stream import BlockStream, Lane
from llmslim.checkpoint.reader import CheckpointReader
from llmslim.checkpoint.walk import walk_blocks
from llmslim.evaluation.scores import Scores, TokenScores, Watch
from llmslim.loaders.models import ModelFiles


def streamed_outputs(
    files: ModelFiles,
    tokens: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Tensor]:
    """Run windows [windows, seq] through a model block by block; yields the logits [seq, vocab] of each window.

    Memory holds one block, the hidden states of the windows, and at the end the head and one window's logits.
    """
    reader = CheckpointReader(files)
    model = reader.model_skeleton()
    stream = BlockStream(model, device, dtype)
    lane = Lane.of_tokens("evaluation", tokens, bool(model.config.is_encoder_decoder), windows_per_chunk=1)
    stream.add(lane)
    total = len(stream.anatomy.blocks)
    for done, block in enumerate(walk_blocks(reader, stream), 1):
        stream.forward(block, lane)
        progress(done, total)
    for _, output in stream.outputs(lane):
        yield output[0][0]


def streamed_scores(
    files: ModelFiles,
    tokens: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    base: ModelFiles | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Negative log-likelihood of windows, and the divergence from a base, without holding either model."""
    return streamed_windows(files, tokens, device, dtype, base, progress).result()


def streamed_windows(
    files: ModelFiles,
    tokens: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    base: ModelFiles | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    watch: Watch | None = None,
) -> TokenScores:
    """`streamed_scores` by window, so that some of them can be looked at apart, and with a look at every token."""
    scores = TokenScores(watch)
    outputs = streamed_outputs(files, tokens, device, dtype, progress)
    if base is None:
        for window, logits in zip(tokens, outputs, strict=True):
            scores.add(window, logits)
    else:
        others = streamed_outputs(base, tokens, device, dtype)
        for window, base_logits, logits in zip(tokens, others, outputs, strict=True):
            scores.add(window, logits, base_logits)
    return scores
