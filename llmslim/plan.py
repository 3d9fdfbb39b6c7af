"""The plan of a run: memory, time, disk and format, told before a weight is read."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from llmslim.anatomy import Anatomy
from llmslim.checkpoint.formats import Format, formats
from llmslim.checkpoint.writer import weight_bytes
from llmslim.errors import UserError
from llmslim.evaluation.damage import DOMAIN_WINDOWS, DOMAINS
from llmslim.evaluation.scores import CHUNK_ELEMENTS
from llmslim.loaders.models import ModelFiles
from llmslim.loaders.safetensors_io import SafetensorsFolder
from llmslim.memory import available_memory, resident_bytes
from llmslim.outlook import Foresight
from llmslim.passes import PROBE_TOKENS, PassOptions
from llmslim.recipe import Recipe
from llmslim.step import BlockStep
from llmslim.teacher import Other
from llmslim.training.step import PlacingStep, TrainStep
from llmslim.work import nearest_folder

TOUCHED = 2
"""Elementwise products that take as long as what is done beside matrix products (norms, activations, attention) to each
value that goes into a Linear or comes out of one: so many for each FLOP per weight, 12 in training. Measured on SmolLM2
and MiniLM, in float32 and bfloat16."""
SCORED = 32 * 128
"""Tokens of a batch in which a classifier is scored."""
SCORE_COPIES = 6
"""How often scoring holds a slice of the logits in float32: five in the divergence, and what it is made from."""
IMPORTED = 60 * 10**6
"""Bytes of modules that are imported, and of records that are kept, after the plan; 38 to 47 MB seen."""
MIXTURE_REST = 350 * 10**6
"""Bytes that a mixture's products in bfloat16 on a CPU leave behind, in ever new shapes: 340 MB seen."""
STARTED = 600 * 10**6
"""Bytes that a process which trains takes before it has a model: torch, transformers, accelerate, peft; 590 MB seen."""
SMALL_FILES = 20 * 2**20
"""Bytes for tokenizer, logs, reports and what else is no weight."""


@dataclass(frozen=True)
class Plan:
    """What a run will need and yield.

    Attributes:
        peak_memory: of this process, in bytes.
        seconds: of computing on this machine, for all steps and the evaluation; a rough figure.
        input_bytes: of the weights in the model's files.
        output_bytes: of the weight files in the output.
        disk_bytes: the most that output and work folder take while running.
        chosen: what targets and rounds of the recipe came to, in words.
        streams: whether blocks are read one at a time; False for families whose files need conversion.
    """

    peak_memory: int
    available_memory: int
    seconds: float
    input_bytes: int
    output_bytes: int
    disk_bytes: int
    format: str
    streams: bool
    compute_dtype: str
    blocks: int
    linears: int
    chosen: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def require_disk(self, output: Path, held: int = 0) -> None:
        """Refuse a run that the disk cannot hold.

        Args:
            held: bytes that an unfinished run has there already.

        Raises:
            UserError: with what is needed and what is free.
        """
        place = nearest_folder(output)
        free, needed = shutil.disk_usage(place).free, self.disk_bytes - held
        if free < needed:
            raise UserError(
                f"{place} has {free / 1e9:.2f} GB free and the run needs {needed / 1e9:.2f} GB: "
                "free some space or give --output on another disk."
            )


def make_plan(
    files: ModelFiles,
    fronts: Sequence[Anatomy],
    recipe: Recipe,
    options: PassOptions,
    form: Format,
    outlook: Foresight,
    streams: bool,
    chosen: tuple[str, ...] = (),
    fresh_head: bool = False,
    others: Sequence[Other] = (),
) -> Plan:
    """Work out the plan from what stands in front of each step, on meta, and what the last one will leave.

    Args:
        others: models that steps take from.
    """
    anatomy = fronts[0]
    shape = _Shape(anatomy, options, files.dtype)
    output = weight_bytes(outlook.anatomy.model, form, options.stored)
    start = shape.total * shape.stored if fresh_head else 0  # written for the run to begin with
    own = formats()["llmslim"]
    between = [weight_bytes(front.model, own, options.stored) for front in fronts[1:]]
    read = _input_bytes(files, shape.total)
    held = 0 if streams else shape.total * shape.stored
    return Plan(
        peak_memory=_peak_memory(shape, recipe, anatomy, held, 0 if streams else read, others),
        available_memory=available_memory(),
        seconds=_seconds(shape, recipe, anatomy, others),
        input_bytes=read,
        output_bytes=output,
        disk_bytes=start + _disk(shape, recipe, fronts, [*between, output]) + SMALL_FILES,
        format=form.name,
        streams=streams,
        compute_dtype=str(options.dtype).removeprefix("torch."),
        blocks=len(anatomy.blocks),
        linears=len(outlook.edits),
        chosen=chosen,
    )


class _Shape:
    """Sizes that the estimates are made of, in parameters and bytes."""

    def __init__(self, anatomy: Anatomy, options: PassOptions, stored: torch.dtype) -> None:
        model = anatomy.model
        self.device, self.dtype = options.device, options.dtype
        self.compute, self.stored = options.dtype.itemsize, stored.itemsize
        stacks = tuple(f"{stack.name}." for stack in anatomy.stacks)
        self.total = sum(p.numel() for p in model.parameters())
        self.outer = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(stacks))
        self.block = max(sum(p.numel() for p in block.module.parameters()) for block in anatomy.blocks)
        self.hidden = model.config.get_text_config().hidden_size
        self.vocabulary = cast(int, model.get_input_embeddings().num_embeddings)
        self.matrices = [matrices for block in anatomy.blocks for matrices in block.matrices()]
        self.passed = sum(m.passed for m in self.matrices)
        self.widest = max((int(m.width * max(m.used, 1)) for m in self.matrices), default=self.hidden)
        self.widths = int(sum(m.used * (m.rows + m.width) for m in self.matrices))
        self.mixes = any(m.used < m.count for m in self.matrices)
        self.tokens = 0 if options.tokens is None else options.tokens.numel()
        self.window = 0 if options.tokens is None else options.tokens.shape[1]
        self.lane_bytes = self.tokens * self.hidden * self.compute


def _disk(shape: _Shape, recipe: Recipe, fronts: Sequence[Anatomy], made: Sequence[int]) -> int:
    """The most that output and work folder hold at once, in the course of one step.

    That is the checkpoint that it starts from (of all steps before it, where they are measured), what it keeps for
    itself, the lanes before and after a block, and its own checkpoint: in parts, and joined.

    Args:
        made: bytes of what each step leaves.
    """
    most = 0
    for number, (step, anatomy) in enumerate(zip(recipe.steps, fronts, strict=True)):
        lanes = 0.0
        if isinstance(step, BlockStep) and step.streams_calibration:
            followed = step.reference_share if step.follows_reference(anatomy, shape.tokens) else 0
            lanes = 2 * (1 + followed) * shape.lane_bytes * len(anatomy.stacks)
        probes = len(anatomy.blocks) * PROBE_TOKENS * shape.hidden * 4 + shape.outer * 4
        before = sum(made[:number]) if recipe.measures_steps else sum(made[:number][-1:])
        own = step.disk_bytes(anatomy, shape.tokens)
        most = max(most, before + own + int(lanes) + probes + 2 * made[number])
    return most


def _peak_memory(
    shape: _Shape, recipe: Recipe, anatomy: Anatomy, held: int, mapped: int, others: Sequence[Other]
) -> int:
    """The process as it is now, plus the larger of: gradients, entering the blocks, working on one, evaluating.

    Args:
        held: bytes of a model that is loaded whole, for as long as its blocks are taken from it.
        mapped: bytes of its files, which are in memory beside it while it is loaded.
    """
    weights = shape.block * (shape.compute + shape.stored)
    blocks = [step for step in recipe.steps if isinstance(step, BlockStep)]
    followed = max(
        (s.reference_share for s in blocks if s.follows_reference(anatomy, shape.tokens)), default=0
    )
    models = 2 if followed else 1
    trains = max((step.block_copies for step in blocks), default=0)
    lanes = (
        1 + followed + (1 if trains else 0)
    )  # what a block is trained on stays while it is quantized for a start
    chunk = 2048 * (3 * shape.widest + 4 * shape.hidden) * shape.compute if shape.tokens else 0
    paused = shape.tokens * (shape.widest + 2 * shape.hidden) * shape.compute
    step = max((step.workspace_bytes(anatomy) for step in recipe.steps), default=0)
    if trains:
        paused += int(followed * shape.tokens * (3 * shape.hidden + shape.widest) * shape.compute)
    training = max((_training(step, shape, len(list(anatomy.blocks))) for step in blocks), default=0)
    working = models * weights + int(lanes * shape.lane_bytes) + max(paused + max(chunk, step), training)
    surveying = max((_surveying(step, shape, anatomy) for step in blocks), default=0)
    for other in others:
        if other.step.keeps_other:
            beside = other.values * shape.compute
            surveying = max(surveying, _surveying(other.step, shape, anatomy, beside))
        else:  # asked before, in the type of the products
            surveying = max(surveying, other.values * _products(other.step, shape.dtype).itemsize)
    outer = shape.outer * 2 * shape.stored
    tables = max((step.outer_bytes(anatomy) for step in blocks), default=0)
    entering = outer + max(weights + shape.lane_bytes * 2, tables)
    evaluating = 0
    if recipe.evaluation is not None and anatomy.head is not None:
        seq_len = recipe.evaluation.seq_len
        windows = recipe.evaluation.windows + DOMAIN_WINDOWS * len(DOMAINS)
        logits = seq_len * shape.vocabulary
        both = windows * seq_len * shape.hidden + logits + shape.outer  # of base and result
        scoring = SCORE_COPIES * min(logits, CHUNK_ELEMENTS) * 4
        evaluating = 2 * both * shape.compute + scoring + weights + IMPORTED
    if recipe.evaluation is not None and (recipe.glue_tasks or recipe.evaluation.tasks):
        # one whole model in float32 after the other, read from its files, and a batch that passes a block
        passing = SCORED * (3 * shape.widest + 4 * shape.hidden) * 4
        evaluating = max(evaluating, shape.total * (4 + shape.stored) + passing)
    kernels = MIXTURE_REST if shape.mixes and shape.device.type == "cpu" and shape.compute < 4 else 0
    return resident_bytes() + kernels + max(surveying, held + max(mapped, working, entering, evaluating))


def _surveying(step: BlockStep, shape: _Shape, anatomy: Anatomy, beside: int = 0) -> int:
    """Bytes of a survey with gradients, float32: weights and what is as large, one gradient, one backward.

    Args:
        beside: bytes of another model that it keeps in memory.
    """
    if not step.survey_copies:
        return beside
    predicted = step.survey_predicted(shape.vocabulary, shape.window) if anatomy.head is not None else 0
    backward = step.survey_span(shape.window) * shape.widths + 3 * predicted * shape.vocabulary
    further = step.survey_bytes(anatomy, shape.window)
    own = int(4 * (step.survey_copies * shape.total + shape.block + backward)) + further + beside
    count = step.survey_processes
    return own if count == 1 or shape.device.type == "cuda" else count * (own + STARTED)


def _training(step: BlockStep, shape: _Shape, blocks: int) -> int:
    """Bytes that a block in training takes: copies of its weights, and what the backward pass of one chunk needs."""
    if not step.block_copies:
        return 0
    tokens = shape.window * (step.windows_per_chunk or 1)
    return 4 * step.block_copies * shape.block + 3 * tokens * shape.widths // blocks * shape.compute


def _products(step: BlockStep, dtype: torch.dtype) -> torch.dtype:
    return step.products(dtype) if isinstance(step, TrainStep) else dtype


def _seconds(shape: _Shape, recipe: Recipe, anatomy: Anatomy, others: Sequence[Other]) -> float:
    """Matrix products at the speed measured here for a moment, plus the search of scales per weight.

    In what trains, also what is done to each value between products: with fast ones most of the time.
    """
    device, passed = shape.device, shape.passed
    flops, surveys, pace = 0.0, 0.0, _flops_per_second(device, shape.dtype)
    beside = {id(other.step): other.weights for other in others}
    for step in recipe.steps:
        if isinstance(step, BlockStep) and step.needs_survey:
            head = anatomy.head is not None and step.survey_copies
            met = passed + (shape.hidden * shape.vocabulary if head else 0)
            products = _products(step, shape.dtype)
            own = pace if products == shape.dtype else _flops_per_second(device, products)
            touched = shape.widths * TOUCHED / _values_per_second(device) if step.survey_copies else 0.0
            seconds = step.survey_work(shape.tokens, shape.window) * (met / own + touched)
            if isinstance(step, PlacingStep) and id(step) in beside:
                asking = 2.0 * step.asked(shape.tokens, shape.window) * beside[id(step)] / own
                seconds += asking if step.keeps_other else 0.0
                surveys += 0.0 if step.keeps_other else asking  # before training, whose time alone is limited
            seconds /= step.survey_processes if device.type == "cuda" else 1  # on a CPU they share its cores
            surveys += min(step.survey_limit, seconds)
        if step.needs_calibration and isinstance(step, BlockStep) and step.streams_calibration:
            tokens = min(shape.tokens, step.text_limit or shape.tokens)
            flops += 2.0 * tokens * passed
            trained = 6.0 * step.windows_trained(shape.tokens // shape.window) * shape.window * passed
            surveys += min(step.blocks_limit, trained / pace)
            flops += 1.25 * tokens * sum(m.used * m.width * m.width for m in shape.matrices) / 2
        flops += 2.0 * sum(m.weights * m.width for m in shape.matrices) * 2
    if recipe.evaluation is not None and anatomy.head is not None:
        tokens = recipe.evaluation.windows * recipe.evaluation.seq_len
        measured = len(recipe.steps) if recipe.evaluation.steps else 1  # each runs the base beside it
        flops += measured * 2 * 2.0 * tokens * (passed + shape.hidden * shape.vocabulary)
    return surveys + flops / pace + len(recipe.steps) * sum(m.weights for m in shape.matrices) * 1e-7


@functools.cache
def _flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    a = torch.randn(512, 512, device=device, dtype=dtype)
    return 2 * 512**3 / _quickest(lambda: (a @ a).sum().item())


@functools.cache
def _values_per_second(device: torch.device) -> float:
    a = torch.ones(2**20, device=device)
    b = a * a
    return a.numel() / _quickest(lambda: torch.mul(a, a, out=b)[:1].item())


def _quickest(work: Callable[[], object]) -> float:
    """Seconds of the quickest run of 50 ms: what else the machine does just then only makes one slower."""
    work()
    ends = time.perf_counter() + 0.05
    times: list[float] = []
    while not times or time.perf_counter() < ends:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def _input_bytes(files: ModelFiles, parameters: int) -> int:
    """Bytes of the weights in the files as they are; of a Hub model not fetched yet, what its config says."""
    try:
        here = SafetensorsFolder(files.folder).stored_bytes
    except UserError:
        here = 0
    return here or parameters * files.dtype.itemsize
