"""The loop of every method that trains: transformers' Trainer over the parameters that are trained alone.

Trainer sees a `Trainee`, whose state is the trained parameters and nothing else: its checkpoints are small, and
what is frozen (packed weights) never passes through its saving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from llmslim.errors import UserError
from llmslim.files import load_tensors, save_tensors
from llmslim.history import CURVES, curves
from llmslim.memory import freed_memory_kept
from llmslim.ranks import first, processes, rank
from llmslim.training.batches import ByLength, Examples, Windows
from llmslim.training.forward import products_in
from llmslim.training.shares import Shares, held, summed_up
from llmslim.training.step import CHECKPOINTS
from llmslim.training.watch import Schedule, Watch, resumed

Loss = Callable[[nn.Module, Any], Tensor]
"""loss(model, batch) -> scalar; it runs the model itself. A batch is tokens int64 [batch, seq], or of `Examples`."""


class Judge(NamedTuple):
    """What validation keeps the best by, where that is not the loss.

    Attributes:
        predict: of (model, batch), a tensor [examples].
        scores: of arrays (predictions, labels) of all that is held out, some figures by name; the best has the
            highest `score`.
    """

    predict: Callable[[nn.Module, Any], Tensor]
    scores: Callable[[Any, Any], dict[str, float]]

    def metrics(self, found: Any) -> dict[str, float]:
        """`scores` as Trainer calls it."""
        return self.scores(found.predictions, found.label_ids)


class Trainee(nn.Module):
    """A model of which the optimizer, and the checkpoints, see the trained parameters alone.

    Args:
        model: on its device; not a child, so that its frozen part is no part of the state.
        dropout: whether the model drops out while it trains.
        dtype: what matrix products are computed in.
        shares: what runs the model, if its weights are held in shares; `trained` and the state are shares then.
        ema: decay of an exponential mean of the trained parameters; 0 for none.
    """

    shares: Shares | None

    def __init__(
        self,
        model: nn.Module,
        trained: Sequence[nn.Parameter],
        dropout: bool,
        dtype: torch.dtype,
        shares: Shares | None = None,
        ema: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout, self.dtype, self.ema = dropout, dtype, ema
        self.__dict__.update(model=model, shares=shares)
        self.trained = nn.ParameterList(trained)
        means = [nn.Parameter(p.detach().clone(), requires_grad=False) for p in trained if ema]
        self.means = nn.ParameterList(means)

    def train(self, mode: bool = True) -> Trainee:
        self.__dict__["model"].train(mode and self.dropout)
        return super().train(mode)

    def forward(self, function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        """What a function makes of the model and a batch; gradients of several processes meet behind it."""
        model = self.__dict__["model"]
        with products_in(self.dtype, next(model.parameters()).device.type):
            found: Tensor = function(model, batch) if self.shares is None else self.shares(function, batch)
        return found

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """What this process holds of the trained parameters."""
        return {name: held(value) for name, value in super().state_dict(*args, **kwargs).items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Take what `state_dict` gave, of all parameters; strict."""
        for name, parameter in self.named_parameters():
            held(parameter).copy_(state_dict[name])
        self._changed()
        return _IncompatibleKeys([], [])

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Move the means towards the parameters, after so many steps."""
        decay = min(self.ema, (1 + step) / (10 + step))  # as TensorFlow's: the start is soon forgotten
        for mean, parameter in zip(self.means, self.trained, strict=False):
            held(mean).lerp_(held(parameter), 1 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Give the parameters the values of their means, if there are any, and these theirs."""
        for mean, parameter in zip(self.means, self.trained, strict=False):
            last = held(parameter).clone()
            held(parameter).copy_(held(mean))
            held(mean).copy_(last)
        self._changed()

    def _changed(self) -> None:
        """After a forward pass alone some weights are whole still: have them made of their shares anew."""
        if self.shares is not None:
            self.shares.reshard()  # type: ignore[operator]  # a method of what fully_shard makes of it


def train(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    beside: nn.Module,
    data: Tensor | Examples,
    loss: Loss,
    schedule: Schedule,
    scratch: Path,
    log: Path,
    progress: Callable[[int, int, str], None],
    dropout: bool = True,
    judge: Judge | None = None,
    blocks: Sequence[nn.Module] | None = None,
) -> bool:
    """Train some parameters of a model in place; goes on at the last checkpoint in `scratch`.

    With validation they end as the best of what they were at the start, at each checkpoint and at the end.

    Args:
        trained: float32 leaves; all others of the model are frozen.
        beside: float32; what is trained with the model and no part of it.
        data: tokens int64 [windows, seq], or examples; the last `schedule.held` of them are for validation.
        log: a .jsonl file; entries of other passes in it stay.
        dropout: whether the model drops out while it trains, as its config says.
        judge: of examples with `labels`; what has the lowest loss is the best without.
        blocks: of the model, if its weights are to be held in shares (see `Shares`); each process holds all without.

    Returns:
        Whether training changed anything: not where nothing was better than the start.

    Raises:
        UserError: the loss or a gradient is not finite; the last checkpoint is kept.
    """
    trained = [*trained, *beside.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    examples: Any = Windows(data) if isinstance(data, Tensor) else data
    kept = len(examples) - schedule.held
    if kept < 1:
        raise UserError(f"Validation holds out all of {len(examples)} examples: hold out fewer.")
    schedule, steps, batch = _counted(schedule, kept)
    folder, shares = scratch / CHECKPOINTS, None
    if blocks is not None:  # of its shares each process keeps checkpoints of its own
        folder, shares = folder / str(rank()), Shares(model, beside, blocks)
        trained = shares.of(trained)
    last = resumed(folder, shares is not None)
    best_by = "" if not schedule.held else "eval_loss" if judge is None else "eval_score"
    tokens = round(sum(examples.lengths) / len(examples) * batch)
    watch = Watch(schedule, steps, tokens, folder, scratch, log, progress, best_by)
    trainee = Trainee(model, trained, dropout, schedule.dtype, shares, schedule.ema)
    callbacks = [watch, *_curves(log.parent / CURVES / scratch.name.lstrip("."))]
    trainer = _trainer(trainee, examples, kept, loss, judge, watch, folder, last is None, callbacks)
    begun = folder / "begun.safetensors"
    if best_by and last is None and trainer.args.should_save:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(begun, {name: value.cpu() for name, value in trainee.state_dict().items()})
    # blocks that come whole and go again would be kept, too
    with freed_memory_kept() if shares is None else nullcontext():
        trainer.train(resume_from_checkpoint=last)
    trainee.exchange()
    model.eval()
    gained = not watch.gained_nothing(trainer.state)
    if not gained:
        trainee.load_state_dict(load_tensors(begun))
    if shares is not None:
        assert trainer.optimizer is not None
        trainer.optimizer.state.clear()  # room for what the others hold
        shares.join()
    return gained


def _trainer(
    trainee: Trainee,
    examples: Any,
    kept: int,
    loss: Loss,
    judge: Judge | None,
    watch: Watch,
    folder: Path,
    fresh: bool,
    callbacks: list[TrainerCallback],
) -> _Trainer:
    """The Trainer of the first `kept` examples, which validates by the others.

    Args:
        folder: for its checkpoints.
        fresh: whether it begins, and does not go on from one of them.
    """
    windows, lengths = isinstance(examples, Windows), examples.lengths
    if not windows:
        batch = watch.schedule.batch_size * processes()
        watch.sampler = ByLength(lengths[:kept], batch, watch.schedule.seed)
    judging = sorted(range(kept, len(examples)), key=lambda index: lengths[index])
    return _Trainer(
        (lambda model, batch: loss(model, batch["input_ids"])) if windows else loss,
        watch,
        judge,
        model=trainee,
        args=_arguments(trainee, watch, folder, fresh),
        data_collator=examples.collate,
        train_dataset=torch.utils.data.Subset(examples, range(kept)),
        eval_dataset=torch.utils.data.Subset(examples, judging) if judging else None,
        callbacks=callbacks,
    )


def _counted(schedule: Schedule, kept: int) -> tuple[Schedule, int, int]:
    """The schedule for so many examples, its steps, and the examples of a step."""
    batch = schedule.batch_size * schedule.gradient_accumulation_steps * processes()
    epoch = math.ceil(kept / batch)
    if schedule.held:  # a small data set is over before many steps
        schedule = replace(schedule, save_steps=min(schedule.save_steps, epoch))
    return schedule, schedule.max_steps or math.ceil(epoch * schedule.epochs), batch


def _curves(folder: Path) -> list[TrainerCallback]:
    """The history for TensorBoard; Trainer would put it beside its checkpoints, which go."""
    from transformers.integrations import TensorBoardCallback

    writer = curves(folder) if first() else None
    return [] if writer is None else [TensorBoardCallback(writer)]


class _EachSaves(TrainingArguments):
    """Each process writes checkpoints, of its own shares into its own folder."""

    @property
    def should_save(self) -> bool:
        return True


def _arguments(trainee: Trainee, watch: Watch, folder: Path, fresh: bool) -> TrainingArguments:
    schedule, steps, best_by = watch.schedule, watch.steps, watch.best_by
    kind = TrainingArguments if trainee.shares is None else _EachSaves
    device = next(trainee.parameters()).device
    when: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": schedule.save_steps} if best_by else {}
    # the last batches of several processes are filled up; the mean loss of one example is nobody else's
    judged = 1 if best_by == "eval_loss" and processes() > 1 else schedule.batch_size
    arguments = kind(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=schedule.lr,
        per_device_train_batch_size=schedule.batch_size,
        per_device_eval_batch_size=judged,
        gradient_accumulation_steps=schedule.gradient_accumulation_steps,
        weight_decay=schedule.weight_decay,
        optim="adamw_torch_fused",  # on a CPU, too, 7 times as fast
        seed=schedule.seed,
        save_steps=schedule.save_steps,
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
    # one card a process: DataParallel would take batches of a multiple of batch_size, and losses call what it wraps
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Trainer(Trainer):
    def __init__(self, loss: Loss, watch: Watch, judge: Judge | None, **kwargs: Any) -> None:
        self.loss, self.watch, self.judge = loss, watch, judge
        super().__init__(compute_metrics=judge.metrics if judge is not None else None, **kwargs)
        self.remove_callback(PrinterCallback)
        if isinstance(self.args, _EachSaves):
            # shares average their gradients: accelerate is not to wrap them in DistributedDataParallel
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.watch.sampler or super()._get_train_sampler(train_dataset)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        value = model(self.loss, inputs)
        if not torch.isfinite(value):
            done = self.state.global_step
            what = (
                f"loss of training step {done + 1}"
                if model.training
                else f"validation loss after step {done}"
            )
            self.watch.refuse(what, done)
        self.watch.loss = value.detach()
        return (value, {}) if return_outputs else value

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """It is there already; Trainer's own copies shares."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return summed_up(super()._get_grad_norm(model, grad_norm))

    def get_decay_parameter_names(self, model: Any, **kwargs: Any) -> list[str]:
        """Matrices alone: the names by which Trainer knows biases and norms are not those of a `Trainee`."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        trainee: Any = self.model
        trainee.exchange()
        found = super().evaluation_loop(*args, **kwargs)
        trainee.exchange()
        return found

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():  # Trainer's own looks for labels
            if self.judge is not None:
                return None, model(self.judge.predict, inputs), inputs["labels"]
            return self.compute_loss(model, inputs).detach(), None, None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            chosen = optimizer or self.optimizer
            assert chosen is not None
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, self.watch.rate)
        return self.lr_scheduler
