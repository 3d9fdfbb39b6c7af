"""Whether an adapter is there, and meets the weights that it was trained beside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from llmslim.errors import UserError
from llmslim.loaders.safetensors_io import SafetensorsFolder
from llmslim.recovery._files import AdapterConfig, read_adapter

if TYPE_CHECKING:
    from llmslim.loaders.models import ModelFiles

OWN, REST = "llmslim_base", "llmslim_rest"
"""In the metadata of an adapter's file: what the Linears that it is beside look like, and what the rest of the base."""
ROWS = 8  # of each matrix: enough to tell two models apart, of any size, in a moment
_ONE_VALUE = " one value"  # in the place of a digest


def seal(weights: SafetensorsFolder, linears: Iterable[str]) -> dict[str, str]:
    """What tells the weights below an adapter from others': two entries of JSON, tensor name -> type and digest.

    `OWN` is of the matrices of these Linears, in whatever form they are stored; `REST` of tables, norms, biases and
    other Linears, most of which packing and pruning leave as they are. There what is one value throughout, and
    tables of positions, which may be sinusoids, would say nothing: any model may have them.
    """
    names, entries = set(linears), weights.entries
    own = [
        name
        for name, entry in entries.items()
        if name.rpartition(".")[0] in names and len(entry["shape"]) == 2
    ]
    rest = [
        name
        for name, entry in entries.items()
        if name.endswith((".weight", ".bias")) and entry["dtype"] in ("F32", "F16", "BF16")
        if len(entry["shape"]) in (1, 2) and "position" not in name
    ]  # fmt: skip
    told = _digests(weights, set(rest).difference(own))
    telling = {name: digest for name, digest in told.items() if not digest.endswith(_ONE_VALUE)}
    return {OWN: json.dumps(_digests(weights, own)), REST: json.dumps(telling)}


def _digests(weights: SafetensorsFolder, names: Iterable[str]) -> dict[str, str]:
    """Of each tensor its type, and the digest of its first rows, or that they are one value."""
    digests: dict[str, str] = {}
    with weights.open() as get:
        for name in sorted(names):
            tensor = get(name)
            rows = (tensor[:ROWS] if tensor.ndim > 1 else tensor).contiguous()
            data = rows.view(torch.uint8).numpy().tobytes()
            constant = data == data[: rows.element_size()] * rows.numel()
            told = _ONE_VALUE if constant else f" {hashlib.sha256(data).hexdigest()[:16]}"
            digests[name] = f"{weights.entries[name]['dtype']}{told}"
    return digests


def require_base(adapter: Path, files: ModelFiles) -> str:
    """Refuse a model whose weights are others than those that the adapter was trained beside.

    Tensors are compared that both have, in the same type. Of the adapter's own Linears one that differs tells another
    base. Of the rest any may have been trained or rescaled since: another base is one where all of them differ.
    Adapters that llmslim did not make have at most the name of their base, by which none is refused.

    Returns:
        What is in doubt, in words; empty when nothing is.

    Raises:
        UserError: with the first that differs.
    """
    sealed = read_adapter(adapter)
    own, rest = (_compared(files.weights, sealed.entry(key)) for key in (OWN, REST))
    if own.others or (rest.others and not own.same + rest.same):
        first = (own.others or rest.others)[0]
        raise UserError(
            f"The adapter {adapter} was trained beside other weights than those of {files.base} ({first} differs): "
            "take the model that it was trained with."
        )
    if rest.others:
        return (
            f"{len(rest.others)} of {rest.same + len(rest.others)} norms, biases and other weights that could be "
            f"compared are not those that the adapter was trained beside: {rest.others[0]}"
        )
    return "" if own.same + rest.same else _doubt(sealed.config, files)


class _Compared(NamedTuple):
    """Tensors that a seal and a model have in the same type: how many are the same, and which are not."""

    same: int
    others: list[str]


def _compared(weights: SafetensorsFolder, sealed: dict[str, str]) -> _Compared:
    entries = weights.entries
    both = [n for n, told in sealed.items() if n in entries and told.startswith(f"{entries[n]['dtype']} ")]
    found = _digests(weights, both)
    others = [name for name in both if found[name] != sealed[name]]
    return _Compared(len(both) - len(others), others)


def _doubt(config: AdapterConfig, files: ModelFiles) -> str:
    """What the names say, where no weights could be compared."""
    from llmslim.lineage import line  # brings transformers, which help must not wait for

    named = config.base_model_name_or_path
    if not named:
        return "nothing in the adapter says which model it was trained beside"
    if any(_last(named) == _last(name) for name in line(files)):
        return ""
    return f"the adapter names {named} as its base, and {files.base} is not known to come from it"


def _last(name: str) -> str:
    """The last part of a Hub id or path: models move between owners and folders."""
    return Path(name).name.lower()


def public_name(base: str) -> str:
    """What an adapter calls its base: a Hub id as it is, of a folder or file its own name alone."""
    path = Path(base).expanduser()
    return path.resolve().name if path.exists() else base
