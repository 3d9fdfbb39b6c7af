"""The work folder of a run: output is made beside its final place, and a killed run finds its way back."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from llmslim.errors import UserError
from llmslim.files import sync, sync_below, write_atomically

_LOCK = ".lock"
_YEAR = 365 * 24 * 3600


class Progress(Protocol):
    """Called as work goes on: what is being done, steps done, steps in all, and what else there is to tell."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None: ...


def silent(what: str, done: int, total: int, note: str = "") -> None:
    """A `Progress` that tells nobody."""


def duration(seconds: float) -> str:
    """3 s, 2 min 5 s, 1 h 12 min; years beyond one."""
    if seconds >= _YEAR:
        years = seconds / _YEAR
        return f"{years:.0f} years" if years < 1000 else "more than 1000 years"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, rest = divmod(whole, 3600)
    return f"{hours} h {rest // 60} min"


class WorkFolder:
    """`<output>.partial`: becomes `<output>` when whole.

    Attributes:
        path: where the files of the output are written.
        state: what is finished so far; `save()` writes it.
        resumed: whether an earlier run with the same fingerprint was found.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any], overwrite: bool = False) -> None:
        check_output(output, overwrite)
        if output.name in ("", ".."):  # "." and what ends in "..": they have no name to put another beside
            output = output.resolve()
        self.output = output
        self.path = output.with_name(output.name + ".partial")
        self.state: dict[str, Any] = {"fingerprint": fingerprint}
        self.resumed = False
        self._overwrite = overwrite
        self._lock: IO[str] | None = None
        saved = _read(self.path / "progress.json")
        if saved is not None or (self.path / _LOCK).exists():
            self._take()
        if saved is not None and saved.get("fingerprint") == fingerprint:
            self.state, self.resumed = saved, True
        elif saved is None and self.path.exists() and not _is_begun(self.path):
            raise UserError(
                f"{self.path}, where the output would be made, is there and is not an unfinished run: "
                "move it away, or name another --output."
            )
        elif saved is not None and not overwrite and _has_more(self.path):
            changed = _changes(saved.get("fingerprint", {}), fingerprint)
            raise UserError(
                f"{self.path} holds an unfinished run with another {' and '.join(changed)}: "
                "give the same options to finish it, --overwrite to discard it, or another --output."
            )
        else:
            shutil.rmtree(self.path, ignore_errors=True)
            self._lock = None

    def _take(self) -> None:
        """Have the folder, if it is there, to this process alone for as long as the object lives.

        Raises:
            UserError: another process has it.
        """
        if self._lock is not None or not self.path.is_dir():
            return
        try:
            import fcntl

            lock = open(self.path / _LOCK, "w")  # noqa: SIM115  open for as long as it is held
        except (ImportError, OSError):  # Windows; a folder that may not be written to, as will be told
            return
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: one that is killed lets go
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                return
            raise UserError(
                f"Another llmslim is at work in {self.path}: wait for it, or name another --output."
            ) from error
        self._lock = lock

    def save(self) -> None:
        """Write the state so that it is either the old or the new one, whenever the machine stops."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise UserError(
                f"{self.path}, where the output would be made, cannot be a folder: {error.strerror}; "
                "name another --output."
            ) from error
        write_atomically(self.path / "progress.json", json.dumps(self.state))

    @property
    def held(self) -> int:
        """Bytes of all that is there so far."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def scratch(self, name: str) -> Path:
        """A folder for files that are not part of the output."""
        folder = self.path / f".{name}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def finished(self) -> bool:
        """Whether all is done but `publish`, in which an earlier run was killed."""
        return "finished" in self.state

    def publish(self) -> Path:
        """Move the finished output to its place, in the stead of an older one if so asked."""
        old = self.output.with_name(
            self.state.setdefault("finished", f"{self.output.name}.old-{os.getpid()}")
        )
        sync_below(self.path)
        self.save()  # from here on a run that was killed has only this to do
        for leftover in self.path.glob(".*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != _LOCK:
                leftover.unlink()
        if self.output.exists():
            check_output(self.output, self._overwrite)
            os.replace(self.output, old)
        os.replace(self.path, self.output)
        sync(self.output.parent)
        _tidy(self.output)
        return self.output


def require_one_process() -> None:
    """Refuse to be one of several processes, which would each do the whole run."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size not in ("", "1"):
        raise UserError(
            f"WORLD_SIZE is {size}, as torchrun and accelerate set it for each of several processes, and llmslim "
            "starts its own: start it by itself (python -m llmslim), with --processes N to train on several GPUs."
        )


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, that would replace something that is no model, or that cannot be written.

    Raises:
        UserError: see above.
    """
    try:
        output.parent.joinpath(f"{output.name}.old-{os.getpid()}").lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long
        raise UserError(f"The output {output} cannot be made: {error.strerror}; name another one.") from error
    if output.is_symlink():  # what is renamed into its place would take the link's, not the folder's
        raise UserError(f"The output {output} is a link: name the folder {output.readlink()} itself.")
    _tidy(output)
    place = nearest_folder(output)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "which llmslim may not write to" if place.is_dir() else "which is a file"
        raise UserError(f"The output {output} would be made in {place}, {what}; name another one.")
    if not output.exists():
        return
    if not overwrite:
        raise UserError(
            f"The output {output} exists: name another folder, or give --overwrite to replace it."
        )
    if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").exists()):
        raise UserError(
            f"The output {output} is not a model folder, so it is not overwritten; name another one."
        )


def _tidy(output: Path) -> None:
    """Remove what `publish` has left when it was killed after its last move, and ends with."""
    state = output / "progress.json"
    old = (_read(state) or {}).get("finished")
    if not isinstance(old, str):
        return
    if re.fullmatch(re.escape(output.name) + r"\.old-\d+", old):  # who knows where the folder comes from
        shutil.rmtree(output.with_name(old), ignore_errors=True)
    (output / _LOCK).unlink(missing_ok=True)
    state.unlink()


def check_apart(output: Path, read: Sequence[Path]) -> None:
    """Refuse an output whose making would remove what the run reads from.

    Args:
        read: folders and files.

    Raises:
        UserError: one of them is the output or its work folder, or lies in it.
    """
    places = {output.resolve(), output.resolve().with_name(f"{output.resolve().name}.partial")}
    for path in read:
        if places & {path.resolve(), *path.resolve().parents}:
            raise UserError(
                f"The output {output} would replace {path}, which the run reads from; name another one."
            )


def nearest_folder(output: Path) -> Path:
    """The innermost of the folders around an output that is there already."""
    place = output.absolute().parent
    while not os.path.exists(place):  # False, too, of what lies in a folder that may not be looked into
        place = place.parent
    return place


def _is_begun(folder: Path) -> bool:
    """Whether nothing is there but the state that a run was killed while writing for the first time."""
    return folder.is_dir() and all(path.suffix == ".tmp" or path.name == _LOCK for path in folder.iterdir())


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of a fingerprint is another, in words; of versions, which."""
    changed = [key for key in now if before.get(key) != now[key]]
    then, today = before.get("versions"), now.get("versions")
    if "versions" not in changed or not isinstance(then, dict) or not isinstance(today, dict):
        return changed
    told = [
        f"version of {name} ({then.get(name, 'none')}, now {today.get(name, 'none')})"
        for name in dict.fromkeys([*then, *today])
        if then.get(name) != today.get(name)
    ]
    return [key for key in changed if key != "versions"] + told


def _has_more(folder: Path) -> bool:
    """Whether a run has left more than its state: it ended, or was killed, after its first pass had begun."""
    return any(path.is_file() and path.name not in ("progress.json", _LOCK) for path in folder.rglob("*"))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
