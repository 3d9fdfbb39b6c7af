"""Progress of long work on stderr: bars with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from llmslim.work import duration

if TYPE_CHECKING:
    from rich.progress import TaskID

EVERY = 10.0  # seconds between two lines where there is no terminal


class Bars:
    """One bar per kind of work, drawn by rich; use as a context manager and call as `Progress`."""

    def __init__(self, file: TextIO | None = None) -> None:
        from rich import progress
        from rich.console import Console

        self._bars = progress.Progress(
            progress.TextColumn("{task.description:>10}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}"),
            console=Console(file=file or sys.stderr),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, note=note)
        elif done < next(task.completed for task in self._bars.tasks if task.id == self._tasks[what]):
            self._bars.reset(self._tasks[what])  # the next of its kind: blocks, behind training
        self._bars.update(self._tasks[what], completed=done, total=total, note=note)


class Lines:
    """At most one line per `EVERY` seconds: what, how far, and the time left at the pace so far."""

    def __init__(self, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file or sys.stderr, clock
        self._last = clock()
        # when a kind of work was first heard of, how far it was then, and how far it is
        self._begun: dict[str, tuple[float, int, int]] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        now = self._clock()
        start, first, before = self._begun.get(what, (now, done, done))
        if done < before:  # the next of its kind: blocks, behind training
            start, first = now, done
        self._begun[what] = (start, first, done)
        if now - self._last < EVERY:
            return
        self._last = now
        left = ""
        if first < done < total:
            left = f", {duration((now - start) / (done - first) * (total - done))} left"
        told = f", {note}" if note else ""
        print(f"{what}: {done}/{total}{left}{told}", file=self._file, flush=True)


def progress_for(file: TextIO | None = None) -> Bars | Lines:
    """Bars for a terminal, lines for a log."""
    file = file or sys.stderr
    return Bars(file) if file.isatty() else Lines(file)
