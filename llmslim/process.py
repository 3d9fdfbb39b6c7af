"""Work in a process of its own: what is measured or loaded there is coloured by nothing that this one has done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


class ProcessFailed(RuntimeError):
    """A process of ours ended otherwise than it should; its last line on stderr says why."""


def run_module(module: str, *words: str, told: int | None = None) -> str:
    """Run `python -m module words`, with as many threads as this process and the llmslim of this process.

    Args:
        told: a file descriptor of this process, such as 2, for what it prints; kept when None.

    Returns:
        The last line that it printed, which is how a module gives its result (as JSON); "" when not kept.

    Raises:
        ProcessFailed: it did not end with code 0.
    """
    import torch

    root, before = (
        str(Path(__file__).parents[1]),
        os.environ.get("PYTHONPATH"),
    )  # llmslim may not be installed
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, [root, before]))}
    command = [sys.executable, "-m", module, *words]
    kept = subprocess.PIPE if told is None else told
    done = subprocess.run(command, stdout=kept, stderr=subprocess.PIPE, text=True, env=environment)
    if done.returncode != 0:
        killed = ", perhaps for want of memory" if done.returncode == -9 else ""
        died = f"it ended with code {done.returncode}{killed}"
        raise ProcessFailed((done.stderr.strip() or died).splitlines()[-1])
    return (done.stdout or "").strip().rpartition("\n")[2]
