"""Processes of their own: what they print last, their threads, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from llmslim.process import ProcessFailed, run_module, run_together

SHOW = """
import json, os, sys
import llmslim.errors
print("before")
print(json.dumps([sys.argv[1:], os.environ["OMP_NUM_THREADS"], llmslim.__file__]))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(code: str) -> str:
        (tmp_path / "child.py").write_text(code)
        return "child"

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return write


def test_the_last_line_is_the_result(module) -> None:
    import llmslim

    words, threads, where = json.loads(run_module(module(SHOW), "a b", "c"))
    assert words == ["a b", "c"] and threads == str(torch.get_num_threads()) and where == llmslim.__file__


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ValueError('first\\nlast')", "last"),
        ("import sys; sys.exit(3)", "it ended with code 3"),
        ("import os; os.kill(os.getpid(), 9)", "it ended with code -9, perhaps for want of memory"),
        (
            "import os, warnings; warnings.warn('soon'); os.kill(os.getpid(), 9)",
            "it ended with code -9, perhaps for want of memory",
        ),
    ],
)
def test_a_process_that_fails_says_why(code: str, says: str, module) -> None:
    with pytest.raises(ProcessFailed) as failed:
        run_module(module(code))
    assert str(failed.value) == says


def test_what_it_prints_can_go_elsewhere(module, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_module(module("print('told')"), told=2) == ""
    assert capfd.readouterr().err == "told\n"


def test_processes_that_go_together_know_their_places(module) -> None:
    code = "import json, os; print(json.dumps([os.environ['RANK'], os.environ['WORLD_SIZE']]))"
    told: list[list[str]] = []
    run_together(module(code), processes=2, told=told.append)
    assert sorted(told) == [["0", "2"], ["1", "2"]]


@pytest.mark.parametrize(
    ("end", "says"), [("sys.exit(3)", "it ended with code 3"), ("raise ValueError('why')", "ValueError: why")]
)
def test_when_one_fails_all_end(end: str, says: str, module) -> None:
    code = f"import os, sys, time\nif os.environ['RANK'] == '1': {end}\ntime.sleep(600)"
    with pytest.raises(ProcessFailed) as failed:
        run_together(module(code), processes=3, told=print)
    assert str(failed.value) == says and not psutil.Process().children()


def test_processes_end_with_the_one_that_started_them(module) -> None:
    module(
        "import os, time\nfrom llmslim.process import end_with_starter\nend_with_starter()\n"
        "print(os.getpid(), flush=True)\ntime.sleep(600)"
    )
    code = "from llmslim.process import run_together\nrun_together('child', processes=2, told=print)"
    with subprocess.Popen([sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        running = [int(starter.stdout.readline()) for _ in range(2)]
        assert all(psutil.pid_exists(pid) for pid in running)
        os.kill(starter.pid, signal.SIGKILL)
        ends = time.monotonic() + 30
        while any(psutil.pid_exists(pid) for pid in running) and time.monotonic() < ends:
            time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in running)
