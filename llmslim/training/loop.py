"""The loop of every method that trains: transformers' Trainer over the parameters that are trained alone.

Trainer sees a `Trainee`, whose state is the trained parameters and nothing else: its checkpoints are small, and
what is frozen (packed weights) never passes through its saving.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from llmslim.errors import UserError
from llmslim.files import load_tensors, save_tensors, write_atomically
from llmslim.history import CURVES, curves, rewrite
from llmslim.memory import freed_memory_kept, resident_bytes
from llmslim.training.forward import products_in
from llmslim.training.step import CHECKPOINTS

Loss = Callable[[nn.Module, Any], Tensor]
"""loss(model, batch) -> scalar; it runs the model itself. A batch is tokens int64 [batch, seq], or of `Examples`."""

GROUP = 50  # batches among which examples are sorted by length


class Examples(Protocol):
    """What is trained on, when it is no windows of one length."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each example: batches are of like ones, so that little is padding."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch that the loss gets."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train; the fields of `llmslim.training.step.TrainStep` tell more."""

    name: str
    lr: float
    epochs: float
    max_steps: int | None
    batch_size: int
    warmup: float
    weight_decay: float
    save_steps: int
    held: int
    """Examples that are for validation, the last ones."""
    max_minutes: float | None
    seed: int
    dtype: torch.dtype
    """What products are computed in (autocast); weights and their updates are float32."""
    patience: int | None = None
    gradient_accumulation_steps: int = 1


class Judge(NamedTuple):
    """What validation keeps the best by, where that is not the loss.

    Attributes:
        predict: of (model, batch), a tensor [examples].
        scores: of arrays (predictions, labels) of all that is held out, some figures by name; the best has the
            highest `score`.
    """

    predict: Callable[[nn.Module, Any], Tensor]
    scores: Callable[[Any, Any], dict[str, float]]


class Trainee(nn.Module):
    """A model of which the optimizer, and the checkpoints, see the trained parameters alone.

    Args:
        model: on its device; not a child, so that its frozen part is no part of the state.
        dropout: whether the model drops out while it trains.
    """

    def __init__(self, model: nn.Module, trained: Sequence[nn.Parameter], dropout: bool) -> None:
        super().__init__()
        self.dropout = dropout
        self.__dict__["model"] = model
        self.trained = nn.ParameterList(trained)

    def train(self, mode: bool = True) -> Trainee:
        self.__dict__["model"].train(mode and self.dropout)
        return super().train(mode)


def train(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    data: Tensor | Examples,
    loss: Loss,
    schedule: Schedule,
    scratch: Path,
    log: Path,
    progress: Callable[[int, int, str], None],
    dropout: bool = True,
    judge: Judge | None = None,
) -> bool:
    """Train some parameters of a model in place; goes on at the last checkpoint in `scratch`.

    With validation they end as the best of what they were at the start, at each checkpoint and at the end.

    Args:
        trained: float32 leaves; all others of the model are frozen.
        data: tokens int64 [windows, seq], or examples; the last `schedule.held` of them are for validation.
        log: a .jsonl file; entries of other passes in it stay.
        dropout: whether the model drops out while it trains, as its config says.
        judge: of examples with `labels`; what has the lowest loss is the best without.

    Returns:
        Whether training changed anything: not where nothing was better than the start.

    Raises:
        UserError: the loss or a gradient is not finite; the last checkpoint is kept.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    windows = _Windows(data) if isinstance(data, Tensor) else None
    examples: Any = windows or data
    held, lengths = schedule.held, examples.lengths
    kept = len(data) - held
    if kept < 1:
        raise UserError(f"Validation holds out all of {len(data)} examples: hold out fewer.")
    batch = schedule.batch_size * schedule.gradient_accumulation_steps
    epoch = math.ceil(kept / batch)
    steps = schedule.max_steps or math.ceil(epoch * schedule.epochs)
    if held:  # a small data set is over before many steps
        schedule = replace(schedule, save_steps=min(schedule.save_steps, epoch))
    folder = scratch / CHECKPOINTS
    last = _last_whole(folder)
    tokens = round(sum(lengths) / len(lengths) * batch)
    best_by = "" if not held else "eval_loss" if judge is None else "eval_score"
    watch = _Watch(schedule, steps, tokens, scratch, log, progress, best_by)
    held_ones = sorted(range(kept, len(data)), key=lambda index: lengths[index])
    trainer = _Trainer(
        model=Trainee(model, trained, dropout),
        args=_arguments(schedule, steps, folder, best_by, next(model.parameters()).device, last is None),
        data_collator=examples.collate,
        train_dataset=torch.utils.data.Subset(examples, range(kept)),
        eval_dataset=torch.utils.data.Subset(examples, held_ones) if held else None,
        compute_metrics=None
        if judge is None
        else lambda found: judge.scores(found.predictions, found.label_ids),
        callbacks=[watch, *_curves(log.parent / CURVES / scratch.name.lstrip("."))],
    )
    trainer.loss = loss if windows is None else lambda model, batch: loss(model, batch["input_ids"])
    trainer.watch, trainer.judge = watch, judge
    trainer.sampler = (
        _ByLength(lengths[:kept], schedule.batch_size, schedule.seed) if windows is None else None
    )
    trainer.remove_callback(PrinterCallback)
    begun = scratch / "begun.safetensors"
    if held and last is None:
        save_tensors(begun, {str(number): value.detach().cpu() for number, value in enumerate(trained)})
    with freed_memory_kept():
        trainer.train(resume_from_checkpoint=last)
    model.eval()
    if not watch.gained_nothing(trainer.state):
        return True
    with torch.no_grad():
        for number, value in load_tensors(begun).items():
            trained[int(number)].copy_(value)
    return False


def _curves(folder: Path) -> list[TrainerCallback]:
    """The history for TensorBoard; Trainer would put it beside its checkpoints, which go."""
    from transformers.integrations import TensorBoardCallback

    writer = curves(folder)
    return [] if writer is None else [TensorBoardCallback(writer)]


def _last_whole(folder: Path) -> str | None:
    """The newest checkpoint to go on from; one that a kill left half written is removed."""
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))):
        try:  # what Trainer writes last
            json.loads((Path(last) / TRAINER_STATE_NAME).read_text())
            return str(last)
        except (OSError, ValueError):
            shutil.rmtree(last)
    return None


def _arguments(
    schedule: Schedule, steps: int, folder: Path, best_by: str, device: torch.device, fresh: bool
) -> TrainingArguments:
    when: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": schedule.save_steps} if best_by else {}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=schedule.lr,
        per_device_train_batch_size=schedule.batch_size,
        per_device_eval_batch_size=schedule.batch_size,
        gradient_accumulation_steps=schedule.gradient_accumulation_steps,
        weight_decay=schedule.weight_decay,
        optim="adamw_torch_fused",  # on a CPU, too, 7 times as fast
        seed=schedule.seed,
        save_steps=schedule.save_steps,
        save_total_limit=2,
        logging_steps=max(1, min(10, steps // 10)),
        logging_nan_inf_filter=False,
        load_best_model_at_end=bool(best_by),
        metric_for_best_model=best_by or None,
        greater_is_better=best_by == "eval_score" if best_by else None,
        prediction_loss_only=best_by != "eval_score",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        use_cpu=device.type == "cpu",
        bf16=schedule.dtype == torch.bfloat16,
        fp16=schedule.dtype == torch.float16,
        eval_on_start=bool(best_by) and fresh,
        **when,
    )
    # one card: DataParallel would take batches of a multiple of batch_size, and losses call what it wraps
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Windows(torch.utils.data.Dataset):
    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.lengths = tokens, [tokens.shape[1]] * len(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index]}

    def collate(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"input_ids": torch.stack([example["input_ids"] for example in examples])}


class _ByLength(torch.utils.data.Sampler[int]):
    """Batches of like length, in random order; a function of seed and epoch alone, so that a resumed run has the same.

    Trainer's own grouping ("group_by_length") draws from the global generator.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        group = GROUP * self.batch_size
        ranked = [
            index
            for some in order.split(group)
            for index in sorted(some.tolist(), key=self.lengths.__getitem__)
        ]
        whole = (
            len(ranked) // self.batch_size
        )  # what is left over stays at the end, so that batches stay whole
        for batch in [*torch.randperm(whole, generator=generator).tolist(), whole]:
            yield from ranked[batch * self.batch_size : (batch + 1) * self.batch_size]


class _Trainer(Trainer):
    loss: Loss
    watch: _Watch
    sampler: _ByLength | None
    judge: Judge | None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.sampler or super()._get_train_sampler(train_dataset)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        value = self._run(self.loss, model, inputs)
        if not torch.isfinite(value):
            self.watch.refuse("loss", self.state.global_step)
        self.watch.loss = value.detach()
        return (value, {}) if return_outputs else value

    def get_decay_parameter_names(self, model: Any, **kwargs: Any) -> list[str]:
        """Matrices alone: the names by which Trainer knows biases and norms are not those of a `Trainee`."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():  # Trainer's own looks for labels
            if self.judge is not None:
                return None, self._run(self.judge.predict, model, inputs), inputs["labels"]
            return self.compute_loss(model, inputs).detach(), None, None

    def _run(self, function: Callable[[nn.Module, Any], Tensor], model: Any, inputs: Any) -> Tensor:
        """What a function makes of the trained model and a batch, in the type of the products."""
        unwrapped = self.accelerator.unwrap_model(model)
        dtype, device = self.watch.schedule.dtype, self.args.device.type
        # accelerate casts in the forward of the module that it wraps, which a loss does not call
        with products_in(dtype, device):
            return function(unwrapped.__dict__["model"], inputs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            chosen = optimizer or self.optimizer
            assert chosen is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, self.watch.rate)
        return self.lr_scheduler


class _Watch(TrainerCallback):
    """Stops by time, refuses what is not finite, tells how far it is, and keeps the log."""

    def __init__(
        self,
        schedule: Schedule,
        steps: int,
        tokens: int,
        scratch: Path,
        log: Path,
        progress: Callable[[int, int, str], None],
        best_by: str = "",
    ) -> None:
        self.schedule, self.steps, self.tokens, self.log, self.progress = (
            schedule,
            steps,
            tokens,
            log,
            progress,
        )
        self.best_by = best_by
        self._place, self._clock = scratch.name, scratch / "elapsed.json"
        self._before = json.loads(self._clock.read_text()) if self._clock.exists() else 0.0
        self._begun, self._first = time.monotonic(), 0
        self.loss = torch.tensor(float("nan"))  # the last one

    @property
    def elapsed(self) -> float:
        """Seconds of training, those of an earlier run up to its last checkpoint included."""
        return self._before + time.monotonic() - self._begun

    def rate(self, step: int) -> float:
        """Learning rate as a share of its peak: linear warm-up, cosine to 0 at the end, or when time is up."""
        done, begun = step / self.steps, (step + 1) / (self.schedule.warmup * self.steps + 1)
        if self.schedule.max_minutes is not None:  # time may be up long before the last step
            spent = self.elapsed / (60 * self.schedule.max_minutes)
            done, begun = max(done, spent), max(begun, spent / max(self.schedule.warmup, 1e-9))
        return min(1.0, begun) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def refuse(self, what: str, step: int) -> None:
        kept = _last_whole(self._clock.parent / CHECKPOINTS)
        where = f"; the last good checkpoint is kept as {kept}" if kept else ", before its first checkpoint"
        raise UserError(
            f"{self.schedule.name}: the {what} of training step {step + 1} is not finite, so training stopped{where}. "
            f"Try a lower lr than {self.schedule.lr:g}, into another --output."
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun, self._first = time.monotonic(), state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if self.schedule.dtype == torch.float16:
            return  # its loss scaling finds its size by overflows, and leaves such steps out
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):  # cheaper than to ask each element
            self.refuse("gradient", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pace, left = self._pace(state.global_step)
        total = self.steps if self.schedule.max_minutes is None else round(state.global_step + left * pace)
        told = f"loss {self.loss:.4g}, {pace * self.tokens:.0f} tokens/s, {resident_bytes() / 1e6:,.0f} MB"
        self.progress(state.global_step, total, told + self._judged(state))
        limit = self.schedule.max_minutes
        if limit is not None and self.elapsed > 60 * limit:
            control.should_training_stop = True
            control.should_evaluate = control.should_save = bool(self.best_by)  # the end may be the best
        if self._stalled(state):  # a run that was killed after it had stopped
            control.should_training_stop, control.should_evaluate, control.should_save = True, False, False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stalled(state):
            control.should_training_stop = True

    @property
    def _sign(self) -> int:
        """Of a score, the higher the better; of a loss the other way round."""
        return 1 if self.best_by == "eval_score" else -1

    def _validations(self, state: Any) -> list[float]:
        """What they found so far, the higher the better; from the history, which a resumed run has, too."""
        return [self._sign * entry[self.best_by] for entry in state.log_history if self.best_by in entry]

    def gained_nothing(self, state: Any) -> bool:
        """Whether no validation found anything better than the first, at the start."""
        found = self._validations(state)
        return bool(found) and max(found) == found[0]

    def _stalled(self, state: Any) -> bool:
        """Whether the last `patience` validations in training gained nothing."""
        found = self._validations(state)[1:]
        return bool(found) and len(found) - 1 - found.index(max(found)) >= (
            self.schedule.patience or math.inf
        )

    def _judged(self, state: Any) -> str:
        found, sign = self._validations(state), self._sign
        what = self.best_by.removeprefix("eval_")
        return f", validation {what} {sign * found[-1]:.4g}, best {sign * max(found):.4g}" if found else ""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_atomically(self._clock, json.dumps(self.elapsed))

    def _pace(self, step: int) -> tuple[float, float]:
        """Steps per second in this run, at least one of which is done, and the seconds that are left."""
        pace = (step - self._first) / max(time.monotonic() - self._begun, 1e-9)
        left = (self.steps - step) / pace
        if self.schedule.max_minutes is not None:
            left = min(left, 60 * self.schedule.max_minutes - self.elapsed)
        return pace, max(left, 0.0)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer's history, which its checkpoints keep, is the log: a resumed run repeats no line."""
        if state.global_step > self._first and state.log_history:
            pace, left = self._pace(state.global_step)
            told = {"tokens_per_second": round(pace * self.tokens, 1), "seconds_left": round(left, 1)}
            state.log_history[-1].update(told, memory_mb=round(resident_bytes() / 1e6))
        own = ({"pass": self._place, "method": self.schedule.name, **entry} for entry in state.log_history)
        rewrite(self.log, own, lambda entry: entry["pass"] == self._place)
