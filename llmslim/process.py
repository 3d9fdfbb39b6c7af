"""Work in processes of its own: one that is coloured by nothing that this one has done, or several that go together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any


class ProcessFailed(RuntimeError):
    """A process of ours ended otherwise than it should; its last line on stderr, or the code, says why."""


def run_module(module: str, *words: str, told: int | None = None) -> str:
    """Run `python -m module words`, with as many threads as this process and the llmslim of this process.

    Args:
        told: a file descriptor of this process, such as 2, for what it prints; kept when None.

    Returns:
        The last line that it printed, which is how a module gives its result (as JSON); "" when not kept.

    Raises:
        ProcessFailed: it did not end with code 0.
    """
    command = [sys.executable, "-m", module, *words]
    kept = subprocess.PIPE if told is None else told
    done = subprocess.run(command, stdout=kept, stderr=subprocess.PIPE, text=True, env=_environment())
    if done.returncode != 0:
        raise ProcessFailed(_reason(done.returncode, done.stderr))
    return (done.stdout or "").strip().rpartition("\n")[2]


def run_together(module: str, *words: str, processes: int, told: Callable[[Any], None]) -> None:
    """Run `python -m module words` several times at once, told apart by RANK and the like as torchrun sets them.

    They share this process's threads. When one fails, when `told` raises, and when this process ends, all end: a module
    begins with `end_with_starter()`.

    Args:
        told: called with each line that one of them prints, which is JSON.

    Raises:
        ProcessFailed: one of them did not end with code 0.
    """
    count = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    lines: SimpleQueue[tuple[int, str]] = SimpleQueue()  # of each process, at its end ""
    with ExitStack() as stack:
        running = []
        for rank in range(processes):
            own = {**_environment(processes), **count, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            child = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=own,
            )
            stack.callback(_end, child)
            running.append((child, errors))
            Thread(target=_pass_on, args=(rank, child.stdout, lines), daemon=True).start()
        left = processes
        while left:
            rank, line = lines.get()
            if line:
                told(json.loads(line))
                continue
            left -= 1
            child, errors = running[rank]
            if child.wait() != 0:
                errors.seek(0)
                raise ProcessFailed(_reason(child.returncode, errors.read()))


def end_with_starter() -> None:
    """Have this process end when the one that started it does, however that comes to its end."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def _environment(shared: int = 1) -> dict[str, str]:
    """What a process of ours starts with: the threads of this one, or a share, and its llmslim, installed or not."""
    import torch

    root, before = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")
    count = str(max(1, torch.get_num_threads() // shared))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), count)
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, [root, before]))}


def _reason(code: int, errors: str) -> str:
    killed = ", perhaps for want of memory" if code == -9 else ""
    said = "" if code < 0 else errors.strip()  # one that is killed says nothing of it: warnings, at most
    return (said or f"it ended with code {code}{killed}").splitlines()[-1]


def _pass_on(rank: int, printed: IO[str], lines: SimpleQueue[tuple[int, str]]) -> None:
    for line in printed:
        lines.put((rank, line))
    lines.put((rank, ""))


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()  # nothing where it has ended
    child.wait()
    for stream in (child.stdin, child.stdout):
        assert stream is not None
        stream.close()
