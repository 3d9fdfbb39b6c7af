"""compress(): the one road from a model to a checkpoint that loads, with a report of what it cost."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import llmslim
from llmslim.anatomy import Anatomy
from llmslim.checkpoint.formats import Format, choose
from llmslim.checkpoint.head import write_headed
from llmslim.checkpoint.reader import CheckpointReader, edited_skeleton, plain_config, read_edits
from llmslim.checkpoint.verify import verify_in_fresh_process
from llmslim.checkpoint.writer import CheckpointWriter
from llmslim.edit import Edit
from llmslim.errors import UserError, VerificationError
from llmslim.evaluation.benchmark import peak_memory_mb
from llmslim.hub import file_record
from llmslim.kvcache.store import check_lasts, read_setting
from llmslim.loaders.heads import replaced_head, require_positions
from llmslim.loaders.models import ModelFiles, compute_dtype, find, find_device, skeleton
from llmslim.loaders.texts import TextSample, sample
from llmslim.measure import check_evaluation, glue_data, measure
from llmslim.memory import return_freed_memory
from llmslim.outlook import Foresight
from llmslim.passes import BlockPass, PassOptions, recorded
from llmslim.plan import Plan, make_plan
from llmslim.recipe import Calibration, Recipe
from llmslim.report import write_report
from llmslim.report.schema import SCHEMA_VERSION, read_report
from llmslim.step import BlockStep, Step, StepRecord
from llmslim.survey import run_survey
from llmslim.teacher import check_others
from llmslim.work import Progress, WorkFolder, check_apart, check_output, require_one_process, silent

PLACED_BY = ("torch", "transformers", "accelerate", "safetensors", "compressed-tensors", "datasets")
"""Packages whose versions a report tells."""
COMPUTED_BY = ("tokenizers", "peft", "bitsandbytes")
"""More of which another version may give other bytes."""


@dataclass
class Result:
    """A finished run: the folder of the checkpoint, and its report (also in `report.json`)."""

    folder: Path
    report: dict[str, Any]


def compress(
    model: str,
    steps: Sequence[Step] | Recipe,
    output: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    device: str | None = None,
    progress: Progress = silent,
    on_plan: Any = lambda plan: None,
    **fields: Any,
) -> Result:
    """Run steps on a model and leave a verified, measured checkpoint in `output`.

    Everything that can be refused is refused before a weight is read; output is made in `<output>.partial` and
    renamed when whole; a killed run goes on where it was when called again with the same arguments.

    Args:
        model: a Hub id, a folder, a .gguf file, or "demo".
        steps: steps in order, such as `[GPTQ(bits=4)]`, or a whole `Recipe`.
        revision: of a Hub model.
        overwrite: replace an existing output, and discard an unfinished run with other options.
        device: "cpu", "cuda", ...; the GPU if there is one when None.
        progress: called with (what, done, total), and a note where training has more to tell.
        on_plan: called with the `Plan` before weights are read.
        fields: further fields of `Recipe`: calibration, evaluation, format, dtype, seed.

    Raises:
        UserError: in one sentence, for anything that the caller can mend.
        VerificationError: the checkpoint that was saved does not give what was made.
    """
    recipe = steps if isinstance(steps, Recipe) else Recipe.checked(steps=tuple(steps), **fields)
    started = time.time()
    check_output(Path(output), overwrite)
    return_freed_memory()
    prepared = prepare(model, recipe, revision=revision, device=device)
    files, recipe, options = prepared.files, prepared.recipe, prepared.options
    check_apart(Path(output), _read_from(prepared))
    work = WorkFolder(Path(output), _fingerprint(prepared), overwrite)
    on_plan(prepared.plan)
    if work.finished:  # it was killed as it was put in its place, with all that was asked for then
        folder = work.publish()
        return Result(folder, read_report(folder))
    # a run that goes on computes in the type that it began in, whatever is found to be quick today
    computes_in = work.state.setdefault("computes_in", prepared.plan.compute_dtype)
    options = replace(options, dtype=getattr(torch, computes_in))
    prepared = replace(prepared, options=options)
    prepared.plan.require_disk(Path(output), work.held)
    work.save()
    return_freed_memory()  # reading and tokenizing the text left holes
    if prepared.fresh_head:
        prepared = _with_head(prepared, work)

    record, made = run_steps(prepared, work, progress)
    progress("verify", 0, 1)
    verification = verify_in_fresh_process(work.path, work.scratch(f"pass-{len(recipe.steps) - 1}"))
    progress("verify", 1, 1)
    if not verification["ok"]:
        failed = next(check for check in verification["checks"] if not check["ok"])
        raise VerificationError(
            f"The checkpoint saved in {work.path} is not what was made: {failed['detail']}. It was not put in the "
            "place of the output; please report it, with the command."
        )
    fresh, place = prepared.fresh_head, options.device
    measured = measure(prepared.files, made, recipe, place, options.dtype, progress, work, fresh)
    verified = {"verification": verification, "files": file_record(work.path)}
    report = {**_report(prepared, work, record, started), **verified, **measured}
    write_report(work.path, report, files)
    return Result(work.publish(), report)


def _with_head(prepared: Prepared, work: WorkFolder) -> Prepared:
    """The run, from the model with a fresh head in the work folder."""
    folder = work.scratch("start")
    if not work.state.get("started"):
        write_headed(prepared.files, prepared.recipe.seed, folder)
        work.state["started"] = True
        work.save()
    config = find(str(folder)).config
    files = replace(prepared.files, folder=folder, config=config, hub=False, _weights=None)
    return replace(prepared, files=files, options=replace(prepared.options, base=files))


def run_steps(
    prepared: Prepared, work: WorkFolder, progress: Progress
) -> tuple[StepRecord, list[ModelFiles]]:
    """Run all steps in order, each from the checkpoint that the one before left; the last one's is the output."""
    files, recipe, options = prepared.files, prepared.recipe, prepared.options
    record, made = StepRecord(), [files]
    for number, step in enumerate(recipe.steps):
        last = number == len(recipe.steps) - 1
        folder = work.path if last else work.scratch(f"step-{number}")
        if not work.state.get(f"saved-{number}"):
            form = prepared.format if last else choose("llmslim", [], None)
            done = run_step(step, made[-1], folder, form, options, work, number, progress)
            CheckpointWriter(folder, form, options.stored).finish(made[-1], done.edits)
            if isinstance(step, BlockStep):
                step.write_beside(folder, done)
            work.state[f"saved-{number}"] = True
            work.save()
        done = recorded(work.state["passes"][str(number)], {})
        record.edits += done.edits
        record.linears += (
            [{**row, "step": number} for row in done.linears] if number or not last else done.linears
        )
        record.notes += done.notes
        _clear(work, number, last, number > 0 and not recipe.measures_steps)
        made.append(replace(find(str(folder)), base=files.base))
    return record, made[1:]


def _clear(work: WorkFolder, number: int, last: bool, source: bool) -> None:
    """Remove what nothing needs once a step's checkpoint is saved; a run that was killed meanwhile does so again.

    Verification looks at the last pass, and at the tokenizer of its source.

    Args:
        source: whether the weights of what the step started from go, too.
    """
    if not last:
        shutil.rmtree(work.scratch(f"pass-{number}"))
    if source:
        for path in work.scratch(f"step-{number - 1}").glob("*.safetensors"):
            path.unlink()


def _report(prepared: Prepared, work: WorkFolder, record: StepRecord, started: float) -> dict[str, Any]:
    """What report.json says of the run itself; verification and measurements come on top."""
    files, options = prepared.files, prepared.options
    return {
        "schema_version": SCHEMA_VERSION,
        "llmslim": llmslim.__version__,
        "base": {"model": files.base, "spec": files.spec, "revision": files.revision},
        "recipe": prepared.recipe.to_json(),
        "format": prepared.format.name,
        "calibration": _text_record(prepared.text),
        "plan": prepared.plan.to_json(),
        "run": {
            "cpu_seconds": {key: state["seconds"] for key, state in work.state["passes"].items()},
            "wall_seconds": time.time() - started,
            "peak_memory_mb": peak_memory_mb(),
            "resumed": work.resumed,
        },
        "linears": record.linears,
        "notes": record.notes,
        "environment": environment(options),
    }


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
    check_lasts(read_setting(files.folder), steps, [*fronts, outlook.anatomy])
    chosen += (heads,) if heads else ()
    recipe = recipe.model_copy(update={"steps": steps})
    form = form_of(list(outlook.edits))
    text = None
    if recipe.reads_text:
        choice = recipe.calibration
        require_positions("seq_len", choice.seq_len, whole, files.spec)
        text = sample(choice.text, files.tokenizer(), choice.num_samples, choice.seq_len, recipe.seed)
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


def run_step(
    step: Step,
    source: ModelFiles,
    folder: Path,
    form: Format,
    options: PassOptions,
    work: WorkFolder,
    number: int,
    progress: Progress,
) -> StepRecord:
    """Run one step from a checkpoint to the parts of the next one."""
    if isinstance(step, BlockStep):
        started = time.process_time()
        survey, notes = run_survey(step, source, options, work.scratch(f"pass-{number}"), progress)
        surveyed = time.process_time() - started
        one = BlockPass(step, source, folder, form, options, work, number, survey, notes)
        one.state["seconds"] += surveyed
        return one.run(progress)
    raise UserError(f"The step {step.kind!r} does not work on blocks, and nothing else can run it yet.")


def _settled(step: Step, stored: torch.dtype, recipe: Recipe) -> Step:
    """The step with its "auto" choices made; scales take a 16-bit type that the format can hold."""
    if getattr(step, "scale_dtype", None) != "auto":
        return step
    half = recipe.format == "gptq" or stored == torch.float16
    return step.model_copy(update={"scale_dtype": "float16" if half else "bfloat16"})


def _read_from(prepared: Prepared) -> list[Path]:
    """Folders and files on this machine that the run takes something from."""
    recipe = prepared.recipe
    named = [prepared.files.spec]
    if prepared.text is not None:
        named.append(recipe.calibration.text)
    if recipe.evaluation is not None:
        named += [recipe.evaluation.text, recipe.evaluation.tasks_data, glue_data(recipe)]
    paths = [Path(name.partition(":")[0]).expanduser() for name in named if name]
    paths += [path for step in recipe.steps for path in step.reads()]
    return [one.folder for one in (prepared.files, *prepared.others)] + [
        path for path in paths if path.exists()
    ]


def _fingerprint(prepared: Prepared) -> dict[str, Any]:
    """What must be the same for a resumed run to give the same bytes."""
    files, recipe = prepared.files, prepared.recipe
    beside = [path for step in recipe.steps for path in step.reads()]
    record = {
        "model": [str(files.folder), _stamps(_weight_paths(files))],
        **recipe.model_copy(update={"evaluation": None}).to_json(),
        "choice to measure every step": recipe.measures_steps,
        "text": prepared.text.data_hash if prepared.text else None,
        "teacher or earlier model": [
            [str(one.folder), _stamps([*_weight_paths(one), *_told(one)])] for one in prepared.others
        ],
        "data": _stamps(beside),
        "versions": {"llmslim": llmslim.__version__, **_versions(*PLACED_BY, *COMPUTED_BY)},
        "device": str(prepared.options.device),
        "threads": torch.get_num_threads(),
    }
    return json.loads(json.dumps(record))


def _weight_paths(files: ModelFiles) -> list[Path]:
    return [
        files.folder / name for name in sorted({entry["file"] for entry in files.weights.entries.values()})
    ]


def _told(files: ModelFiles) -> list[Path]:
    """What says how a model reads, and what its outputs are called."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    return [path for name in names if (path := files.folder / name).exists()]


def _stamps(paths: Sequence[Path]) -> list[list[int]]:
    """Size and time of files, which tell a changed one without reading it."""
    return [[stat.st_size, stat.st_mtime_ns] for stat in (path.stat() for path in paths)]


def _text_record(text: TextSample | None) -> dict[str, Any] | None:
    if text is None:
        return None
    return {"protocol": text.protocol, "data_hash": text.data_hash, "samples": len(text.tokens)}


def environment(options: PassOptions) -> dict[str, Any]:
    """Machine and versions, so that a figure can be placed."""
    import platform

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": str(options.device),
        "compute_dtype": str(options.dtype).removeprefix("torch."),
        "versions": _versions(*PLACED_BY),
    }


def _versions(*names: str) -> dict[str, str]:
    """Of the packages that are installed."""
    import importlib.metadata

    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
