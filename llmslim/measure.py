"""Measure base and result with the same code: quality by streaming, speed and memory in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmslim.checkpoint.reader import CheckpointReader
from llmslim.errors import UserError
from llmslim.evaluation.damage import Damage, other_domains
from llmslim.evaluation.divergence import Comparison
from llmslim.evaluation.lm import evaluate_tasks
from llmslim.evaluation.perplexity import require_causal
from llmslim.evaluation.stream import streamed_windows
from llmslim.loaders.models import ModelFiles, compute_dtype
from llmslim.loaders.texts import TextSample, sample
from llmslim.memory import available_memory
from llmslim.recipe import Evaluation, Recipe
from llmslim.size import size_of
from llmslim.work import Progress, WorkFolder


def measure(
    base: ModelFiles,
    made: Sequence[ModelFiles],
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    work: WorkFolder,
) -> dict[str, Any]:
    """Sizes always; perplexity, divergence, speed and memory as `recipe.evaluation` asks. Resumes per measurement.

    Args:
        made: what each step of the recipe left, in order; the last is the result.

    With `evaluation.steps` what each step left is measured as the result is: one streamed forward of it and one of
    the base over the windows for every step. The base is run anew each time, so that one checkpoint after another
    is finished and kept, and memory holds no more than for the result alone.
    """
    evaluation, result = recipe.evaluation, made[-1]
    sizes = {"base": size_of(base), "result": size_of(result)}
    parts = ("quality", "speed", "steps", "tasks", "details")
    measured: dict[str, Any] = {"size": sizes, **dict.fromkeys(parts)}
    if evaluation is None:
        return measured
    asked = json.loads(evaluation.model_dump_json())
    kept = work.state.setdefault("measured", {})
    if kept.setdefault("asked", asked) != asked:  # other measurements than before the stop
        kept = work.state["measured"] = {"asked": asked}

    def once(key: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, or what it gave before the run was stopped."""
        if key not in kept:
            kept[key] = make()
            work.save()
        return kept[key]

    def quality(key: str, files: ModelFiles) -> dict[str, Any]:
        def found() -> dict[str, Any]:
            figures, kept["details"] = _quality(
                base, files, evaluation, device, dtype, progress, key == "quality"
            )
            return figures

        return once(key, found)

    if evaluation.steps:
        keys = [*(f"step-{number}" for number in range(len(made) - 1)), "quality"]
        measured["steps"] = [
            {"step": step.kind, "size": size_of(files), "quality": quality(key, files)}
            for step, key, files in zip(recipe.steps, keys, made, strict=True)
        ]
    measured["quality"] = quality("quality", result)  # last, so that the details are the result's
    measured["details"] = kept["details"]
    task = next((step for step in reversed(recipe.steps) if step.kind == "finetune"), None)
    if task is not None:
        measured["glue"] = once("glue", lambda: _glue(result, task, device, progress))
    if evaluation.tasks:
        measured["tasks"] = once("tasks", lambda: _tasks(base, result, evaluation, device, sizes, progress))
    if evaluation.speed:
        measured["speed"] = once("speed", lambda: _speed(base, result, sizes, device, progress))
    return measured


def _glue(result: ModelFiles, step: Any, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Scores of the result on the task that the step has trained it for, in float32."""
    from llmslim.evaluation.glue import evaluate_glue

    told = lambda done, total: progress("evaluate", done, total)  # noqa: E731
    try:
        found = evaluate_glue(
            str(result.folder), [step.glue], data=step.data, dtype="float32", device=device, progress=told
        )
        return {**found, "chosen_by_it": step.choose_on_validation}
    except UserError as error:
        return {"skipped": str(error)}


def _quality(
    base: ModelFiles,
    result: ModelFiles,
    evaluation: Evaluation,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    detailed: bool,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Perplexities and divergence; in detail also where they come from, by the same pass over a few windows more."""
    try:
        require_causal(CheckpointReader(base).model_skeleton())
    except UserError as error:
        return {"skipped": str(error)}, None
    tokenizer = base.tokenizer()
    text = judged_by(evaluation, tokenizer)
    others = {}
    if detailed:
        others = other_domains(evaluation.text, tokenizer, evaluation.windows, evaluation.seq_len)
    damage = Damage(text.tokens) if detailed else None
    tokens = torch.cat([text.tokens, *others.values()])
    scores = streamed_windows(
        result, tokens, device, dtype, base, lambda done, total: progress("evaluate", done, total), damage
    )
    record = Comparison.of(scores.result(slice(len(text.tokens))), text).to_dict()
    return record, damage.to_dict(tokenizer, scores, text, others) if damage else None


def judged_by(evaluation: Evaluation, tokenizer: Any) -> TextSample:
    """The windows that perplexity and divergence are measured on.

    Raises:
        UserError: there is no such text, or it is too short.
    """
    return sample(
        evaluation.text,
        tokenizer,
        evaluation.windows,
        evaluation.seq_len,
        join=evaluation.join,
        builtin_part="test",
    )


def _tasks(
    base: ModelFiles,
    result: ModelFiles,
    evaluation: Evaluation,
    device: torch.device,
    sizes: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Scores of both on lm-eval's tasks: one whole model in memory after the other."""
    try:
        require_causal(CheckpointReader(base).model_skeleton())
        _require_memory(sizes)
    except UserError as error:
        return {"skipped": str(error)}
    return evaluate_tasks(
        str(result.folder),
        evaluation.tasks,
        base=str(base.folder),
        data=evaluation.tasks_data,
        limit=evaluation.tasks_limit,
        device=device,
        progress=lambda model, done, total: progress("tasks", done, total),
    )


def _require_memory(sizes: dict[str, Any]) -> None:
    need = 4 * sizes["base"]["parameters"] + 10**9
    if need > available_memory():
        raise UserError(f"the base needs about {need / 1e9:.1f} GB in memory, and there is less")


def _speed(
    base: ModelFiles,
    result: ModelFiles,
    sizes: dict[str, Any],
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    """Speed and memory of base and result, each loaded in a process of its own."""
    try:
        _require_memory(sizes)
    except UserError as error:
        return {"skipped": str(error)}
    figures: dict[str, Any] = {}
    for step, (name, files) in enumerate((("base", base), ("result", result))):
        progress("speed", step, 2)
        figures[name] = _in_fresh_process(files, device)
    progress("speed", 2, 2)
    return figures


def _in_fresh_process(files: ModelFiles, device: torch.device) -> dict[str, Any]:
    # the type that is quick here is chosen by this process, for both
    how = [str(device), str(compute_dtype(device, files.dtype)).removeprefix("torch.")]
    command = [sys.executable, "-m", "llmslim.evaluation.benchmark", str(files.folder), *how]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode != 0:
        return {"skipped": (done.stderr.strip() or "the process died").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])
