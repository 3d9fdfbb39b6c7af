"""Scores on GLUE tasks, by the official metrics, with bootstrap confidence intervals."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from llmslim.checkpoint.load import load_model
from llmslim.errors import UserError
from llmslim.evaluation.paired import NO_LOSS, TOO_FEW, shift_verdict
from llmslim.loaders.glue import DATASET, Sentences, Task, require_data, task_of, task_rows
from llmslim.loaders.heads import positions, reading, require_head
from llmslim.loaders.models import ModelFiles, find, find_device, resolve_dtype
from llmslim.metrics import predicted, require_metrics, score
from llmslim.training.forward import label_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]

RESAMPLES = 1000
CONFIDENCE = 0.95
MAX_LENGTH = 512  # tokens of a sentence or pair, where the model can take as many


def resampled(metric: str, labels: Any, *sides: Any, seed: int = 0) -> np.ndarray:
    """A metric of each side on resamples of the examples, which are the same for all of them.

    Args:
        labels: [examples].
        sides: what models say of the same examples, [examples] each.

    Returns:
        [sides, 1000].
    """
    labels, draw = np.asarray(labels), np.random.default_rng(seed)
    said = [np.asarray(side) for side in sides]
    drawn = (draw.integers(len(labels), size=len(labels)) for _ in range(RESAMPLES))
    return np.array([[score(metric, side[rows], labels[rows]) for side in said] for rows in drawn]).T


def between(values: np.ndarray) -> tuple[float, float]:
    """What 95 % of the values lie between: the percentile interval of a bootstrap (Efron & Tibshirani 1993)."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def interval(metric: str, predicted: Any, labels: Any, seed: int = 0) -> tuple[float, float]:
    """95 % confidence interval by the percentile bootstrap over examples (1000 resamples)."""
    return between(resampled(metric, labels, predicted, seed=seed)[0])


def compared(metric: str, labels: Any, result: Any, base: Any = None) -> dict[str, Any]:
    """A metric with its interval: {value, low, high}; with a base also what it has, and what lies between them.

    The interval of the difference is paired: both models are scored on the same resamples, so that what is hard for
    both cancels.

    Args:
        labels, result, base: [examples], in one order.
    """
    sides = [result] if base is None else [result, base]
    values, drawn = [score(metric, side, labels) for side in sides], resampled(metric, labels, *sides)
    found: dict[str, Any] = {}
    for prefix, value, draws in zip(("", "base_"), values, drawn, strict=False):
        low, high = between(draws)
        found |= {prefix.rstrip("_") or "value": value, f"{prefix}low": low, f"{prefix}high": high}
    if base is not None:
        gap, (low, high) = values[0] - values[1], between(drawn[0] - drawn[1])
        found |= {"difference": gap, "difference_low": low, "difference_high": high}
        found["verdict"] = shift_verdict(gap, low, high, len(labels))
    return found


def predictions(
    model: PreTrainedModel,
    task: Task,
    data: Sentences,
    batch_size: int = 32,
    progress: Progress = lambda done, total: None,
) -> np.ndarray:
    """The most probable label of each example, or its score for a task without classes; [examples]."""
    return predicted(task, label_logits(model, task, data, batch_size, progress)).numpy()


class Asked(NamedTuple):
    """A split of a task's validation data: rows that are asked of models, and how many there are in all."""

    task: Task
    split: str
    rows: list[dict[str, Any]]
    total: int


def answers(
    files: ModelFiles,
    asked: Sequence[Asked],
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> list[np.ndarray]:
    """What a model, which is freed again, says of the examples of each split, [examples] each."""
    model, tokenizer = load_model(files, dtype, device), files.tokenizer()
    length = min(MAX_LENGTH, positions(model) or MAX_LENGTH, tokenizer.model_max_length)
    how = reading(model, tokenizer)
    found = [
        predictions(model, one.task, Sentences(one.task, one.rows, how, length), batch_size, progress)
        for one in asked
    ]
    del model
    gc.collect()  # the next model takes its place
    return found


def scored(asked: Sequence[Asked], said: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
    """One task of these splits: {examples, total, metrics: {name: see `compared`}, score}, with a base also base_score.

    Args:
        said: of the splits, what the model says of the examples, and behind it what the base does.
    """
    metrics: dict[str, Any] = {}
    for (task, split, rows, _), sides in zip(asked, said, strict=True):
        suffix = "_mismatched" if split.endswith("_mismatched") else ""
        labels = np.array([row["label"] for row in rows])
        metrics |= {metric + suffix: compared(metric, labels, *sides) for metric in task.metrics}
    record: dict[str, Any] = {
        "examples": sum(len(one.rows) for one in asked),
        "total": sum(one.total for one in asked),
        "metrics": metrics,
    }
    for name, key in (("score", "value"), ("base_score", "base")):
        values = [found[key] for found in metrics.values() if key in found]
        record |= {name: sum(values) / len(values)} if values else {}
    return record


def overall(scores: dict[str, Any]) -> str:
    """One sentence on all metrics of tasks with a base: where the model differs from it beyond chance."""
    moved: list[str] = []
    alike: dict[str, list[str]] = {NO_LOSS: [], TOO_FEW: []}
    for task, record in scores.items():
        for metric, found in record["metrics"].items():
            name = f"{task} {metric.replace('_', ' ')}"
            said = found["verdict"].partition(" (")[0]
            if said in alike:
                alike[said].append(name)
            else:
                moved.append(f"{name} {found['verdict']}")
    return "; ".join([*moved, *(f"{said} on {', '.join(names)}" for said, names in alike.items() if names)])


def chosen_tasks(
    names: Sequence[str], data: str = "", subset: int | None = None, flag: str = "--data"
) -> list[Task]:
    """The tasks of these names.

    Args:
        flag: the option that names the folder of the data.

    Raises:
        UserError: one that there is not, data that are not there, a subset too small, or no package to measure with.
    """
    chosen = [task_of(name) for name in dict.fromkeys(names)]
    if not chosen:
        raise UserError("Which GLUE tasks? Name one or more, such as --glue sst2,mrpc.")
    if subset is not None and subset < 2:
        raise UserError(f"subset {subset} is too few: it takes at least 2 examples.")
    require_metrics()
    for task in chosen:
        require_data(task, task.splits, data, flag)
    return chosen


def evaluate_glue(
    model: str,
    tasks: Sequence[str],
    *,
    base: str | None = None,
    data: str = "",
    subset: int | None = None,
    batch_size: int = 32,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Score a classifier on GLUE tasks by their validation data, and a base on the same examples.

    Args:
        model: a Hub id or a folder.
        tasks: names, such as ["sst2"].
        base: compare with this classifier, example by example; it computes in the type that the model does.
        data: folder that holds `nyu-mll/glue` in the Hub's layout; the Hub when "".
        subset: the first so many examples of each split alone, for a quick look.

    Returns:
        Plain JSON: tasks (see `scored`), average (of the tasks' scores), with a base also base_average and a verdict of
        all metrics, and the protocol.

    Raises:
        UserError: for a task, data set or head that is not there, before weights are loaded.
    """
    chosen = chosen_tasks(tasks, data, subset)
    files, other = find(model, revision), find(base) if base is not None else None
    sides = [files] if other is None else [files, other]
    for side in sides:
        for task in chosen:
            require_head(side.config, task, side.spec)
    place = find_device(device)
    computes_in = resolve_dtype(dtype, files, place)
    asked = []
    for task in chosen:
        for split in task.splits:
            rows = task_rows(task, split, data)
            asked.append(Asked(task, split, rows[:subset], len(rows)))
    said = list(
        zip(*(answers(side, asked, batch_size, computes_in, place, progress) for side in sides), strict=True)
    )
    scores = {}
    for task in chosen:
        own = [index for index, one in enumerate(asked) if one.task == task]
        scores[task.name] = scored([asked[index] for index in own], [said[index] for index in own])
    figures: dict[str, Any] = {"model": files.base, "base": other.base if other is not None else None}
    figures |= {"tasks": scores, "average": fmean(record["score"] for record in scores.values())}
    if other is not None:
        figures["base_average"] = fmean(record["base_score"] for record in scores.values())
        figures["verdict"] = overall(scores)
    some = "" if subset is None else f", the first {subset} examples of each split alone"
    paired = "" if other is None else ", of differences on the same resamples of both"
    return {
        **figures,
        "subset": subset,
        "protocol": f"{DATASET} validation{some}; at most {MAX_LENGTH} tokens; 95 % intervals by the percentile "
        f"bootstrap over examples, {RESAMPLES} resamples{paired}",
        "dtype": str(computes_in).removeprefix("torch."),
        "device": str(place),
    }
