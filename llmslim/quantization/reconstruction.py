"""Block-wise reconstruction: train the quantized weights of one block until its outputs come close to the original's.

What methods of this kind share: where the inputs and the targets come from, the loop, and what is kept of it.
"""

from __future__ import annotations

import math
import time
import zlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from llmslim.anatomy import Anatomy, Block
from llmslim.anatomy.parts import dense_weight, is_conv1d
from llmslim.calibration.stream import BlockStream
from llmslim.edit import in_place
from llmslim.memory import resident_bytes
from llmslim.quantization._inputs import fix_inputs, input_steps, inputs_quantized
from llmslim.quantization.fake_quantize import TrainedInputs, TrainedWeight
from llmslim.quantization.grid import QuantizedWeight
from llmslim.quantization.packed import PackedLinear
from llmslim.quantization.quantizer import Quantizer
from llmslim.step import StepRecord, block_of
from llmslim.ties import counterpart, shared_modules
from llmslim.training.losses import hidden_states


@dataclass
class Schedule:
    """How a block is trained.

    Attributes:
        steps: optimizer steps, each on one chunk of windows.
        rate: learning rate as a share of its peak, by the share of the training that is done.
    """

    optimizer: torch.optim.Optimizer
    steps: int
    rate: Callable[[float], float]


@dataclass
class Kept:
    """What a block is at its best: all that training changes, as it is stored."""

    error: float
    weights: dict[str, QuantizedWeight]
    vectors: dict[str, Tensor]
    inputs: dict[str, Tensor]


class TrainedVector(nn.Module):
    """A norm or a bias in training, as multiples of its mean size, so that learning rates mean the same for all."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.unit = float(start.abs().mean()) or 1.0
        self.start, self.change = start, nn.Parameter(torch.zeros_like(start))

    def forward(self) -> Tensor:
        return self.start + self.unit * self.change


class BlockTrainer:
    """One block in training, its dense Linears in place and their weights given by `weights`.

    Args:
        stream: whose lane "calibration" stands in front of the block.
        targets: what the block is to make of each chunk of the lane.
        weights: by dotted name of their Linear.
        vectors: by dotted name of the parameter.
        inputs: by dotted name of their Linear, which takes them so already.
        validation: share of the chunks held out; what is best on them is kept, on all when there are none.
    """

    def __init__(
        self,
        block: Block,
        stream: BlockStream,
        targets: list[Tensor],
        weights: dict[str, TrainedWeight],
        vectors: dict[str, TrainedVector],
        inputs: dict[str, TrainedInputs],
        validation: float,
    ) -> None:
        self.block, self.stream, self.targets = block, stream, targets
        self.weights, self.vectors, self.inputs = weights, vectors, inputs
        self.lane = stream.lanes["calibration"]
        self.module = block.module.requires_grad_(False)
        chunks = list(range(len(targets)))
        held = min(math.ceil(len(chunks) * validation), len(chunks) - 1)
        self.seen = chunks[: len(chunks) - held]
        self.judged = chunks[len(chunks) - held :] or chunks

    def error(self, index: int, weights: dict[str, Tensor], vectors: dict[str, Tensor]) -> Tensor:
        """Of one chunk, with these weights [out, in] and vectors."""
        args, kwargs = self.lane.calls[index][self.block.index]
        given: dict[str, Tensor] = {}
        for name, weight in weights.items():
            linear = self.stream.model.get_submodule(name)
            given[f"{name}.weight"] = weight.T if is_conv1d(linear) else weight
        parameters = {
            name.removeprefix(f"{self.block.name}."): value.to(self.stream.dtype)
            for name, value in {**given, **vectors}.items()
        }
        output = functional_call(self.module, parameters, (self.lane.hidden[index], *args), kwargs)
        return hidden_states(output[0] if isinstance(output, tuple) else output, self.targets[index])

    @torch.no_grad()
    def judge(self) -> Kept:
        """The block as it would be stored now."""
        weights = {name: weight.quantized() for name, weight in self.weights.items()}
        vectors = {name: vector().detach().to(self.stream.dtype) for name, vector in self.vectors.items()}
        dense = {name: weight.dequantize() for name, weight in weights.items()}
        errors = [float(self.error(index, dense, vectors)) for index in self.judged]
        inputs = {name: trained.scale().detach() for name, trained in self.inputs.items()}
        return Kept(sum(errors) / len(errors), weights, vectors, inputs)

    def train(self, schedule: Schedule, record: StepRecord, limit: float = math.inf) -> tuple[Kept, Kept]:
        """What the block is before, and what it is at the best of all passes over the windows.

        Args:
            limit: seconds after which training stops; the learning rate falls in time. One step is done at least.
        """
        start = best = self.judge()
        generator = torch.Generator().manual_seed(zlib.crc32(self.block.name.encode()))
        optimizer = schedule.optimizer
        peaks = [group["lr"] for group in optimizer.param_groups]
        order: list[int] = []
        losses: list[float] = []
        begun, done, tokens = time.monotonic(), 0.0, 0
        for step in range(1, schedule.steps + 1):
            if not order:
                order = [self.seen[i] for i in torch.randperm(len(self.seen), generator=generator).tolist()]
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * schedule.rate(done)
            chunk = order.pop()
            loss = self._step(chunk, optimizer)
            if loss is None:
                record.note(self.block.name, f"training stopped at step {step}: the error is not finite")
                break
            losses.append(loss)
            tokens += self.targets[chunk].shape[:-1].numel()
            seconds = time.monotonic() - begun
            done = max(step / schedule.steps, seconds / limit)
            pace, memory = tokens / seconds, resident_bytes() / 1e6
            record.tell(
                f"step {step}/{schedule.steps}, loss {loss:.4g}, {pace:.0f} tokens/s, {memory:,.0f} MB"
            )
            if not order or done >= 1:
                now = self.judge()
                best = now if now.error < best.error else best
                entry = {"step": step, "loss": sum(losses) / len(losses), "eval_loss": now.error}
                told = {"tokens_per_second": round(pace, 1), "memory_mb": round(memory)}
                record.training.append({**entry, "learning_rate": schedule.rate(done), **told})
                losses = []
            if done >= 1:
                break
        return start, best

    def _step(self, chunk: int, optimizer: torch.optim.Optimizer) -> float | None:
        """Train on a chunk; its loss, or None, with nothing changed, when that is not finite."""
        with torch.enable_grad():
            weights = {name: weight() for name, weight in self.weights.items()}
            vectors = {name: vector() for name, vector in self.vectors.items()}
            loss = self.error(chunk, weights, vectors)
            if not torch.isfinite(loss):
                return None
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)


class Reconstruction(Quantizer):
    """A quantizer that trains block by block. Subclasses say how it begins, what is trained and how."""

    batch_size: int = Field(2, ge=1, description="windows per optimizer step")
    validation: float = Field(
        0.125, ge=0, lt=1, description="share of the windows held out; what does best on it is kept"
    )
    max_minutes: float | None = Field(
        None, gt=0, description="stop training after so long; each block has the same part of it"
    )
    target: Literal["model", "block"] = Field(
        "model",
        description="what a block's outputs are trained to be: the uncompressed model's, or what the original block "
        "makes of its quantized inputs",
    )

    @property
    def needs_calibration(self) -> bool:
        return True

    @property
    def needs_reference(self) -> bool:
        return self.target == "model"

    @property
    def reference_share(self) -> float:
        return 1.0

    @property
    def windows_per_chunk(self) -> int | None:
        return self.batch_size

    @property
    def blocks_limit(self) -> float:
        return math.inf if self.max_minutes is None else 60 * self.max_minutes

    def follows_reference(self, anatomy: Anatomy, tokens: int) -> bool:
        return self.needs_reference

    @abstractmethod
    def start(self) -> Quantizer:
        """What quantizes the block before it is trained."""

    @abstractmethod
    def trained(self, weight: Tensor, start: QuantizedWeight) -> TrainedWeight:
        """What is trained of a float32 weight [out, in], beginning at `start`."""

    @property
    def trains_vectors(self) -> bool:
        """Whether the block's norms and biases are trained too."""
        return False

    @property
    def trains_inputs(self) -> bool:
        """Whether the inputs of Linears get one step, which is trained too, in the place of one per token."""
        return False

    @abstractmethod
    def schedule(
        self, weights: list[TrainedWeight], small: list[TrainedVector | TrainedInputs], chunks: int
    ) -> Schedule:
        """How long and how fast to train weights, and what is small and trained as shares, on so many chunks."""

    def compress_block(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        until = time.monotonic() + self.blocks_limit / len(list(stream.anatomy.blocks))
        lane = stream.lanes["calibration"]
        inputs = list(lane.hidden)
        self.prepare_block(block, stream, record)
        dense = {name: module for name, module in block.linears().items() if self.selects(name)}
        targets = self._targets(block, stream) if reference is None else []
        rows = len(record.linears)
        self._begin(block, stream, reference, record)
        if reference is not None:
            targets = list(reference.lanes["calibration"].hidden)
        lane.hidden = list(inputs)
        packed = _packed(stream.model, dense)
        if packed:
            own = {name: dense[name] for name in packed}
            start, best = self._train(block, stream, targets, own, packed, record, until)
            self._put(stream, packed, best, record)
            for row in record.linears[rows:]:
                row.pop("output_error", None)  # of where training began
            record.linears.append(
                {"name": block.name, "output_error_before": start.error, "output_error": best.error}
            )
            if best is start:
                record.note(block.name, "training did not lower the error: left as it began")
        stream.forward(block, lane)

    def _targets(self, block: Block, stream: BlockStream) -> list[Tensor]:
        """What the block, as it is, makes of the lane, which stays in front of it."""
        lane = stream.lanes["calibration"]
        inputs = list(lane.hidden)
        stream.forward(block, lane)
        targets, lane.hidden = lane.hidden, inputs
        return targets

    def _begin(
        self, block: Block, stream: BlockStream, reference: BlockStream | None, record: StepRecord
    ) -> None:
        """Quantize the block for a start, and pass the reference's lane through its own."""
        first = self.start()
        compared = reference if first.needs_reference else None
        first.compress_block(block, stream, compared, record)
        if reference is not None and compared is None:
            reference.forward(block_of(reference, block), reference.lanes["calibration"])

    def _train(
        self,
        block: Block,
        stream: BlockStream,
        targets: list[Tensor],
        dense: dict[str, nn.Module],
        packed: dict[str, PackedLinear],
        record: StepRecord,
        until: float,
    ) -> tuple[Kept, Kept]:
        with in_place(stream.model, dense):
            inputs = input_steps(block, stream, dense, packed) if self.trains_inputs else {}
            with inputs_quantized(dense, {n: inputs.get(n) or p.quantized_inputs for n, p in packed.items()}):
                weights = {
                    name: self.trained(dense_weight(linear).detach().float(), packed[name].quantized())
                    for name, linear in dense.items()
                }
                vectors = _vectors(block) if self.trains_vectors else {}
                trainer = BlockTrainer(block, stream, targets, weights, vectors, inputs, self.validation)
                small: list[TrainedVector | TrainedInputs] = [*vectors.values(), *inputs.values()]
                schedule = self.schedule(list(weights.values()), small, len(trainer.seen))
                return trainer.train(schedule, record, max(until - time.monotonic(), 1e-3))

    def _put(
        self, stream: BlockStream, packed: dict[str, PackedLinear], best: Kept, record: StepRecord
    ) -> None:
        for name, weight in best.weights.items():
            if name in best.inputs:
                fix_inputs(stream.model, name, packed[name], best.inputs[name], record)
            stream.model.get_submodule(name).store(weight)  # type: ignore[operator]
        with torch.no_grad():
            for name, vector in best.vectors.items():
                stream.model.get_parameter(name).copy_(vector)


def _packed(model: nn.Module, names: Sequence[str] | dict[str, nn.Module]) -> dict[str, PackedLinear]:
    """Those of these Linears that have just been packed."""
    now = {name: model.get_submodule(name) for name in names}
    return {name: module for name, module in now.items() if isinstance(module, PackedLinear)}


def _vectors(block: Block) -> dict[str, TrainedVector]:
    """Norms and biases of a block; without those that are an earlier block's."""
    shared = shared_modules(block.model)
    found = {}
    for path, parameter in block.module.named_parameters():
        name = f"{block.name}.{path}"
        owner, _, leaf = name.rpartition(".")
        foreign = leaf != "bias" and counterpart(owner, shared) is not None
        if parameter.ndim == 1 and parameter.is_floating_point() and not foreign:
            found[name] = TrainedVector(parameter.detach().float())
    return found
