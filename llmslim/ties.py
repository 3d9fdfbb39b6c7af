"""Weights that several modules share: stored once on disk, once in memory, known to transformers as tied.

A module that uses the weights of one in an earlier block has its name in the attribute `shared_with`. Biases are
each module's own: they are small, and what is shared fits better with them. The two dicts that transformers keeps
on a model, target -> source, follow from the attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def shared_modules(model: nn.Module) -> dict[str, str]:
    """Name of each module that uses another one's weights -> that one's name."""
    return {
        name: module.shared_with  # type: ignore[misc]
        for name, module in model.named_modules(remove_duplicate=False)
        if "shared_with" in module.__dict__
    }


def share(module: nn.Module, source: str) -> None:
    """Note that a module uses the weights of the module named `source`; `tie_shared` ties what is there."""
    module.__dict__["shared_with"] = source


def counterpart(name: str, shared: Mapping[str, str]) -> str | None:
    """The module whose weights the module `name`, shared or below a shared one, uses; None when it has its own."""
    owner, rest = name, ""
    while owner:
        if owner in shared:
            return shared[owner] + rest
        owner, _, leaf = owner.rpartition(".")
        rest = f".{leaf}{rest}"
    return None


def tie_shared(model: nn.Module, tell: bool = False) -> None:
    """Make shared parameters and buffers one in memory; again after whatever replaces a module.

    Args:
        tell: enter them into transformers' dicts, too, for loading and saving by it.

    Raises:
        AttributeError: a module and the one whose weights it uses are not built alike.
    """
    ties: dict[str, str] = {}
    shared = shared_modules(model)
    for target, source in shared.items():
        for path, module in model.get_submodule(source).named_modules():
            below = f".{path}" if path else ""
            here = model.get_submodule(target + below)
            if _shapes(here) != _shapes(module):
                raise AttributeError(f"{target}{below} is not built like {source}{below}")
            for leaf, parameter in module._parameters.items():
                if parameter is not None and leaf != "bias":
                    here._parameters[leaf] = parameter
                    ties[f"{target}{below}.{leaf}"] = f"{source}{below}.{leaf}"
            here._buffers.update(module._buffers)
    if tell and shared:
        _tell(model, [f"{target}." for target in shared], ties)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    """What a module shares, by leaf."""
    tensors = {**module._parameters, **module._buffers}
    return {leaf: tensor.shape for leaf, tensor in tensors.items() if tensor is not None and leaf != "bias"}


def replace_table(
    model: nn.Module,
    module: str,
    tied_head: str | None,
    table_of: Callable[[nn.Embedding], nn.Module],
    head_of: Callable[[nn.Module], nn.Module],
) -> None:
    """Replace the token embedding at `module`, and all that is tied to it, by modules that share parameters.

    Tied are the head, and in T5 the tables of encoder and decoder; transformers' map on the model says which.

    Raises:
        ValueError: it is no dense embedding.
    """
    table = model.get_submodule(module)
    if not isinstance(table, nn.Embedding):
        raise ValueError(f"{module} is no embedding")
    known = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {target.rpartition(".")[0] for target, source in known.items() if source == f"{module}.weight"}
    if tied_head is not None:
        tied.add(tied_head)
    source = table_of(table)
    put(model, module, source)
    names = [name for name, _ in source.named_parameters()]
    for name in sorted(tied):
        other = model.get_submodule(name)
        target = table_of(other) if isinstance(other, nn.Embedding) else head_of(other)
        put(model, name, target)
        for leaf in names:
            setattr(target, leaf, getattr(source, leaf))
        _tell(model, [f"{name}.weight"], {f"{name}.{leaf}": f"{module}.{leaf}" for leaf in names})


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _tell(model: Any, outdated: list[str], ties: dict[str, str]) -> None:
    """Enter ties, target -> source, into transformers' dicts, in place of those whose names begin so."""
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        known = dict(getattr(model, attribute, None) or {})
        kept = {key: value for key, value in known.items() if not key.startswith(tuple(outdated))}
        setattr(model, attribute, {**kept, **ties})
