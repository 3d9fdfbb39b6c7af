"""From a text's name to its rows: a Hub data set or a folder in its layout, a file, or the built-in text."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from llmslim.errors import UserError

FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")
BUILTIN_PARTS = ("calibration", "test")
CODE_PART = "code"
CODE_MODULES = ("textwrap", "heapq", "statistics", "configparser", "argparse")
BuiltinPart = Literal["calibration", "test"]


def load_rows(spec: str, builtin_part: BuiltinPart = "calibration") -> list[str]:
    """All rows of the text `spec`; `iter_rows` is the same without holding them all."""
    return list(iter_rows(spec, builtin_part))


def iter_rows(spec: str, builtin_part: BuiltinPart = "calibration") -> Iterator[str]:
    """Yield the rows of a text, reading no more of it than is asked for.

    `spec` is one of
    - `NAME[:CONFIG[:SPLIT]]`: a data set of the Hub or a local folder in its layout. What is left out is
      chosen when there is only one; a folder never touches the network.
    - a `.txt` file (one row), a `.jsonl` or `.parquet` file (one row each; see `text_column`).
    - `builtin[:PART]`: the text that every Python has (see `builtin_rows`). `builtin_part` is the part
      that a bare `builtin` means.

    A name that does not resolve raises `UserError` here, before the first row is asked for.
    """
    name, _, rest = spec.partition(":")
    if name == "builtin":
        return iter(builtin_rows(rest or builtin_part))
    path = Path(spec).expanduser()
    if path.suffix in FILE_SUFFIXES and not path.is_dir():
        return file_rows(path)
    return dataset_rows(spec)


def builtin_rows(part: str) -> list[str]:
    """The help topics of Python's own `pydoc`: English prose on the language, about 0.4 MB.

    `code` is source code out of Python's library instead.

    `calibration` and `test` take turns at the topics in alphabetical order. Topics quote each other, so a
    paragraph is kept only where it occurs first: the parts share none. The words differ between versions
    of Python; compare figures only where the sample's `data_hash` agrees.
    """
    from pydoc_data.topics import topics

    if part == CODE_PART:
        return [inspect.getsource(importlib.import_module(name)) for name in CODE_MODULES]
    if part not in BUILTIN_PARTS:
        raise UserError(
            f"the built-in text has no part {part!r}: it has {', '.join(BUILTIN_PARTS)} and {CODE_PART}"
        )
    seen: set[str] = set()
    rows: list[str] = []
    for number, topic in enumerate(sorted(topics)):
        paragraphs = [p for p in dict.fromkeys(topics[topic].strip().split("\n\n")) if p not in seen]
        seen.update(paragraphs)
        if paragraphs and BUILTIN_PARTS[number % 2] == part:
            rows.append("\n\n".join(paragraphs) + "\n\n")
    return rows


def text_column(row: dict[str, Any], spec: str) -> str:
    """The column to read, seen from one row: `text`, else the only one that holds a string."""
    if "text" in row:  # null, perhaps, in this row
        return "text"
    strings = [column for column, value in row.items() if isinstance(value, str)]
    if len(strings) == 1:
        return strings[0]
    raise UserError(
        f"{spec!r} has the columns {', '.join(row) or '(none)'}, of which {len(strings)} hold text, and none "
        "is called 'text': rename the one to read to 'text'"
    )


def _texts(rows: Iterable[dict[str, Any]], spec: str) -> Iterator[str]:
    """The text column of each row, chosen at the first row; a missing value is an empty row."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    column = text_column(first, spec)
    for number, row in enumerate(chain([first], rows), start=1):
        value = row.get(column)
        if not isinstance(value, str | None):
            raise UserError(
                f"row {number} of {spec!r} has {value!r} in its column {column!r}, which is no text"
            )
        yield value or ""


def file_rows(path: Path) -> Iterator[str]:
    """The rows of one `.txt`, `.jsonl` or `.parquet` file, read as UTF-8."""
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}: give a .txt, .jsonl or .parquet file that exists")
    if path.suffix == ".txt":
        return iter([path.read_text(encoding="utf-8", errors="replace")])
    read = _jsonl if path.suffix == ".jsonl" else _parquet
    return _texts(read(path), str(path))


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"line {number} of {str(path)!r} is not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise UserError(f'line {number} of {str(path)!r} is not an object such as {{"text": "..."}}')
            yield row


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{str(path)!r} is not a parquet file: {error}") from error
    with file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def dataset_rows(spec: str) -> Iterator[str]:
    """The text of each row of `NAME[:CONFIG[:SPLIT]]`; see `records`."""
    return _texts(records(spec), spec)


def records(spec: str) -> Iterable[dict[str, Any]]:
    """The rows of `NAME[:CONFIG[:SPLIT]]` with all columns, streamed: 300 GB cost only what is read of them.

    Offline, a Hub data set comes from the cache that `datasets.load_dataset` keeps.
    """
    import datasets

    name, config, split = _resolve(spec)
    from_cache = datasets.config.HF_HUB_OFFLINE and not Path(name).is_dir()
    return datasets.load_dataset(name, config, split=split, streaming=not from_cache)


def _resolve(spec: str) -> tuple[str, str, str]:
    """Name, config and split of a data set; what the spec leaves out is chosen when there is only one."""
    import datasets

    name, *wanted = spec.split(":")
    if len(wanted) > 2:
        raise UserError(f"{spec!r} has too many colons for a text: write NAME[:CONFIG[:SPLIT]]")
    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no folder {name!r}: give a folder in the Hub's layout, a file or a Hub id")
    once = datasets.DownloadConfig(max_retries=0)
    wanted_config, wanted_split = [*wanted, "", ""][:2]
    try:
        configs = datasets.get_dataset_config_names(name, download_config=once)
        config = _choose(wanted_config, configs, "config", spec)
        splits = datasets.get_dataset_split_names(name, config, download_config=once)
        return name, config, _choose(wanted_split, splits, "split", spec)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the text {name!r} was not found ({str(error).splitlines()[0]}): give a data set of the Hub, "
            "a folder in its layout, a .txt, .jsonl or .parquet file, or 'builtin'"
        ) from error


def _choose(wanted: str, present: list[str], kind: str, spec: str) -> str:
    if wanted in present:
        return wanted
    if not wanted and len(present) == 1:
        return present[0]
    problem = f"has no {kind} {wanted!r}" if wanted else f"leaves the {kind} open"
    raise UserError(
        f"{spec!r} {problem}: write NAME:CONFIG:SPLIT with the {kind} one of {', '.join(present)}"
    )
