"""compress(): the one road from a model to a checkpoint that loads, with a report of what it cost."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import llmslim
from llmslim.checkpoint.formats import Format, choose
from llmslim.checkpoint.head import write_headed
from llmslim.checkpoint.verify import verify_in_fresh_process
from llmslim.checkpoint.writer import CheckpointWriter
from llmslim.errors import UserError, VerificationError
from llmslim.evaluation.benchmark import peak_memory_mb
from llmslim.hub import file_record
from llmslim.identity import environment, fingerprint
from llmslim.loaders.models import ModelFiles, find
from llmslim.loaders.texts import TextSample
from llmslim.measure import measure
from llmslim.memory import bound_kernels, return_freed_memory
from llmslim.passes import BlockPass, PassOptions, recorded
from llmslim.prepare import Prepared, prepare, read_from
from llmslim.recipe import Recipe
from llmslim.report import write_report
from llmslim.report.schema import SCHEMA_VERSION, read_report
from llmslim.step import BlockStep, Step, StepRecord
from llmslim.together import run_survey
from llmslim.work import Progress, WorkFolder, check_apart, check_output, silent


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
    bound_kernels()
    prepared = prepare(model, recipe, revision=revision, device=device)
    files, recipe, options = prepared.files, prepared.recipe, prepared.options
    check_apart(Path(output), read_from(prepared))
    work = WorkFolder(Path(output), fingerprint(prepared), overwrite)
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
        "base": {"model": files.base, "spec": files.spec, "path": files.path, "revision": files.revision},
        "recipe": prepared.recipe.to_json(),
        "format": prepared.format.name,
        "calibration": _text_record(prepared.text),
        "plan": prepared.plan.to_json(),
        "run": {
            "cpu_seconds": {key: state["seconds"] for key, state in work.state["passes"].items()},
            "wall_seconds": time.time() - started,
            "peak_memory_mb": max([peak_memory_mb(), *(note.get("held_mb", 0.0) for note in record.notes)]),
            "resumed": work.resumed,
        },
        "linears": record.linears,
        "notes": record.notes,
        "environment": environment(options),
    }


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
        started = _cpu_seconds()
        survey, notes = run_survey(step, source, options, work.scratch(f"pass-{number}"), progress)
        surveyed = _cpu_seconds() - started
        one = BlockPass(step, source, folder, form, options, work, number, survey, notes)
        one.state["seconds"] += surveyed
        return one.run(progress)
    raise UserError(f"The step {step.kind!r} does not work on blocks, and nothing else can run it yet.")


def _cpu_seconds() -> float:
    """Of this process, and of those that it started and that have ended."""
    return sum(os.times()[:4])


def _text_record(text: TextSample | None) -> dict[str, Any] | None:
    if text is None:
        return None
    return {"protocol": text.protocol, "data_hash": text.data_hash, "samples": len(text.tokens)}
