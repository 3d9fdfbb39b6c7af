"""A step's survey: in this process, or in several that train one model together, with a GPU or some CPU cores each.

    python -m llmslim.together SCRATCH      one of several; `run_survey` starts them

Each loads the model and takes its own batches, and after each batch gradients are averaged over all (data parallel
training; torch's DistributedDataParallel, by way of Trainer and accelerate), or in shares (`llmslim.training.shares`).
What is written of the model the first process writes.
SCRATCH is the step's folder of the run's work folder, with what to do in together.json and text.safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmslim.errors import UserError, first_line
from llmslim.files import load_tensors, save_tensors, write_atomically
from llmslim.loaders.models import ModelFiles, read_config
from llmslim.memory import resident_bytes, return_freed_memory
from llmslim.passes import PassOptions
from llmslim.process import ProcessFailed, end_with_starter, run_together
from llmslim.ranks import first
from llmslim.step import BlockStep, Step, build_step
from llmslim.survey import NOTES, SURVEY, Look, notes_of
from llmslim.training.step import CHECKPOINTS
from llmslim.work import Progress

JOB, TEXT, MEETING = "together.json", "text.safetensors", "meeting"


# --- the process that starts them ---


def run_survey(
    step: BlockStep, files: ModelFiles, options: PassOptions, scratch: Path, progress: Progress
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The step's survey and its notes, from the scratch folder if an earlier run finished it."""
    if not step.needs_survey:
        return {}, []
    path, count = scratch / SURVEY, step.survey_processes
    if not path.exists():
        (scratch / NOTES).unlink(missing_ok=True)  # of a run that was killed
        look = Look(
            files, options, progress, scratch
        )  # which fetches what is on the Hub, once for all processes
        if count == 1:
            save_tensors(path, step.survey(look))
        else:
            held = _survey_together(step, files, options, scratch, progress)
            told = f"{count} processes trained together, each of which held {max(held):,.0f} MB or less"
            # GPUs are planned one by one
            together = max(held) if options.device.type == "cuda" else resident_bytes() / 1e6 + sum(held)
            look.note(step.kind, told, held_mb=together)
    shutil.rmtree(scratch / CHECKPOINTS, ignore_errors=True)  # also those of a run that was killed here
    return load_tensors(path), notes_of(scratch)


def check_processes(steps: Sequence[Step], device: torch.device) -> None:
    """Refuse more processes than there are GPUs for, or cores.

    Raises:
        UserError: in one sentence.
    """
    for step in steps:
        asked = step.survey_processes if isinstance(step, BlockStep) else 1
        if asked == 1:
            continue
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"processes {asked} work on CUDA GPUs or a CPU, not on {device.type}: give 1.")
        if device.index:
            raise UserError(
                f"processes {asked} take the first GPUs there are, not {device}: give --device cuda, and choose those "
                "that there are by CUDA_VISIBLE_DEVICES."
            )
        there = torch.cuda.device_count() if device.type == "cuda" else os.cpu_count() or 1
        if asked > there:
            what = "GPUs" if device.type == "cuda" else "CPU cores"
            raise UserError(
                f"processes {asked} is more than the {there} {what} of this machine: give {there} at most."
            )


def _survey_together(
    step: BlockStep, files: ModelFiles, options: PassOptions, scratch: Path, progress: Progress
) -> list[float]:
    """Run the step's survey in as many processes as it asks for; the first leaves its result in `scratch`.

    Returns:
        The most memory that each of them held, in MB.

    Raises:
        UserError: a process refused something, or died.
    """
    assert options.base is not None
    for leftover in scratch.glob(f"{MEETING}*"):  # of a run that was killed
        leftover.unlink()
    job = {
        "kind": step.kind,
        "fields": step.model_dump(mode="json", exclude_unset=True),
        "files": _told(files),
        "base": _told(options.base),
        "seed": options.seed,
        "device": options.device.type,
        "dtype": _name(options.dtype),
        "stored": _name(options.stored),
        "meeting": str((scratch / f"{MEETING}-{os.getpid()}").resolve()),
    }
    write_atomically(scratch / JOB, json.dumps(job))
    save_tensors(scratch / TEXT, {} if options.tokens is None else {"tokens": options.tokens})
    held: list[float] = []

    def told(message: dict[str, Any]) -> None:
        if "refused" in message:
            raise UserError(message["refused"])
        if "died" in message:
            raise ProcessFailed(message["died"])
        if "held" in message:
            held.append(message["held"])
        else:
            progress(*message["progress"])

    torch.cuda.empty_cache()  # room for the first of them; without a GPU nothing
    try:
        run_together("llmslim.together", str(scratch), processes=step.survey_processes, told=told)
    except ProcessFailed as error:
        raise UserError(
            f"{step.kind}: one of {step.survey_processes} processes died ({error}); run the same command again to go "
            "on at the last checkpoint, with fewer processes into another --output."
        ) from error
    return held


def _told(files: ModelFiles) -> dict[str, Any]:
    return {name: str(getattr(files, name)) for name in ("spec", "folder", "base")}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- one of them ---


def main(scratch: Path) -> None:
    from llmslim.evaluation.benchmark import peak_memory_mb

    end_with_starter()
    told = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr
    os.dup2(2, 1)

    def tell(**message: Any) -> None:
        print(json.dumps(message), file=told, flush=True)

    job = json.loads((scratch / JOB).read_text())
    return_freed_memory()
    try:
        device = _meet(job)
        step = build_step(job["kind"], job["fields"])
        assert isinstance(step, BlockStep)
        progress = (lambda *news: tell(progress=news)) if first() else (lambda *news: None)
        found = step.survey(Look(_files(job["files"]), _options(job, device, scratch), progress, scratch))
        if first():
            save_tensors(scratch / SURVEY, found)
        tell(held=peak_memory_mb())
        dist.barrier()
    except UserError as error:
        tell(refused=str(error))
        os._exit(2)  # at once: taking leave of processes that are busy may take for ever
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        tell(died=f"{type(error).__name__}: {first_line(error)}")
        os._exit(1)
    dist.destroy_process_group()


def _meet(job: dict[str, Any]) -> torch.device:
    """Find the others; the device of this process."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu") if job["device"] == "cpu" else torch.device(job["device"], rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif Path("/sys/class/net/lo").exists():  # the machine's own name may lead nowhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(job["meeting"], count),
        rank=rank,
        world_size=count,
        timeout=timedelta(days=365),  # of one that dies the starter knows, and ends the others
    )
    return device


def _files(told: dict[str, Any]) -> ModelFiles:
    folder = Path(told["folder"])
    return ModelFiles(told["spec"], folder, read_config(folder), told["base"])


def _options(job: dict[str, Any], device: torch.device, scratch: Path) -> PassOptions:
    return PassOptions(
        tokens=load_tensors(scratch / TEXT).get("tokens"),
        seed=job["seed"],
        device=device,
        dtype=getattr(torch, job["dtype"]),
        stored=getattr(torch, job["stored"]),
        base=_files(job["base"]),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
