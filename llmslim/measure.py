"""Measure base and result with the same code: quality by streaming, speed and memory in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch

from llmslim.checkpoint.reader import CheckpointReader
from llmslim.errors import UserError
from llmslim.evaluation.divergence import Comparison
from llmslim.evaluation.perplexity import require_causal
from llmslim.evaluation.stream import streamed_scores
from llmslim.loaders.models import ModelFiles
from llmslim.loaders.texts import sample
from llmslim.memory import available_memory
from llmslim.recipe import Evaluation
from llmslim.size import size_of
from llmslim.work import Progress, WorkFolder


def measure(
    base: ModelFiles,
    result: ModelFiles,
    evaluation: Evaluation | None,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    work: WorkFolder,
) -> dict[str, Any]:
    """Sizes always; perplexity, divergence, speed and memory as `evaluation` asks. Resumes per measurement."""
    sizes = {"base": size_of(base), "result": size_of(result)}
    measured: dict[str, Any] = {"size": sizes, "quality": None, "speed": None}
    if evaluation is None:
        return measured
    kept = work.state.setdefault("measured", {})
    if "quality" not in kept:
        kept["quality"] = _quality(base, result, evaluation, device, dtype, progress)
        work.save()
    if evaluation.speed and "speed" not in kept:
        kept["speed"] = _speed(base, result, sizes, progress)
        work.save()
    return {**measured, **kept}


def _quality(
    base: ModelFiles,
    result: ModelFiles,
    evaluation: Evaluation,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, Any]:
    try:
        require_causal(CheckpointReader(base).model_skeleton())
    except UserError as error:
        return {"skipped": str(error)}
    text = sample(
        evaluation.text,
        base.tokenizer(),
        evaluation.windows,
        evaluation.seq_len,
        join=evaluation.join,
        builtin_part="test",
    )
    scores = streamed_scores(
        result, text.tokens, device, dtype, base, lambda done, total: progress("evaluate", done, total)
    )
    return Comparison.of(scores, text).to_dict()


def _speed(base: ModelFiles, result: ModelFiles, sizes: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Speed and memory of base and result, each loaded in a process of its own."""
    need = 4 * sizes["base"]["parameters"] + 10**9
    if need > available_memory():
        return {"skipped": f"the base needs about {need / 1e9:.1f} GB in memory, and there is less"}
    figures: dict[str, Any] = {}
    for step, (name, files) in enumerate((("base", base), ("result", result))):
        progress("speed", step, 2)
        figures[name] = _in_fresh_process(files)
    progress("speed", 2, 2)
    return figures


def _in_fresh_process(files: ModelFiles) -> dict[str, Any]:
    command = [sys.executable, "-m", "llmslim.evaluation.benchmark", str(files.folder)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode != 0:
        return {"skipped": (done.stderr.strip() or "the process died").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])
