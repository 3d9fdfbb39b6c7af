"""Files that are whole, whenever the machine stops."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llmslim.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is either the old or the new one, whenever the machine stops."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, "utf-8")
    put(temporary, path)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    put(temporary, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """What `save_tensors` has kept in the work folder of a run.

    Raises:
        UserError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise damaged(path, f"{path}: {first_line(error)}") from error


def put(finished: Path, path: Path) -> None:
    """Give a file its name when its bytes are on the disk, and have the name there, too.

    What is written down next may say that the file is there: without this, a machine that stops can keep the one and
    lose the other.
    """
    sync(finished)
    os.replace(finished, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    if not path.is_dir():
        _fsync(path)
        return
    with suppress(OSError):  # Windows opens no folders, some network drives do not sync them
        _fsync(path)


def sync_below(folder: Path) -> None:
    """Have all in a folder on the disk, but what is hidden: a lock is gone when its file is opened and closed."""
    for path in folder.rglob("*"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.exists():
            sync(path)
    sync(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damaged(path: Path, why: str) -> UserError:
    """What to say when a file that an unfinished run has kept is not what was written."""
    work = next((folder for folder in path.parents if folder.name.endswith(".partial")), path.parent)
    return UserError(
        f"What the unfinished run has kept is damaged ({why}): remove {work} and give the same command again."
    )
