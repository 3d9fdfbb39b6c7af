"""Measure base and result with the same code: quality by streaming, speed and memory in fresh processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from llmslim.checkpoint.reader import model_on_meta
from llmslim.errors import UserError
from llmslim.evaluation.damage import Damage, other_domains
from llmslim.evaluation.divergence import Comparison
from llmslim.evaluation.glue import chosen_tasks, evaluate_glue
from llmslim.evaluation.lm import evaluate_tasks
from llmslim.evaluation.perplexity import require_causal
from llmslim.evaluation.stream import streamed_windows
from llmslim.evaluation.tasks import load_tasks
from llmslim.loaders.heads import require_head, require_positions, require_vocabulary
from llmslim.loaders.models import ModelFiles, compute_dtype
from llmslim.loaders.texts import TextSample, sample
from llmslim.memory import available_memory
from llmslim.process import ProcessFailed, run_module
from llmslim.recipe import Evaluation, Recipe
from llmslim.size import size_of
from llmslim.work import Progress, WorkFolder


def check_evaluation(recipe: Recipe, files: ModelFiles, model: PreTrainedModel) -> None:
    """Refuse now, and not when the run is over, what the model cannot be measured on.

    Args:
        model: of the files, on meta.
    """
    evaluation = recipe.evaluation
    if evaluation is None:
        return
    _check_glue(recipe, evaluation, files)
    try:
        require_causal(model)
    except UserError:
        return  # the report will say so
    require_positions("eval_seq_len", evaluation.seq_len, model, files.spec)
    try:
        tokenizer = files.tokenizer()
    except UserError as error:
        raise UserError(
            f"{error} Without one nothing can be measured: add it, or give --no-evaluate."
        ) from error
    require_vocabulary(judged_by(evaluation, tokenizer).tokens, model, files.spec)
    if evaluation.tasks:
        load_tasks(evaluation.tasks, evaluation.tasks_data)


def _check_glue(recipe: Recipe, evaluation: Evaluation, files: ModelFiles) -> None:
    """The same of GLUE's tasks; of one that is measured unasked the report will say so."""
    tasks = recipe.glue_tasks
    beside = [name for name in ("glue_subset", "glue_data") if getattr(evaluation, name)]
    if beside and not tasks:
        raise UserError(
            f"{beside[0]} is about the scores of a classifier on GLUE: name its tasks in evaluation.glue (--eval-glue "
            "sst2), or leave it out."
        )
    if evaluation.glue or evaluation.glue_data:
        for task in chosen_tasks(tasks, recipe.glue_data, flag="--eval-glue-data"):
            require_head(files.config, task, files.spec)


def measure(
    base: ModelFiles,
    made: Sequence[ModelFiles],
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    work: WorkFolder,
    fresh_head: bool = False,
) -> dict[str, Any]:
    """Sizes always; perplexity, divergence, scores, speed and memory as `recipe.evaluation` asks.

    Resumes per measurement.

    Args:
        made: what each step of the recipe left, in order; the last is the result.
        fresh_head: the run gave the base its classification head, which knows nothing: it gets no scores by it.

    With `evaluation.steps` what each step left is measured as the result is: one streamed forward of it and one of
    the base over the windows for every step. The base is run anew each time, so that one checkpoint after another
    is finished and kept, and memory holds no more than for the result alone.
    """
    evaluation, result = recipe.evaluation, made[-1]
    sizes = {"base": size_of(base), "result": size_of(result)}
    parts = ("quality", "speed", "steps", "tasks", "glue", "details")
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
    if recipe.glue_tasks:
        scored = None if fresh_head else base
        measured["glue"] = once("glue", lambda: _glue(scored, result, recipe, device, sizes, progress))
    if evaluation.tasks:
        measured["tasks"] = once("tasks", lambda: _tasks(base, result, evaluation, device, sizes, progress))
    if evaluation.speed:
        measured["speed"] = once("speed", lambda: _speed(base, result, sizes, device, progress))
    return measured


def _glue(
    base: ModelFiles | None,
    result: ModelFiles,
    recipe: Recipe,
    device: torch.device,
    sizes: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Scores of both on GLUE's tasks, in float32: one whole model in memory after the other."""
    assert recipe.evaluation is not None
    try:
        _require_memory(sizes)
        found = evaluate_glue(
            str(result.folder),
            recipe.glue_tasks,
            base=str(base.folder) if base is not None else None,
            data=recipe.glue_data,
            subset=recipe.evaluation.glue_subset,
            dtype="float32",
            device=device,
            progress=lambda done, total: progress("evaluate", done, total),
        )
    except UserError as error:
        return {"skipped": str(error)}
    return found | {
        "chosen_by_it": sorted({step.glue for step in recipe.fine_tunings if step.choose_on_validation})
    }


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
        require_causal(model_on_meta(base))
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
        require_causal(model_on_meta(base))
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
    try:
        return json.loads(run_module("llmslim.evaluation.benchmark", str(files.folder), *how))
    except ProcessFailed as error:
        return {"skipped": str(error)}
