"""Reading report.json, of this version and of older ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmslim.errors import UserError

SCHEMA_VERSION = 2
"""2 added: files (hashes of what was verified), size.*.parts, details, speed.*.samples. 1 is read all the same:
what it has not is left out."""
NEEDED = ("base", "recipe", "format", "linears", "notes", "size", "quality", "speed", "run", "environment")


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a finished run.

    Raises:
        UserError: the folder has none, or one that is damaged or of a version that cannot be read.
    """
    path = folder / "report.json"
    if not folder.is_dir() or not path.is_file():
        raise UserError(f"{folder} is no run: name the --output folder of one, which has a report.json.")
    try:
        report = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is no JSON. Run again.") from error
    version = report.get("schema_version") if isinstance(report, dict) else None
    if not isinstance(version, int) or version < 1:
        raise UserError(
            f"{path} is no report of llmslim: its schema_version is {version!r}, not a number from 1 to "
            f"{SCHEMA_VERSION}."
        )
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema {version} and this llmslim reads up to {SCHEMA_VERSION}: update llmslim to read it."
        )
    lacking = [key for key in NEEDED if key not in report]
    if lacking:
        raise UserError(f"{path} is damaged: it lacks {lacking[0]}. Run again.")
    return {
        "calibration": None,
        "plan": None,
        "steps": None,
        "verification": {"ok": None, "checks": []},
        **report,
    }
