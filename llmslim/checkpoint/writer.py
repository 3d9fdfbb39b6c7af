"""Write a checkpoint part by part; join the parts and add config and tokenizer at the end."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.checkpoint.formats import Format
from llmslim.checkpoint.inventory import stored_tensors
from llmslim.checkpoint.plain import absorb
from llmslim.checkpoint.reader import plain_config, read_edits
from llmslim.edit import Edit
from llmslim.errors import UserError, first_line
from llmslim.files import damaged, put, sync_below
from llmslim.loaders.models import COMPANIONS, ModelFiles, model_class, skeleton
from llmslim.loaders.safetensors_io import concatenate, file_bytes, write_in_order

SHARD_BYTES = 5 * 10**9
_FOLDERS = ("additional_chat_templates", "kv_cache")


class CheckpointWriter:
    """Makes a checkpoint in `folder`, which may hold the parts of an earlier, unfinished run.

    Args:
        form: of packed weights.
        dtype: what dense floats are stored in.
    """

    def __init__(self, folder: Path, form: Format, dtype: torch.dtype) -> None:
        self.folder, self.form, self.dtype = Path(folder), form, dtype

    def write_outer(self, model: nn.Module) -> None:
        """Write everything outside the blocks, which must be filled; it becomes the first part."""
        self._write_model_part(0, model, None)

    def write_block(self, model: nn.Module, name: str, new_name: str | None = None) -> None:
        """Write the block of that name, which must be filled; under another one if blocks before it are dropped."""
        order = [block.name for block in Anatomy(model).blocks]  # type: ignore[arg-type]
        self._write_model_part(1 + order.index(name), model, name, new_name)

    def _write_model_part(
        self, index: int, model: nn.Module, prefix: str | None, new_prefix: str | None = None
    ) -> None:
        tensors = stored_tensors(model, self.form, prefix)
        if prefix is not None and new_prefix is not None:
            tensors = {new_prefix + name.removeprefix(prefix): entry for name, entry in tensors.items()}
        self.write_part(
            index,
            ((name, tensor.to(self.dtype) if dense and tensor.is_floating_point() else tensor)
             for name, (tensor, dense) in _aligned(tensors)),
        )  # fmt: skip

    def write_part(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write tensors, one in memory at a time, as part `index`; the file appears when it is whole."""
        path = self.folder / f"part-{index:05d}.safetensors"
        partial = path.with_suffix(".partial")
        write_in_order(partial, ((name, tensor.cpu()) for name, tensor in tensors))
        put(partial, path)

    def finish(self, source: ModelFiles, edits: Sequence[Edit]) -> None:
        """Join the parts to model.safetensors or shards, and add what else a checkpoint has.

        Args:
            source: the model that the parts were made from: its config (and its own edits, if it is
                compressed already), tokenizer, chat template and generation config go into the new one.
            edits: what was changed.
        """
        parts = sorted(self.folder.glob("part-*.safetensors"))
        if not (
            self.folder / "config.json"
        ).exists():  # else an earlier run was killed while it removed the parts
            self._join(parts)
            copy_metadata(source.folder, self.folder)
            self._write_config(source, [*read_edits(source)[1], *edits])
        for part in parts:
            part.unlink()

    def _join(self, parts: list[Path]) -> None:
        shards = _shards(parts)
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map: dict[str, str] = {}
        size = 0
        for name, members in zip(names, shards, strict=True):
            try:
                entries = concatenate(members, self.folder / name)
            except UserError as error:
                raise damaged(members[0], first_line(error).partition("; ")[0]) from error
            doubled = weight_map.keys() & entries.keys()
            assert not doubled, f"two parts hold {doubled}"
            weight_map.update(dict.fromkeys(entries, name))
            size += max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if len(shards) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            _write_json(self.folder / "model.safetensors.index.json", index)

    def _write_config(self, source: ModelFiles, edits: Sequence[Edit]) -> None:
        """Written last and at one stroke: a folder with a config.json has all the rest."""
        config = plain_config(source)
        config.dtype = self.dtype
        config.architectures = [model_class(config).__name__]
        if edits:
            config, rest = absorb(config, edits, skeleton(config))
            if rest:
                config.quantization_config = self.form.config(rest, skeleton(config), self.dtype)
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            config.save_pretrained(scratch)
            sync_below(self.folder)
            put(Path(scratch) / "config.json", self.folder / "config.json")


def weight_bytes(model: nn.Module, form: Format, dtype: torch.dtype) -> int:
    """Size of the weight file that a `CheckpointWriter` makes of a model, which may be on meta.

    Args:
        form: of packed weights.
        dtype: what dense floats are stored in.
    """
    parts = [None, *(block.name for block in Anatomy(model).blocks)]  # type: ignore[arg-type]
    return file_bytes(
        {
            name: (tuple(tensor.shape), dtype if dense and tensor.is_floating_point() else tensor.dtype)
            for part in parts
            for name, (tensor, dense) in _aligned(stored_tensors(model, form, part))
        }
    )


def _aligned(tensors: dict[str, tuple[Tensor, bool]]) -> list[tuple[str, tuple[Tensor, bool]]]:
    """Wide types first, so that every tensor of a part begins at a multiple of its item size."""
    return sorted(tensors.items(), key=lambda item: -item[1][0].dtype.itemsize)


def _shards(parts: list[Path]) -> list[list[Path]]:
    """Consecutive parts in groups of at most SHARD_BYTES; a part that is larger makes a group of its own."""
    groups: list[list[Path]] = [[]]
    size = 0
    for part in parts:
        own = part.stat().st_size
        if groups[-1] and size + own > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += own
    return groups


def copy_metadata(source: Path, folder: Path) -> None:
    """Copy what tokenizer and generation read, and the licence; nothing else that lies in the folder."""
    if source.resolve() == folder.resolve():
        raise UserError(f"The output {folder} is the folder that the model is read from; give another one.")
    chosen = {path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}
    for path in sorted(chosen):
        shutil.copyfile(path, folder / path.name)
    for name in _FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name, dirs_exist_ok=True)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
