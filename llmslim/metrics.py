"""The official metrics of the GLUE tasks, for evaluation and for validation while a classifier trains."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from llmslim.errors import UserError
from llmslim.loaders.glue import Task


def require_metrics() -> None:
    """Refuse to measure without the packages that do it."""
    if importlib.util.find_spec("sklearn") is None or importlib.util.find_spec("scipy") is None:
        raise UserError("GLUE's metrics need scikit-learn and scipy: pip install 'llmslim[glue]'.")


def _matthews(predicted: Any, labels: Any) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def _f1(predicted: Any, labels: Any) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, zero_division=0))


def _accuracy(predicted: Any, labels: Any) -> float:
    return float((predicted == labels).mean())


def _pearson(predicted: Any, labels: Any) -> float:
    from scipy.stats import pearsonr

    return float(pearsonr(predicted, labels).statistic)


def _spearman(predicted: Any, labels: Any) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(predicted, labels).statistic)


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "matthews": _matthews,
    "accuracy": _accuracy,
    "f1": _f1,
    "pearson": _pearson,
    "spearman": _spearman,
}
"""metric(predicted [examples], labels [examples]); f1 is of label 1."""


def score(metric: str, predicted: Any, labels: Any) -> float:
    """One metric; 0 where it is not defined, as the correlation with a constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = METRICS[metric](np.asarray(predicted), np.asarray(labels))
    return value if math.isfinite(value) else 0.0


def scores(task: Task, predicted: Any, labels: Any) -> dict[str, float]:
    """Each metric of the task, and `score`, their mean: GLUE's figure of a task."""
    found = {metric: score(metric, predicted, labels) for metric in task.metrics}
    return {**found, "score": sum(found.values()) / len(found)}


def predicted(task: Task, logits: Tensor) -> Tensor:
    """The most probable label, or the score of a task without classes; [examples] of logits [examples, labels]."""
    return logits.argmax(-1) if task.labels else logits[:, 0].float()
