"""What training leaves beside the model: its history as JSON lines, and curves for TensorBoard."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llmslim.files import write_atomically

TRAINING = "training.jsonl"
CURVES = "tensorboard"


def rewrite(log: Path, entries: Iterable[dict[str, Any]], replaces: Callable[[dict[str, Any]], bool]) -> None:
    """Put entries at the end of a .jsonl file, in the place of those that they replace; it is whole at any time."""
    kept = log.read_text().splitlines() if log.exists() else []
    others = [line for line in kept if not replaces(json.loads(line))]
    write_atomically(log, "\n".join([*others, *map(json.dumps, entries)]) + "\n")


def curves(folder: Path) -> Any | None:
    """TensorBoard's `SummaryWriter` into a folder, where that is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
