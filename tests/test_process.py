"""Processes of their own: what they print last, their threads, and how they end."""

import json
from pathlib import Path

import pytest
import torch

from llmslim.process import ProcessFailed, run_module

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
    ],
)
def test_a_process_that_fails_says_why(code: str, says: str, module) -> None:
    with pytest.raises(ProcessFailed) as failed:
        run_module(module(code))
    assert str(failed.value) == says


def test_what_it_prints_can_go_elsewhere(module, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_module(module("print('told')"), told=2) == ""
    assert capfd.readouterr().err == "told\n"
