"""Read and write safetensors files tensor by tensor, so that memory never holds a whole file."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmslim.errors import UserError, first_line

_CHUNK = 16 * 2**20


def header(path: Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file (without metadata), and where its data begins, in bytes.

    Raises:
        UserError: the file is cut off or is not safetensors, or the header does not describe its data.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, 100_000_000):
            raise UserError(
                f"{path} is not a whole safetensors file ({size} bytes); download or save it again."
            )
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            parts = [(entry["dtype"], entry["shape"], entry["data_offsets"]) for entry in entries.values()]
            end = max((int(offsets[1]) for _, _, offsets in parts), default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} has a damaged header; download or save it again.") from error
    if 8 + length + end != size:
        raise UserError(f"{path} is cut off: {size} of {8 + length + end} bytes; download or save it again.")
    with _opened(path):  # checks names, types, shapes and places of all tensors against one another
        return entries, 8 + length


def _opened(path: Path) -> Any:
    """The file as safetensors opens it."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(
            f"{path} has a damaged header ({first_line(error)}); download or save it again."
        ) from error


def write_in_order(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors that come one at a time to one file, holding one in memory.

    The header, which comes first in the file, is known only at the end: the data waits in a file beside it.
    """
    body = path.with_suffix(".data")
    entries: dict[str, dict] = {}
    offset = 0
    with open(body, "wb") as file:
        for name, tensor in tensors:
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            entries[name] = {
                "dtype": CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + len(data)],
            }
            file.write(data.data)
            offset += len(data)
    with open(path, "wb") as file, open(body, "rb") as data_file:
        file.write(_header(entries))
        shutil.copyfileobj(data_file, file, _CHUNK)
    body.unlink()


def concatenate(parts: list[Path], path: Path) -> dict[str, dict]:
    """Join safetensors files into one by copying bytes; returns the header entries of the whole."""
    entries: dict[str, dict] = {}
    offset = 0
    for part in parts:
        part_entries, _ = header(part)
        size = max((e["data_offsets"][1] for e in part_entries.values()), default=0)
        for name, entry in part_entries.items():
            start, end = entry["data_offsets"]
            entries[name] = {**entry, "data_offsets": [start + offset, end + offset]}
        offset += size
    with open(path, "wb") as file:
        file.write(_header(entries))
        for part in parts:
            _, begin = header(part)
            with open(part, "rb") as part_file:
                part_file.seek(begin)
                shutil.copyfileobj(part_file, file, _CHUNK)
    return entries


def file_bytes(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Size of one file with tensors of these shapes and types, in this order."""
    entries, offset = {}, 0
    for name, (shape, dtype) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    return len(_header(entries)) + offset


def _header(entries: dict[str, dict]) -> bytes:
    """What stands in front of the data."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins aligned, as the format asks
    return struct.pack("<Q", len(text)) + text


class SafetensorsFolder:
    """The tensors of a model's folder, by name; nothing is read until asked for.

    They are in model.safetensors, or in the files that model.safetensors.index.json names, as for transformers.

    Attributes:
        entries: name -> {"dtype", "shape", "file"} of every tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, dict] = {}
        self._same: dict[tuple[str, str], bool] = {}
        for name in weight_files(folder):
            path = folder / name
            if path.parent != folder or not path.exists():
                raise UserError(f"{folder} lacks the weight file {name} that its index names.")
            for key, entry in header(path)[0].items():
                if entry["dtype"] not in DTYPES:
                    raise UserError(
                        f"{path} has the tensor {key} of type {entry['dtype']}, and llmslim reads {', '.join(DTYPES)}; "
                        "save it as one of these."
                    )
                self.entries[key] = {"dtype": entry["dtype"], "shape": entry["shape"], "file": name}

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return sum(map(entry_bytes, self.entries.values()))

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are equal; they are read once, as tables of words are large and a run asks often."""
        if (one, other) not in self._same:
            with self.open() as get:
                self._same[one, other] = bool(get(one).equal(get(other)))
        return self._same[one, other]

    @contextmanager
    def open(self) -> Iterator:
        """A reader `get(name) -> Tensor` whose file maps are closed at the end: copy what must outlive it."""
        handles: dict[str, Any] = {}

        def get(name: str) -> Tensor:
            file = self.entries[name]["file"]
            if file not in handles:
                handles[file] = _opened(self.folder / file)
            return handles[file].get_tensor(name)

        try:
            yield get
        finally:
            handles.clear()


def weight_files(folder: Path) -> list[str]:
    """The files that hold a model's weights, as transformers chooses them; empty when there are none."""
    return ["model.safetensors"] if (folder / "model.safetensors").exists() else indexed_files(folder)


def indexed_files(folder: Path) -> list[str]:
    """What the folder's index names; empty without one.

    Raises:
        UserError: it is damaged, or names files of another kind.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    try:
        names: set[str] = set(json.loads(index.read_text())["weight_map"].values())
        if all(name.endswith(".safetensors") for name in names):
            return sorted(names)
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise UserError(f"{index} does not name safetensors files; download or save it again.")


def entry_bytes(entry: dict) -> int:
    """Size of a tensor by its entry in a header."""
    return DTYPES[entry["dtype"]].itemsize * math.prod(entry["shape"])


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "U64": torch.uint64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
CODES = {dtype: name for name, dtype in DTYPES.items()}
