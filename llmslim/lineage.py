"""What a model was made from, as its report tells, and which of that is uncompressed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmslim.errors import UserError
from llmslim.loaders.models import ModelFiles, find
from llmslim.step import STEPS, load_steps

TRAINS = ("recover", "distill", "finetune")
"""The verbs whose steps make no model smaller."""


def uncompressed(base: ModelFiles, otherwise: str = "") -> ModelFiles:
    """The nearest model that nothing has compressed in the line that `base` comes from, itself first.

    A model's line is what its report tells: what it was made from, what that was made from, and so on.

    Args:
        otherwise: what else would do, for the message: ", or ...".

    Raises:
        UserError: it is not there.
    """
    model, seen = base, {base.folder.resolve()}
    whole: ModelFiles | None = None  # since which, seen from above, nothing was compressed
    while (made := _making(model)) is not None:
        origin, revision, compressed = made
        whole = None if compressed else whole or model
        try:
            above = find(origin, revision)
            if above.folder.resolve() in seen:
                raise UserError(f"{origin} was overwritten by what was made from it")
        except UserError as error:
            if whole is not None:  # as far as is known
                return whole
            raise UserError(
                f"{base.spec} was made from {origin!r}, which is not here to distill from: name it with "
                f"--teacher{otherwise}."
            ) from error
        model = above
        seen.add(model.folder.resolve())
    return whole or model


def line(files: ModelFiles) -> set[str]:
    """Names of a model and of those that it comes from, as far as reports on this machine tell."""
    names, seen = {files.spec, files.base}, set[Path]()
    folders = [files.folder, Path(files.base).expanduser()]
    while folders:
        folder = folders.pop().resolve()
        if folder in seen:
            continue
        seen.add(folder)
        try:
            base = json.loads((folder / "report.json").read_text("utf-8"))["base"]
            above = {_origin(base), str(base["model"])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        names |= above
        folders += [Path(name).expanduser() for name in above]
    return names


def _making(files: ModelFiles) -> tuple[str, str | None, bool] | None:
    """What a model was made from, its revision, and whether the making compressed; None where no report tells."""
    try:
        report = json.loads((files.folder / "report.json").read_text("utf-8"))
        base, steps = report["base"], report["recipe"]["steps"]
        origin, revision = _origin(base), base.get("revision")
        kinds = [next(iter(step)) for step in steps]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None
    load_steps()
    return origin, revision, any(kind not in STEPS or STEPS[kind].verb not in TRAINS for kind in kinds)


def _origin(base: dict[str, Any]) -> str:
    """What can be asked for, of a report's record of the base: its place on this machine, or its name.

    Names below the folder that the run was started in would mean another model in another folder.
    """
    path = base.get("path")
    return path if isinstance(path, str) and Path(path).is_absolute() else str(base["spec"])
