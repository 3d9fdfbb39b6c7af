"""What a plain config can express: such edits go into its fields, and the checkpoint needs no llmslim for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from llmslim.anatomy import MLP, Anatomy, Experts
from llmslim.anatomy.parts import features
from llmslim.checkpoint.names import renamed_or_gone
from llmslim.edit import DropBlocks, Edit, replay
from llmslim.errors import UserError
from llmslim.loaders.models import skeleton

STRUCTURAL = (
    "narrow_mlp",
    "narrow_attention",
    "pool_kv_heads",
    "narrow_experts",
    "narrow_residual",
    "narrow_outer",
)
"""Edits that change sizes which a config may state."""

FIELDS = {
    "hidden": ("hidden_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "width": ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim", "d_ff"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_width": ("moe_intermediate_size", "intermediate_size"),
}
"""Size -> the fields that families state it in; the first that a config declares, as a field or an alias of one."""


def absorb(config: Any, edits: Sequence[Edit], model: PreTrainedModel) -> tuple[Any, list[Edit]]:
    """A config that says itself what edits of structure did, if it can, and the edits that remain.

    It can when all blocks came out alike and a model built from the changed config is the edited one: the same
    names and shapes, rotary tables and numbers of heads. Where the family derives head_dim from the number of
    heads (GPT-2, OPT, GPT-NeoX, BERT, RoBERTa, DistilBERT, ModernBERT) or its config refuses the number (Llama
    and Gemma unless it divides hidden_size), it cannot, and all edits remain. Dropped blocks always go into it;
    the edits that remain name the blocks as they are called then.

    Args:
        config: plain; not changed.
        model: a skeleton made from it, in front of the edits; not changed.

    Raises:
        UserError: the family's config cannot say that blocks are gone.
    """
    drops, edits = _drops_first(edits)
    if drops:
        config, model = _dropped(config, drops, model)
    structural = [edit for edit in edits if edit.kind in STRUCTURAL]
    if structural:
        edited = copy.deepcopy(model)
        replay(edited, structural)
        changed = _fitted(config, model, edited)
        if changed is not None and _makes(changed, edited):
            return changed, [edit for edit in edits if edit.kind not in STRUCTURAL]
    return config, list(edits)


def _drops_first(edits: Sequence[Edit]) -> tuple[list[DropBlocks], list[Edit]]:
    """One dropping of blocks for each stack, in front of the other edits, of which those on dropped blocks go."""
    drops: dict[str, DropBlocks] = {}
    rest: list[Edit] = []
    for edit in edits:
        if not isinstance(edit, DropBlocks):
            rest.append(edit)
            continue
        rest = [moved for other in rest if (moved := renamed_or_gone(other, edit.renamed)) is not None]
        before = drops.get(edit.stack)
        keep = tuple(before.keep[index] for index in edit.keep) if before else edit.keep
        drops[edit.stack] = DropBlocks(stack=edit.stack, keep=keep)
    return list(drops.values()), rest


def _dropped(config: Any, drops: list[DropBlocks], model: PreTrainedModel) -> tuple[Any, PreTrainedModel]:
    """Config and skeleton without the dropped blocks."""
    config, model = copy.deepcopy(config), copy.deepcopy(model)
    for drop in drops:
        drop.configure(config, len(model.get_submodule(drop.stack)))  # type: ignore[arg-type]
    replay(model, drops)
    if not _makes(config, model):
        raise UserError(
            f"The config of a {config.model_type} model cannot say that only the blocks {list(drops[0].keep)} of "
            f"{drops[0].stack} are there, so no checkpoint can: leave its layers as they are."
        )
    return config, model


def _fitted(config: Any, model: PreTrainedModel, edited: PreTrainedModel) -> Any | None:
    """A copy of the config with the sizes that the edits changed; None when blocks differ in one."""
    before, after = _sizes(model), _sizes(edited)
    changed = copy.deepcopy(config)
    for size, values in after.items():
        if values == before[size]:
            continue
        field = next((name for name in FIELDS[size] if _declares(config, name)), None)
        if len(values) != 1 or field is None:
            if size == "kv_heads" and field is None:  # as many as query heads
                continue
            return None
        if size in ("heads", "hidden"):  # many families derive it from these unless it is given
            changed.head_dim = Anatomy(edited).blocks[0].attention.head_dim
        setattr(changed, field, next(iter(values)))
    if Anatomy(model).tied and not Anatomy(edited).tied:
        changed.tie_word_embeddings = False
    return changed


def _declares(config: Any, field: str) -> bool:
    """Whether the family knows the field; a config.json may bring others along, which nothing reads."""
    return field in config.attribute_map or hasattr(type(config), field)


def _sizes(model: PreTrainedModel) -> dict[str, set[int]]:
    sizes: dict[str, set[int]] = {size: set() for size in FIELDS}
    for block in Anatomy(model).blocks:
        sizes["hidden"].add(features(block.attention.q.module)[1])
        for attention in (block.attention, block.cross_attention):
            if attention is not None:
                sizes["heads"].add(attention.num_heads)
                sizes["kv_heads"].add(attention.num_kv_heads)
        mlp = block.mlp
        if isinstance(mlp, MLP):
            sizes["width"].add(mlp.width)
        elif isinstance(mlp, Experts):
            sizes["experts"].add(mlp.num_experts)
            sizes["expert_width"].add(mlp.width)
    return sizes


def _makes(config: Any, edited: PreTrainedModel) -> bool:
    """Whether the config, read back from its JSON, makes the edited model."""
    try:
        made = skeleton(type(config).from_dict(config.to_dict()))
    except Exception:  # each family refuses sizes in its own way
        return False
    return _description(made) == _description(edited) and _same_buffers(made, edited)


def _description(model: PreTrainedModel) -> dict[str, Any]:
    """Shapes of parameters, and class and numbers of every module in the blocks, among them those of heads."""
    found: dict[str, Any] = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    for block in Anatomy(model).blocks:
        for name, module in block.module.named_modules(prefix=block.name):
            numbers = {key: value for key, value in vars(module).items() if type(value) in (int, float)}
            found[f"{name}:"] = (type(module), numbers)
    return found


def _same_buffers(made: PreTrainedModel, edited: PreTrainedModel) -> bool:
    """Whether the buffers are equal; the edited model may have some that none of its blocks reads any more."""
    buffers = dict(edited.named_buffers())
    return all(
        name in buffers and torch.equal(tensor, buffers[name]) for name, tensor in made.named_buffers()
    )
