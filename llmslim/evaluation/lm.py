"""Scores of a language model on tasks of lm-eval, beside those of a base on the same questions."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llmslim.checkpoint.reader import CheckpointReader
from llmslim.errors import UserError
from llmslim.evaluation.kept import Kept, kept_in
from llmslim.evaluation.paired import (
    FEW,
    RESAMPLES,
    TOO_FEW,
    difference,
    of_equal_gaps,
    significant,
    spread,
    telling,
    verdict,
)
from llmslim.evaluation.perplexity import require_causal
from llmslim.evaluation.run import KV_CHUNK, check_adapter, kv_figures, prepared
from llmslim.evaluation.tasks import leaves, load_tasks
from llmslim.kvcache.settings import KVSettings
from llmslim.loaders.models import ModelFiles, find, find_device, resolve_dtype

Progress = Callable[[str, int, int], None]


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    base: str | None = None,
    data: str = "",
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    batch_size: int | None = None,
    adapter: str | None = None,
    kv_cache: KVSettings | None = None,
    kv_budget: float | None = None,
    keep_answers: Path | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Score a causal language model on tasks of lm-eval, and a base on the same questions.

    Args:
        model: a Hub id, a folder, a .gguf file, or "demo"; packed weights stay packed.
        tasks: see `llmslim.evaluation.tasks.load_tasks`.
        base: compare with this one, question by question.
        data: folder that holds the data sets in the Hub's layout; the Hub when "".
        limit: the first so many questions of each task; all when None.
        num_fewshot: examples before each question; what the task says, mostly none, when None.
        chat_template: ask as the user of a chat.
        batch_size: rows at a time; what fits into memory when None.
        adapter: folder of a peft adapter that the model (not the base) has beside its weights.
        kv_cache: the model, not the base, reads `KV_CHUNK` tokens at a time, and those before from such a quantized KV
            cache; what it generates reads it too.
        kv_budget: mean bits that the layers of `kv_cache` get by their sensitivity on a built-in text.
        keep_answers: folder in which the answers of each model stay: what is there, from a run that was killed or from
            another comparison with the same base, is not asked again.
        progress: called with the model, rows done and rows in all.

    Returns:
        Plain JSON: `tasks` by name, each with questions, total, main (its chief metric) and metrics (see
        `scored`); `average` of the main metrics and a `verdict` of all tasks with a base; and the protocol.

    Raises:
        UserError: for what cannot be asked, before weights are loaded.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit} is too few: it takes at least 1 question.")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size {batch_size} is too few: it takes at least 1.")
    sides = [find(model, revision), *([find(base)] if base is not None else [])]
    files, place = sides[0], find_device(device)
    if adapter is not None:
        check_adapter(adapter, files, streamed=False)
    for side in sides:
        _require_answers(side, chat_template)
    chosen = resolve_dtype(dtype, files, place)
    loaded = load_tasks(tasks, data, num_fewshot)
    asked = {"limit": limit, "apply_chat_template": chat_template, "fewshot_as_multiturn": chat_template}
    runs, batches = [], []
    for side in sides:
        told = lambda done, total, side=side: progress(side.spec, done, total)  # noqa: E731
        beside = (adapter, kv_cache, kv_budget) if side is files else (None, None, None)
        kept = None
        if keep_answers is not None:
            kept = kept_in(
                keep_answers, side.folder, beside[0], chosen, place.type, chat_template, *beside[1:]
            )
        record, rows, used = answers(side, loaded, asked, batch_size, chosen, place, told, kept, *beside)
        runs.append(record)
        batches += rows
        kv_cache = used if side is files else kv_cache
    scores = {task.task_name: scored(task, *runs) for task in leaves(loaded)}
    scores |= {group: grouped(group, *runs) for group in runs[0].get("groups", {})}
    figures: dict[str, Any] = {"model": model, "base": base, "tasks": scores}
    if adapter is not None:
        figures["adapter"] = adapter
    if kv_cache is not None:
        figures["kv_cache"] = kv_figures(kv_cache)
    if base is not None:
        figures |= {"average": average(scores), "verdict": overall(scores)}
    return {
        **figures,
        "protocol": _protocol(limit, num_fewshot, chat_template),
        "limit": limit,
        "data": data,
        "batch_sizes": sorted(set(batches)),
        "dtype": str(chosen).removeprefix("torch."),
        "device": str(place),
    }


def _require_answers(files: ModelFiles, chat_template: bool) -> None:
    """Refuse a model that no question can be put to in that way."""
    require_causal(CheckpointReader(files).model_skeleton())
    if chat_template and not getattr(files.tokenizer(), "chat_template", None):
        raise UserError(f"The tokenizer of {files.spec} has no chat template: leave out --chat-template.")


def _protocol(limit: int | None, num_fewshot: int | None, chat_template: bool) -> str:
    """How the questions are put, in words."""
    questions = "all" if limit is None else f"the first {limit}"
    shots = "as the task says" if num_fewshot is None else num_fewshot
    return (
        f"lm-eval {version('lm_eval')}, {questions} questions, few-shot examples: {shots}, "
        f"{'with' if chat_template else 'no'} chat template"
    )


def answers(
    files: ModelFiles,
    loaded: list[Any],
    asked: dict[str, Any],
    batch_size: int | None,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
    kept: Kept | None = None,
    adapter: str | None = None,
    kv_cache: KVSettings | None = None,
    kv_budget: float | None = None,
) -> tuple[dict[str, Any], list[int], KVSettings | None]:
    """lm-eval's record for one model, which is freed again, the sizes of its batches, and its KV cache."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    from llmslim.evaluation.harness import Harness

    model, kv_cache = prepared(files, dtype, device, adapter, kv_cache, kv_budget, progress)
    chunk = KV_CHUNK if kv_cache is not None else None
    harness = Harness(model, files.tokenizer(), batch_size, progress, chunk, kept)
    for task in leaves(loaded):
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # both models see the same examples
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its own bars
        chosen = TaskManager(include_defaults=False).load(loaded)
        record = evaluate(harness, chosen, bootstrap_iters=RESAMPLES, **asked)
    sizes = list(harness.batch_sizes.values()) or [batch_size or 1]
    del model, harness
    gc.collect()  # the next model takes its place
    return record, sizes, kv_cache


def scored(task: Any, run: dict[str, Any], base: dict[str, Any] | None = None) -> dict[str, Any]:
    """One task: questions, total, shots, version, main, data_hash, metrics.

    Each metric has value, stderr (None where lm-eval gives none) and higher_is_better; with a base also base,
    base_stderr, difference and difference_stderr (paired by question), share (whether it is one of 1) and a verdict.
    """
    name = task.task_name
    better, makes = task.higher_is_better(), task.aggregation()
    count = run["n-samples"][name]
    metrics: dict[str, Any] = {}
    for key in run["results"][name]:
        metric, _, kept = key.partition(",")
        if not kept or metric.endswith("_stderr") or metric not in makes:
            continue
        label = metric if kept == "none" else key
        metrics[label] = {**_value(run, name, key), "higher_is_better": bool(better.get(metric, True))}
        if base is not None:
            ours, theirs = _paired(run["samples"][name], base["samples"][name], metric, kept)
            metrics[label] |= _compared(_value(base, name, key), ours, theirs, makes[metric])
    return {
        "questions": count["effective"],
        "total": count["original"],
        "num_fewshot": run["n-shot"].get(name, 0),
        "version": run["versions"].get(name),
        "data_hash": _hash(run["samples"][name]),
        "main": main_metric(metrics),
        "metrics": metrics,
    }


def grouped(name: str, run: dict[str, Any], base: dict[str, Any] | None = None) -> dict[str, Any]:
    """A group of tasks: its own figures as lm-eval makes them, without a paired error."""
    better = run["higher_is_better"].get(name, {})  # as its tasks say
    metrics = {}
    for key in run["groups"][name]:
        metric, _, kept = key.partition(",")
        if kept and not metric.endswith("_stderr"):
            label = metric if kept == "none" else key
            metrics[label] = {**_value(run, name, key), "higher_is_better": bool(better.get(metric, True))}
            if base is not None:
                other = _value(base, name, key)
                gap = metrics[label]["value"] - other["value"]
                metrics[label] |= {"base": other["value"], "base_stderr": other["stderr"], "difference": gap}
    return {"group": run["group_subtasks"][name], "main": main_metric(metrics), "metrics": metrics}


def main_metric(metrics: dict[str, Any]) -> str:
    """The chief one: the first that is better when higher, such as accuracy before perplexity."""
    return next(
        (name for name, found in metrics.items() if found["higher_is_better"]), next(iter(metrics), "")
    )


def _value(run: dict[str, Any], name: str, key: str) -> dict[str, Any]:
    metric, _, kept = key.partition(",")
    stderr = run["results"][name].get(f"{metric}_stderr,{kept}")
    return {
        "value": float(run["results"][name][key]),
        "stderr": float(stderr) if isinstance(stderr, int | float) else None,
    }


def _paired(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], metric: str, kept: str
) -> tuple[list[Any], list[Any]]:
    """The scores of both on each question, in one order."""
    found = [
        {row["doc_id"]: row[metric] for row in rows if row["filter"] == kept and metric in row}
        for rows in (ours, theirs)
    ]
    both = sorted(found[0].keys() & found[1].keys())
    return [found[0][one] for one in both], [found[1][one] for one in both]


def _compared(base: dict[str, Any], ours: list[Any], theirs: list[Any], aggregate: Any) -> dict[str, Any]:
    from lm_eval.api.metrics import mean

    gap, stderr = difference(ours, theirs, None if aggregate is mean else aggregate)
    share = all(isinstance(score, int | float) and 0 <= score <= 1 for score in [*ours, *theirs])
    if share and stderr is not None and len({x - y for x, y in zip(ours, theirs, strict=True)}) == 1:
        stderr = of_equal_gaps(len(ours))
    return {
        "base": base["value"],
        "base_stderr": base["stderr"],
        "difference": gap,
        "difference_stderr": stderr,
        "share": share,
        "verdict": verdict(gap, stderr, len(ours), share),
    }


def _hash(samples: list[dict[str, Any]]) -> str:
    return hashlib.sha256("".join(row["doc_hash"] for row in samples).encode()).hexdigest()[:16]


def _mains(scores: dict[str, Any]) -> dict[str, Any]:
    """The main metric of each task that has a paired error."""
    found = {name: record["metrics"].get(record["main"], {}) for name, record in scores.items()}
    return {name: main for name, main in found.items() if main.get("difference_stderr") is not None}


def average(scores: dict[str, Any]) -> dict[str, float] | None:
    """Mean of the tasks' main metrics that are shares, such as accuracies; None when there are not two."""
    mains = [main for main in _mains(scores).values() if main["share"]]
    if len(mains) < 2:
        return None
    return {
        "value": sum(main["value"] for main in mains) / len(mains),
        "base": sum(main["base"] for main in mains) / len(mains),
        "difference": sum(main["difference"] for main in mains) / len(mains),
        "difference_stderr": sum(main["difference_stderr"] ** 2 for main in mains) ** 0.5 / len(mains),
    }


def overall(scores: dict[str, Any]) -> str:
    """One sentence on all tasks: where the model differs from its base beyond chance."""
    mains = _mains(scores)
    if not mains:
        return TOO_FEW
    moved: list[str] = []
    alike: dict[str, list[str]] = {"no measurable loss": [], TOO_FEW: []}
    for name, main in mains.items():
        told = (main["difference"], main["difference_stderr"], main["share"])
        count = scores[name].get("questions", FEW)
        label = name if count >= FEW else f"{name} ({count} questions)"
        if significant(*told[:2]):
            moved.append(f"{label} {spread(*told)}")
        else:
            alike["no measurable loss" if telling(*told) else TOO_FEW].append(label)
    return "; ".join([*moved, *(f"{said} on {', '.join(names)}" for said, names in alike.items() if names)])
