"""How long and how fast to train, and what watches that it goes well."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llmslim.errors import UserError
from llmslim.files import sync_below, write_atomically
from llmslim.history import rewrite
from llmslim.memory import resident_bytes
from llmslim.ranks import agreed, all_here, first, of_all
from llmslim.training.batches import ByLength

_SIZES = "sizes.json"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)$")


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
    ema: float = 0.0


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _checkpoints(folder: Path) -> dict[int, Path]:
    """By the steps that they are of, whole or not."""
    return {int(match[1]): place for place in folder.glob("*") if (match := _CHECKPOINT.match(place.name))}


def _whole(folder: Path) -> set[int]:
    """The steps that there are checkpoints of to go on from."""
    return {step for step, place in _checkpoints(folder).items() if _is_whole(place)}


def resumed(folder: Path, own: bool) -> str | None:
    """The checkpoint to go on from, or None; newer ones, which a kill or a fault left half written, are removed.

    Of several processes each goes on from the same step. All must ask.

    Args:
        own: whether each process has a folder to itself; without, there is one for all, which the first tidies.
    """
    step = max(set.intersection(*of_all(_whole(folder))), default=0)
    if own or first():
        for other, place in _checkpoints(folder).items():
            if other > step:
                shutil.rmtree(place)
    all_here()
    return str(_checkpoint(folder, step)) if step else None


def _vouch(place: Path) -> None:
    """Have a finished checkpoint on the disk, and then its list of files, by which it is known to be whole."""
    sync_below(place)
    sizes = {path.name: path.stat().st_size for path in place.iterdir()}
    write_atomically(place / _SIZES, json.dumps(sizes))


def _is_whole(place: Path) -> bool:
    """Whether all files of a checkpoint are there, as large as they were written."""
    try:
        sizes = json.loads((place / _SIZES).read_text())
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


class Watch(TrainerCallback):
    """Stops by time, refuses what is not finite, tells how far it is, and keeps the log."""

    def __init__(
        self,
        schedule: Schedule,
        steps: int,
        tokens: int,
        checkpoints: Path,
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
        self.sampler: ByLength | None = None
        self._place, self._clock, self._checkpoints = scratch.name, scratch / "elapsed.json", checkpoints
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
            spent = agreed(self.elapsed) / (60 * self.schedule.max_minutes)
            done, begun = max(done, spent), max(begun, spent / max(self.schedule.warmup, 1e-9))
        return min(1.0, begun) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def refuse(self, what: str, step: int) -> None:
        """Stop for a loss or gradient that is not finite, after so many steps.

        A checkpoint of these very weights is no good one: the newest before is named.
        """
        kept = max((whole for whole in _whole(self._checkpoints) if whole < step), default=0)
        where = (
            f"; the last good checkpoint is kept as {_checkpoint(self._checkpoints, kept)}"
            if kept
            else ", before its first good checkpoint"
        )
        raise UserError(
            f"{self.schedule.name}: the {what} is not finite, so training stopped{where}. "
            f"Try a lower lr than {self.schedule.lr:g}, into another --output."
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun, self._first = time.monotonic(), state.global_step
        if not first():  # each drops out, and masks, in its own way; what resumes has its own state
            torch.manual_seed(self.schedule.seed + int(args.process_index))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.sampler is not None:  # Trainer does not reach it where batches are shared out
            self.sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if self.schedule.dtype == torch.float16:
            return  # its loss scaling finds its size by overflows, and leaves such steps out
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):  # cheaper than to ask each element
            self.refuse(f"gradient of training step {state.global_step + 1}", state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].average(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pace, left = self._pace(state.global_step)
        total = self.steps if self.schedule.max_minutes is None else round(state.global_step + left * pace)
        told = f"loss {self.loss:.4g}, {pace * self.tokens:.0f} tokens/s, {resident_bytes() / 1e6:,.0f} MB"
        self.progress(state.global_step, total, told + self._judged(state))
        limit = self.schedule.max_minutes
        if limit is not None and agreed(self.elapsed) > 60 * limit:
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
        place = _checkpoint(self._checkpoints, state.global_step)
        if not first() and args.should_save:  # of shares
            _vouch(place)
        all_here()  # each has written what it has to: shares, or the state of its own random numbers
        if first():
            _vouch(place)
            write_atomically(self._clock, json.dumps(self.elapsed))
        all_here()  # not before one goes that another may have to go on from
        if args.should_save:
            self._rotate(state.best_model_checkpoint)

    def _rotate(self, best: str | None) -> None:
        """Keep the newest checkpoint, and the best one or else the one before."""
        older = [place for _, place in sorted(_checkpoints(self._checkpoints).items())][:-1]
        kept = [place for place in older if best and place.name == Path(best).name] or older[-1:]
        for place in older:
            if place not in kept:
                shutil.rmtree(place)

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
        if not first():
            return
        own = ({"pass": self._place, "method": self.schedule.name, **entry} for entry in state.log_history)
        rewrite(self.log, own, lambda entry: entry["pass"] == self._place)
