"""A report as others may see it: of a path on this machine its last part is left."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

QUOTED = ("details", "samples")
"""Fields of a report whose strings are text of a data set or a model: no path is looked for in them."""
SYSTEM = ("/sys/", "/proc/", "/dev/", "/usr/")  # the same on every machine
PATH = re.compile(r"(?<![\w.:/<])~?(?:/[\w.@+~-]+){2,}/?")  # in a sentence; not in an address of the web


def published(report: dict[str, Any]) -> dict[str, Any]:
    """The report with every path cut to its last part."""
    return _mapped(report, cutter(report))


def cutter(report: dict[str, Any]) -> Callable[[str], str]:
    """A function that cuts the paths which the report names, and all below the home directory, in a text.

    A path counts if it is absolute or begins with ~ or `..`; one below the folder that the run was started in, such
    as out/smol-4bit, tells nothing of the machine.
    """
    found = {path for text in _strings(report) for path in _paths(text)}
    longest = sorted(found, key=len, reverse=True)  # a folder after what lies in it
    forms = {form: _last(path) for path in longest for form in (path, html.escape(path))}
    home = str(Path.home())
    below = re.compile(re.escape(home) + r"(?:[/\\][\w.@+~-]+)*[/\\]?") if len(home) > 1 else None

    def cut(text: str) -> str:
        for form, name in forms.items():
            # whole: not the beginning of another name, not the end of a longer path
            text = re.sub(rf"(?<![\w.]){re.escape(form)}(?![\w-])", name.replace("\\", r"\\"), text)
        return below.sub(lambda match: _last(match[0]), text) if below else text

    return cut


def _paths(text: str) -> Iterator[str]:
    whole = (
        text.partition(":")[0] if not re.match(r"[A-Za-z]:\\", text) else text
    )  # a text is PATH:CONFIG:SPLIT
    if (
        "\n" not in whole
        and len(whole) > 2
        and (Path(whole).is_absolute() or whole.startswith(("~/", "../")))
    ):
        yield whole
    yield from (path for path in PATH.findall(text) if not path.startswith(SYSTEM))


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "."


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in QUOTED:
                yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _mapped(value: Any, cut: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return cut(value)
    if isinstance(value, dict):
        return {key: _mapped(inner, cut) for key, inner in value.items()}
    return [_mapped(inner, cut) for inner in value] if isinstance(value, list) else value
