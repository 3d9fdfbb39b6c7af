"""From the module tree of a block to its parts: find each by its name, and check that the shapes agree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmslim.anatomy.family import SITES, Family
from llmslim.anatomy.parts import MLP, Attention, Experts, Projection, Side, features, is_matrix
from llmslim.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Roles = dict[str, dict[str, str]]
"""site -> role -> dotted name of the module in the model."""


def match_roles(model: nn.Module, block: str, family: Family) -> Roles:
    """The named modules of a block by site and role; a role that two modules claim is given to neither."""
    claims: dict[tuple[str, str], list[str]] = defaultdict(list)
    last = "\0"
    for path, _ in model.get_submodule(block).named_modules():
        if path.startswith(f"{last}."):  # the inside of a part, such as the two factors of a matrix
            continue
        if found := family.role_of(path):
            last = path
            claims[found].append(f"{block}.{path}")
    roles: Roles = {site: {} for site in SITES}
    for (site, role), names in claims.items():
        if len(names) == 1:
            roles[site][role] = names[0]
    if "experts" not in roles["experts"]:  # then what is called gate or router is something else
        roles["experts"], roles["shared_mlp"] = {}, {}
    return roles


def read_attention(model: PreTrainedModel, names: dict[str, str], family: Family, where: str) -> Attention:
    """The attention whose matrices have these names (role -> name).

    Heads are counted from the shapes and the width of one head, so that a pruned model is seen as it is.
    """
    fused = "qkv" in names
    _need(names, ("qkv", "o") if fused else ("q", "k", "v", "o"), f"{where} (attention)")
    name = names["qkv" if fused else "q"].rpartition(".")[0]
    module = model.get_submodule(name)
    head_dim = _head_dim(model, module, family)
    o = _projection(model, names["o"], "in")
    if fused:
        q, k, v = _split_qkv(
            _projection(model, names["qkv"], "out"), len(o.rows), head_dim, family.qkv_layout
        )
    else:
        q, k, v = (_projection(model, names[role], "out") for role in "qkv")
    rows = {role: len(p.rows) for role, p in (("q", q), ("k", k), ("v", v), ("o", o))}
    if (
        rows["q"] != rows["o"]
        or rows["k"] != rows["v"]
        or rows["k"] % head_dim
        or rows["q"] % max(rows["k"], 1)
    ):
        raise UserError(f"{name}: rows {rows} do not make whole heads of {head_dim}")
    is_causal = bool(getattr(module, "is_causal", False))
    return Attention(name, module, q, k, v, o, head_dim, names.get("position_bias"), is_causal)


def read_mlp(model: PreTrainedModel, names: dict[str, str], where: str) -> MLP:
    """The MLP whose matrices have these names (role -> name)."""
    _need(names, ("gate_up" if "gate_up" in names else "up", "down"), f"{where} (mlp)")
    down = _projection(model, names["down"], "in")
    gate = _projection(model, names["gate"], "out") if "gate" in names else None
    if "gate_up" in names:
        both = _projection(model, names["gate_up"], "out")
        gate, up = (Projection(both.name, both.module, rows, "out") for rows in both.rows.tensor_split(2))
    else:
        up = _projection(model, names["up"], "out")
    if any(len(part.rows) != len(down.rows) for part in (gate, up) if part):
        raise UserError(
            f"{where} (mlp): gate or up has another number of channels than down, {len(down.rows)}"
        )
    return MLP(up, gate, down)


def read_experts(model: PreTrainedModel, names: dict[str, str], shared: MLP | None, where: str) -> Experts:
    """The experts whose module and router have these names (role -> name)."""
    _need(names, ("experts", "router"), f"{where} (experts)")
    name = names["experts"]
    module = model.get_submodule(name)
    if isinstance(module, nn.ModuleList):  # unfused (llmslim.experts): one gate_up and one down per expert
        parts = [f"{index}.{part}" for index in range(len(module)) for part in ("gate_up", "down")]
        if not all(is_matrix(module.get_submodule(part)) for part in parts):
            raise UserError(f"{name}: its experts have no gate_up and down")
        width = features(module.get_submodule("0.down"))[1]
        top_k = model.config.num_experts_per_tok
        return Experts(name, module, None, None, len(module), top_k, width, names["router"], shared)
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        raise UserError(f"{name}: no 3-D parameters gate_up_proj and down_proj")
    num_experts, hidden, width = down.shape
    if tuple(gate_up.shape) != (num_experts, 2 * width, hidden):
        raise UserError(
            f"{name}: shapes {tuple(gate_up.shape)} and {tuple(down.shape)} are not [E, 2I, H], [E, H, I]"
        )
    top_k = model.config.num_experts_per_tok
    return Experts(
        name,
        module,
        f"{name}.gate_up_proj",
        f"{name}.down_proj",
        num_experts,
        top_k,
        width,
        names["router"],
        shared,
    )


def nearest(name: str, owners: Container[str]) -> str | None:
    """The longest dotted prefix of `name` (itself included) that is among `owners`."""
    while name and name not in owners:
        name = name.rpartition(".")[0]
    return name or None


def _need(names: dict[str, str], roles: tuple[str, ...], where: str) -> None:
    if missing := [role for role in roles if role not in names]:
        raise UserError(f"{where}: no {', '.join(missing)}")


def _projection(model: PreTrainedModel, name: str, side: Side) -> Projection:
    """All rows of one module."""
    module = model.get_submodule(name)
    if not is_matrix(module):
        raise UserError(f"{name}: a {type(module).__name__}, not a matrix")
    outputs, inputs = features(module)
    return Projection(name, module, _arange(outputs if side == "out" else inputs), side)


def _split_qkv(qkv: Projection, q_rows: int, head_dim: int, layout: str) -> list[Projection]:
    """The three shares of a fused matrix, rows in the order of heads."""
    total = len(qkv.rows)
    if layout == "per_head":
        shares = [share.reshape(-1) for share in qkv.rows.view(-1, 3, head_dim).unbind(1)]
    else:
        kv_rows = (total - q_rows) // 2
        shares = list(qkv.rows.split([q_rows, kv_rows, total - q_rows - kv_rows]))
    return [Projection(qkv.name, qkv.module, share, "out") for share in shares]


def _head_dim(model: PreTrainedModel, attention: nn.Module, family: Family) -> int:
    """What the attention module says, else what the config implies."""
    for name in family.head_dim:
        if isinstance(width := getattr(attention, name, None), int):
            return width
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _arange(end: int) -> Tensor:
    # On the CPU even for a model on meta: these are numbers to index with.
    return torch.arange(end, device="cpu")
