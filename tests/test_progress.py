"""Progress: bars on a terminal, few lines with the time left elsewhere."""

from __future__ import annotations

import io

import pytest

from llmslim.progress import Bars, Lines, progress_for
from llmslim.work import duration


def test_lines_come_at_most_every_ten_seconds_with_the_time_left() -> None:
    now, out = [0.0], io.StringIO()
    with Lines(out, clock=lambda: now[0]) as lines:
        for second in range(41):
            now[0] = float(second)
            lines("gptq", second, 40)
    assert out.getvalue().splitlines() == [
        "gptq: 10/40, 30 s left",
        "gptq: 20/40, 20 s left",
        "gptq: 30/40, 10 s left",
        "gptq: 40/40",
    ]


def test_a_resumed_run_counts_only_what_it_does_itself() -> None:
    now, out = [0.0], io.StringIO()
    lines = Lines(out, clock=lambda: now[0])
    lines("gptq", 20, 30)
    now[0] = 10.0
    lines("gptq", 25, 30)
    assert out.getvalue() == "gptq: 25/30, 10 s left\n"


def test_blocks_behind_the_training_of_the_same_step_are_timed_anew() -> None:
    now, out = [0.0], io.StringIO()
    lines = Lines(out, clock=lambda: now[0])
    for at, done, total in ((0, 0, 100), (1000, 100, 100), (1000, 0, 30), (1010, 10, 30)):
        now[0] = float(at)
        lines("lora", done, total)
    assert out.getvalue().splitlines() == ["lora: 100/100", "lora: 10/30, 20 s left"]
    with Bars(io.StringIO()) as bars:
        bars("lora", 100, 100)
        bars("lora", 1, 30)
        (task,) = bars._bars.tasks
        assert (task.completed, task.total) == (1, 30) and task.elapsed < 1 and not task.finished


def test_what_else_there_is_to_tell_stands_at_the_end() -> None:
    now, out = [0.0], io.StringIO()
    lines = Lines(out, clock=lambda: now[0])
    lines("scales", 1, 30, "loss 0.5")
    now[0] = 10.0
    lines("scales", 2, 30, "loss 0.4")
    assert out.getvalue() == "scales: 2/30, 4 min 40 s left, loss 0.4\n"


def test_bars_count_each_kind_of_work() -> None:
    out = io.StringIO()
    with Bars(out) as bars:
        bars("scales", 1, 30, "loss 0.5")
        bars("gptq", 1, 30)
        bars("gptq", 30, 30)
        bars("evaluate", 2, 4)
    assert "30/30" in out.getvalue() and "2/4" in out.getvalue()
    assert "loss 0.5" in out.getvalue()


def test_a_terminal_gets_bars() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(progress_for(Terminal()), Bars)
    assert isinstance(progress_for(io.StringIO()), Lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min"),
        (125, "2 min 5 s"),
        (3600, "1 h 0 min"),
        (4320, "1 h 12 min"),
        (3.2e8, "10 years"),
        (1e300, "more than 1000 years"),
        (float("inf"), "more than 1000 years"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
