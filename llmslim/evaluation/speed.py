"""Speed and memory of one or two models: fresh processes in turns, medians with their spread, and what is only noise.

`python -m llmslim.evaluation.speed MODEL SETTINGS` is one such process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from llmslim.checkpoint.reader import CheckpointReader
from llmslim.errors import UserError
from llmslim.evaluation.benchmark import generate_once, peak_memory_mb, read_once
from llmslim.loaders.heads import positions
from llmslim.loaders.models import ModelFiles, compute_dtype, default_device, find
from llmslim.loaders.texts import sample
from llmslim.process import ProcessFailed, run_module

RAPL = Path("/sys/class/powercap")
FLOOR = 0.02  # of a figure: smaller differences are called noise whatever the rounds say
LOWER = ("load_seconds", "peak_memory_mb", "bytes_on_disk", "first_token_ms", "joules_per_token")
"""Figures that are better when lower, by how their names begin."""


@dataclass(frozen=True)
class Settings:
    """What each process measures.

    Attributes:
        batches: sequences at a time.
        lengths: tokens of the prompts.
        new_tokens: decoding steps after each prompt.
        repeats: timed runs of each, after one untimed; the median counts.
        dtype: to compute in; what is fast on the machine when None.
    """

    batches: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = (32, 512)
    new_tokens: int = 32
    repeats: int = 2
    dtype: str | None = None


def compare_speed(
    model: str,
    base: str | None = None,
    settings: Settings = Settings(),
    rounds: int = 3,
    revision: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure a model, and a base in turns with it, so that what else the machine does falls on both.

    Returns:
        Plain JSON: `model` and `base` (None without) with spec, dtype, compiled_kernel and figures {name: {median,
        min, max, values}}, the values one per round; `comparison` by figure: ratio (of the medians) and
        within_noise; a `verdict`; energy (a reason when there is none), threads, rounds and the settings. Figures:
        load_seconds, peak_memory_mb (of the whole process), bytes_on_disk, and by batch and prompt
        prefill_bB_pP and decode_bB_pP (tokens per second of all sequences), first_token_ms_bB_pP and, where
        the machine tells, joules_per_token_bB_pP (of the CPU package, while decoding).

    Raises:
        UserError: for what cannot be measured, before a process is started.
    """
    if rounds < 1:
        raise UserError(f"rounds {rounds} is too few: it takes at least 1, and 2 to tell noise.")
    sides = {"model": find(model, revision)} | ({"base": find(base)} if base is not None else {})
    for files in sides.values():
        _require_measurable(files, settings)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for place, name in enumerate(order):
            progress(number * len(sides) + place, rounds * len(sides))
            found[name].append(_in_fresh_process(sides[name], settings))
    progress(rounds * len(sides), rounds * len(sides))
    record: dict[str, Any] = {name: _summary(sides[name], rows) for name, rows in found.items()}
    comparison = None
    if base is not None:
        comparison = compared(record["model"]["figures"], record["base"]["figures"], rounds)
    return {
        "model": record["model"],
        "base": record.get("base"),
        "comparison": comparison,
        "verdict": None if comparison is None else verdict(comparison, rounds),
        "energy": "measured" if energy_counters() else f"not measured: no readable energy counter in {RAPL}",
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        **asdict(settings),
    }


def _require_measurable(files: ModelFiles, settings: Settings) -> None:
    for name in ("batches", "lengths"):
        if not getattr(settings, name) or min(getattr(settings, name)) < 1:
            raise UserError(f"{name} takes numbers from 1, such as 1,4.")
    for name in ("new_tokens", "repeats"):
        if getattr(settings, name) < 1:
            raise UserError(f"{name} {getattr(settings, name)} is too few: it takes at least 1.")
    skeleton = CheckpointReader(files).model_skeleton()
    if skeleton.config.is_encoder_decoder:
        raise UserError(f"{type(skeleton).__name__} is an encoder-decoder: its speed is not measured yet.")
    new, limit = settings.new_tokens if skeleton.can_generate() else 0, positions(skeleton)
    if limit and max(settings.lengths) + new > limit:
        raise UserError(
            f"{files.spec} has {limit} positions, and a prompt of {max(settings.lengths)} with {new} more needs "
            f"{max(settings.lengths) + new}: give at most --lengths {max(1, limit - new)}."
        )


def _in_fresh_process(files: ModelFiles, settings: Settings) -> dict[str, Any]:
    quick = compute_dtype(
        default_device(), files.dtype
    )  # chosen by this process, for all rounds and both sides
    asked = {**asdict(settings), "dtype": settings.dtype or str(quick).removeprefix("torch.")}
    try:
        return json.loads(run_module("llmslim.evaluation.speed", str(files.folder), json.dumps(asked)))
    except ProcessFailed as error:
        raise UserError(f"{files.spec} could not be measured: {error}") from error


def measured(folder: str, settings: Settings) -> dict[str, Any]:
    """Load a model and measure it, for a process that does nothing else."""
    from llmslim.checkpoint.load import load
    from llmslim.quantization import native

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    started = time.perf_counter()
    model, tokenizer = load(folder, dtype=settings.dtype)
    figures: dict[str, float] = {"load_seconds": time.perf_counter() - started}
    with torch.no_grad():
        for batch in settings.batches:
            for length in settings.lengths:
                prompt = sample("builtin:test", tokenizer, batch, length).tokens.to(model.device)
                of_one = _timed_runs(model, prompt, settings)
                figures |= {f"{name}_b{batch}_p{length}": value for name, value in of_one.items()}
        logits = model(input_ids=prompt[:1, :2])[0]
    figures["peak_memory_mb"] = peak_memory_mb()
    return {
        "figures": figures,
        "dtype": str(logits.dtype).removeprefix("torch."),  # `model.dtype` of a packed model is the scales'
        "device": str(model.device),
        "compiled_kernel": native.library() is not None,
    }


def _timed_runs(model: Any, prompt: torch.Tensor, settings: Settings) -> dict[str, float]:
    """prefill, first_token_ms, and of a decoder decode and joules_per_token, each the median of the runs."""
    if not model.can_generate():
        read_once(model, prompt)
        seconds = median(read_once(model, prompt) for _ in range(settings.repeats))
        return {"prefill": prompt.numel() / seconds}
    generate_once(model, prompt, 1)
    runs, joules = [], []
    for _ in range(settings.repeats):
        with energy() as used:
            runs.append(generate_once(model, prompt, settings.new_tokens))
        joules += used
    made = len(prompt) * settings.new_tokens
    prefill, decode = median(run[0] for run in runs), median(run[1] for run in runs)
    figures = {"prefill": prompt.numel() / prefill, "first_token_ms": 1000 * prefill, "decode": made / decode}
    return {**figures, **({"joules_per_token": median(joules) / made} if joules else {})}


def energy_counters(root: Path | None = None) -> list[Path]:
    """The counters of the CPU packages (RAPL) that this user may read."""
    folders = sorted((root or RAPL).glob("intel-rapl:[0-9]*"))
    packages = [folder for folder in folders if folder.name.count(":") == 1]  # the parts lie within
    return [folder for folder in packages if os.access(folder / "energy_uj", os.R_OK)]


@contextmanager
def energy(root: Path | None = None) -> Iterator[list[float]]:
    """Inside, count: afterwards the list holds the joules that all packages took, or nothing where none tells."""
    counters = energy_counters(root)
    used: list[float] = []
    before = [int((folder / "energy_uj").read_text()) for folder in counters]
    yield used
    if not counters:
        return
    total = 0
    for folder, start in zip(counters, before, strict=True):
        gone = int((folder / "energy_uj").read_text()) - start
        if gone < 0:  # it has started anew
            gone += int((folder / "max_energy_range_uj").read_text())
        total += gone
    used.append(total / 1e6)


def _summary(files: ModelFiles, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    weights = {entry["file"] for entry in files.weights.entries.values()}
    size = float(sum((files.folder / name).stat().st_size for name in weights))
    by_name = {name: [row["figures"][name] for row in rows] for name in rows[0]["figures"]}
    by_name["bytes_on_disk"] = [size] * len(rows)
    figures = {
        name: {"median": median(values), "min": min(values), "max": max(values), "values": values}
        for name, values in by_name.items()
    }
    return {"spec": files.spec, **{k: v for k, v in rows[0].items() if k != "figures"}, "figures": figures}


def compared(model: dict[str, Any], base: dict[str, Any], rounds: int) -> dict[str, Any]:
    """By figure: the ratio of the medians, and whether it is within noise.

    A difference is real when it is larger than both spreads (largest minus smallest round) together and than 2 %.
    One round tells no spread: within_noise is None then, but for bytes, which have none.
    """
    found: dict[str, Any] = {}
    for name in (name for name in model if name in base):
        ours, theirs = model[name], base[name]
        gap = abs(ours["median"] - theirs["median"])
        spread = ours["max"] - ours["min"] + theirs["max"] - theirs["min"]
        noise = gap <= max(spread, FLOOR * theirs["median"])
        known = rounds > 1 or name == "bytes_on_disk"
        found[name] = {
            "ratio": ours["median"] / theirs["median"],
            "within_noise": noise if known else None,
            "better": bool(
                known and not noise and (ours["median"] < theirs["median"]) == name.startswith(LOWER)
            ),
        }
    return found


def verdict(comparison: dict[str, Any], rounds: int) -> str:
    """What differs beyond noise, in one line."""
    if rounds < 2:
        return "one round tells no noise: give --rounds 3"
    real = {name: row for name, row in comparison.items() if row["within_noise"] is False}
    if not real:
        return "within noise: no figure differs by more than its spread"
    better = [f"{label(name)} {row['ratio']:.2f}x" for name, row in real.items() if row["better"]]
    worse = [f"{label(name)} {row['ratio']:.2f}x" for name, row in real.items() if not row["better"]]
    parts = [
        *(["better: " + ", ".join(better)] if better else []),
        *(["worse: " + ", ".join(worse)] if worse else []),
    ]
    return "; ".join(parts) + ("; the rest within noise" if len(real) < len(comparison) else "")


def label(name: str) -> str:
    """A figure's name for a person: decode_b1_p512 is `decode, batch 1, prompt 512`."""
    what, _, where = name.partition("_b")
    if "_p" not in where:  # the unit stands with the figure
        return name.removesuffix("_mb").removesuffix("_seconds").replace("_", " ")
    batch, _, length = where.partition("_p")
    return f"{what.removesuffix('_ms').replace('_', ' ')}, batch {batch}, prompt {length}"


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    given |= {name: tuple(given[name]) for name in ("batches", "lengths")}
    print(json.dumps(measured(sys.argv[1], Settings(**given))))
