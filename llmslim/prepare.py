"""Everything that can be refused, checked and planned before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmslim.anatomy import Anatomy
from llmslim.checkpoint.formats import Format, choose
from llmslim.checkpoint.reader import CheckpointReader, edited_skeleton, plain_config, read_edits
from llmslim.edit import Edit
from llmslim.errors import UserError
from llmslim.kvcache.store import check_lasts, read_setting
from llmslim.loaders.heads import replaced_head, require_positions, require_vocabulary
from llmslim.loaders.models import ModelFiles, compute_dtype, find, find_device, skeleton
from llmslim.loaders.texts import TextSample, sample
from llmslim.measure import check_evaluation
from llmslim.outlook import Foresight
from llmslim.passes import PassOptions
from llmslim.plan import Plan, make_plan
from llmslim.recipe import Calibration, Recipe
from llmslim.step import BlockStep, Step
from llmslim.teacher import check_others
from llmslim.together import check_processes
from llmslim.work import require_one_process


@dataclass
class Prepared:
    """A run that has passed every check, before a weight is read.

    Attributes:
        others: models that steps take from, beside the one that is changed.
        fresh_head: whether the config of the files names a head that their weights have not.
    """

    files: ModelFiles
    recipe: Recipe
    options: PassOptions
    format: Format
    text: TextSample | None
    plan: Plan
    others: list[ModelFiles]
    fresh_head: bool = False


def prepare(
    model: str,
    recipe: Recipe,
    *,
    revision: str | None = None,
    device: str | None = None,
    plan_only: bool = False,
) -> Prepared:
    """Check a run and plan it; reads configuration, tokenizer, texts and file headers, but no weights.

    Those of Hub models are fetched when all that needs only their configuration has been checked; for a plan never.

    Raises:
        UserError: for a model, text, option or format that cannot work.
    """
    require_one_process()
    place = find_device(device)
    files = named = find(model, revision)
    headed = next((config for step in recipe.steps if (config := step.starts_from(files))), None)
    heads = "" if headed is None else replaced_head(files.config, headed)
    if headed is not None:
        files = replace(files, config=headed)
    stored = files.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    recipe = recipe.model_copy(
        update={"steps": tuple(_settled(step, stored, recipe) for step in recipe.steps)}
    )
    before = read_edits(files)[1]  # a format must hold what was done to the model earlier, too
    whole = edited_skeleton(files, before)
    origin = skeleton(plain_config(files)) if before else whole

    def form_of(edits: list[Edit]) -> Format:
        return choose(recipe.format, [*before, *edits], origin, stored)

    steps, fronts, outlook, chosen = _resolved(recipe.steps, Foresight(whole, (), form_of, stored))
    check_processes(steps, place)
    check_lasts(read_setting(files.folder), steps, [*fronts, outlook.anatomy])
    chosen += (heads,) if heads else ()
    recipe = recipe.model_copy(update={"steps": steps})
    form = form_of(list(outlook.edits))
    text = None
    if recipe.reads_text:
        choice = recipe.calibration
        require_positions("seq_len", choice.seq_len, whole, files.spec)
        text = sample(choice.text, files.tokenizer(), choice.num_samples, choice.seq_len, recipe.seed)
        require_vocabulary(text.tokens, whole, files.spec)
    elif recipe.calibration != Calibration():
        chosen += ("calibration: no step looks at a text, so it changes nothing",)
    options = PassOptions(
        text.tokens if text else None,
        recipe.seed,
        place,
        compute_dtype(place, stored=files.dtype),
        stored,
        files,
    )
    others = check_others(recipe.steps, files, text, fronts)
    chosen += tuple(dict.fromkeys(f"{step.kind} {step.takes} {other.spec}" for step, other, *_ in others))
    check_evaluation(recipe, files, whole)
    streams, fresh = True, headed is not None
    if not (plan_only and files.hub):
        recipe.steps[0].check_source(files)
        reader = CheckpointReader(named, fresh_head=fresh)
        streams = reader.streams and not fresh
        if reader.made_up and not fresh:
            chosen += (f"at random, as the files lack it: {', '.join(reader.made_up)}",)
        if unread := reader.unread_blocks:
            chosen += (f"left out, beyond the blocks that config.json counts: {', '.join(unread)}",)
    plan = make_plan(files, fronts, recipe, options, form, outlook, streams, chosen, fresh, others)
    return Prepared(files, recipe, options, form, text, plan, [other.files for other in others], fresh)


def _resolved(
    steps: Sequence[Step], outlook: Foresight
) -> tuple[tuple[Step, ...], list[Anatomy], Foresight, tuple[str, ...]]:
    """The steps that run, what each starts from, what they leave, and what was chosen.

    Each sees what those before it leave of the model.
    """
    settled: list[Step] = []
    fronts: list[Anatomy] = []
    chosen: list[str] = []
    for asked in steps:
        running, told = asked.resolve(outlook)
        chosen += [told] if told else []
        for step in running:
            step.check(outlook.anatomy)
            fronts.append(outlook.anatomy)
            if settled and isinstance(settled[-1], BlockStep) and settled[-1].writes_beside:
                raise UserError(
                    f"{settled[-1].kind} keeps its adapter beside the model, which {step.kind} would lose: make it the "
                    "last step, or leave save_adapter out."
                )
            outlook = outlook.after(step.planned_edits(outlook.anatomy))
            settled.append(step)
    return tuple(settled), fronts, outlook, tuple(chosen)


def _settled(step: Step, stored: torch.dtype, recipe: Recipe) -> Step:
    """The step with its "auto" choices made; scales take a 16-bit type that the format can hold."""
    if getattr(step, "scale_dtype", None) != "auto":
        return step
    half = recipe.format == "gptq" or stored == torch.float16
    return step.model_copy(update={"scale_dtype": "float16" if half else "bfloat16"})


def read_from(prepared: Prepared) -> list[Path]:
    """Folders and files on this machine that the run takes something from."""
    recipe = prepared.recipe
    named = [prepared.files.spec]
    if prepared.text is not None:
        named.append(recipe.calibration.text)
    if recipe.evaluation is not None:
        named += [recipe.evaluation.text, recipe.evaluation.tasks_data, recipe.glue_data]
    paths = [Path(name.partition(":")[0]).expanduser() for name in named if name]
    paths += [path for step in recipe.steps for path in step.reads()]
    return [one.folder for one in (prepared.files, *prepared.others)] + [
        path for path in paths if path.exists()
    ]
