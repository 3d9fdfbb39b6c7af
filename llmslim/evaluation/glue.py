"""Scores on GLUE tasks, by the official metrics, with bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmslim.checkpoint.load import load_model
from llmslim.errors import UserError
from llmslim.evaluation.run import resolve_dtype
from llmslim.loaders.glue import DATASET, Sentences, Task, require_data, task_of, task_rows
from llmslim.loaders.heads import positions, reading, require_head
from llmslim.loaders.models import find, find_device
from llmslim.metrics import predicted, require_metrics, score
from llmslim.training.forward import label_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]

RESAMPLES = 1000
CONFIDENCE = 0.95
MAX_LENGTH = 512  # tokens of a sentence or pair, where the model can take as many


def interval(metric: str, predicted: Any, labels: Any, seed: int = 0) -> tuple[float, float]:
    """95 % confidence interval by the percentile bootstrap over examples (1000 resamples)."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    draw = np.random.default_rng(seed)
    resamples = (draw.integers(len(labels), size=len(labels)) for _ in range(RESAMPLES))
    values = [score(metric, predicted[rows], labels[rows]) for rows in resamples]
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def predictions(
    model: PreTrainedModel,
    task: Task,
    data: Sentences,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
) -> np.ndarray:
    """The most probable label of each example, or its score for a task without classes; [examples]."""
    return predicted(task, label_logits(model, task, data, batch_size, progress)).numpy()


def task_scores(
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    folder: str = "",
    subset: int | None = None,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """All metrics of one task on its validation data: {examples, total, metrics: {name: {value, low, high}}, score}.

    Args:
        subset: the first so many examples of each split; all when None.
    """
    record: dict[str, Any] = {"examples": 0, "total": 0, "metrics": {}}
    length = min(MAX_LENGTH, positions(model) or MAX_LENGTH, tokenizer.model_max_length)
    for split in task.splits:
        rows = task_rows(task, split, folder)
        used = rows[:subset]
        data = Sentences(task, used, reading(model, tokenizer), length)
        found, labels = predictions(model, task, data, batch_size, progress), data.labels.numpy()
        record["examples"] += len(used)
        record["total"] += len(rows)
        suffix = "_mismatched" if split.endswith("_mismatched") else ""
        for metric in task.metrics:
            low, high = interval(metric, found, labels)
            value = score(metric, found, labels)
            record["metrics"][metric + suffix] = {"value": value, "low": low, "high": high}
    values = [metric["value"] for metric in record["metrics"].values()]
    return {**record, "score": sum(values) / len(values)}


def evaluate_glue(
    model: str,
    tasks: Sequence[str],
    *,
    data: str = "",
    subset: int | None = None,
    batch_size: int = 32,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Score a classifier on GLUE tasks by their validation data.

    Args:
        model: a Hub id or a folder.
        tasks: names, such as ["sst2"].
        data: folder that holds `nyu-mll/glue` in the Hub's layout; the Hub when "".
        subset: the first so many examples alone, for a quick look.

    Returns:
        Plain JSON: tasks (see `task_scores`), average (of the tasks' scores), and the protocol.

    Raises:
        UserError: for a task, data set or head that is not there.
    """
    chosen = [task_of(name) for name in dict.fromkeys(tasks)]
    if not chosen:
        raise UserError("Which GLUE tasks? Name one or more, such as --glue sst2,mrpc.")
    if subset is not None and subset < 2:
        raise UserError(f"subset {subset} is too few: it takes at least 2 examples.")
    require_metrics()
    for task in chosen:
        require_data(task, task.splits, data)
    files = find(model, revision)
    for task in chosen:
        require_head(files.config, task, files.spec)
    place = find_device(device)
    loaded, tokenizer = load_model(files, resolve_dtype(dtype, files, place), place), files.tokenizer()
    scores = {
        task.name: task_scores(loaded, tokenizer, task, data, subset, batch_size, progress) for task in chosen
    }
    some = "" if subset is None else f", the first {subset} examples of each split alone"
    return {
        "model": files.base,
        "tasks": scores,
        "average": sum(record["score"] for record in scores.values()) / len(scores),
        "subset": subset,
        "protocol": f"{DATASET} validation{some}; at most {MAX_LENGTH} tokens; 95 % intervals by the percentile "
        f"bootstrap over examples, {RESAMPLES} resamples",
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(place),
    }
