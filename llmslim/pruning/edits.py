"""The edits of pruning: blocks with fewer MLP channels, attention heads or experts.

An edit notes how many stay, which is all that a skeleton needs; `narrow_mlp`, `narrow_attention` and
`narrow_experts` take which ones stay, slice the weights of a block, and return the edit. A narrowed block gives
exactly what it gave with the others masked, and one whose KV heads `pool_kv_heads` pooled what it gave with each of
them at its group's mean. A packed or factored matrix cannot be sliced: prune first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from llmslim.anatomy import MLP, Anatomy, Attention, Block, Experts
from llmslim.anatomy.parts import Projection, Side, dense_weight, is_conv1d, is_linear
from llmslim.edit import Edit
from llmslim.experts import UnfusedExperts
from llmslim.pruning._position_bias import choose_bias_columns, takes_position_bias

_HEADS = ("num_heads", "n_heads", "num_attention_heads")
_WIDTHS = ("split_size", "dim", "all_head_size", "inner_dim")
"""What attention modules call their number of query heads, and that times the width of a head."""


class NarrowMLP(Edit):
    """The MLP of a block has `width` channels."""

    kind: ClassVar[str] = "narrow_mlp"
    block: str
    width: int = Field(gt=0)

    def apply(self, model: nn.Module) -> None:
        block = _block(model, self.block)
        narrow_mlp(block, _first(f"{self.block}: channels", self.width, _mlp(block).width))


class NarrowAttention(Edit):
    """The attention (or the cross-attention) of a block has `heads` query heads and `kv_heads` KV heads.

    Attributes:
        kept: which query heads stay; noted only where the position bias of all heads is handed from block to
            block (T5), and each must take the columns of its own.
    """

    kind: ClassVar[str] = "narrow_attention"
    block: str
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    cross: bool = False
    kept: tuple[int, ...] | None = None

    def apply(self, model: nn.Module) -> None:
        block = _block(model, self.block)
        attention = _attention(block, self.cross)
        first = _first(f"{attention.name}: KV heads", self.kv_heads, attention.num_kv_heads)
        run = attention.num_heads // attention.num_kv_heads
        if self.heads % self.kv_heads or self.heads // self.kv_heads > run:
            raise ValueError(
                f"{self.heads} heads cannot read {self.kv_heads} KV heads in runs of at most {run}"
            )
        heads = first[:, None] * run + _numbers(self.heads // self.kv_heads)
        kept = heads.reshape(-1) if self.kept is None else torch.tensor(self.kept, device="cpu")
        if narrow_attention(block, kept, self.cross) != self:
            raise ValueError(f"heads {self.kept} are not {self.heads} with {self.kv_heads} KV heads")


class PoolKVHeads(Edit):
    """The attention of a block has `kv_heads` KV heads, each in the place of equally many; queries stay."""

    kind: ClassVar[str] = "pool_kv_heads"
    block: str
    kv_heads: int = Field(gt=0)

    def apply(self, model: nn.Module) -> None:
        pool_kv_heads(_block(model, self.block), self.kv_heads)


class NarrowExperts(Edit):
    """A block has `experts` experts of `width` channels each; None: as many as before."""

    kind: ClassVar[str] = "narrow_experts"
    block: str
    experts: int | None = Field(None, gt=0)
    width: int | None = Field(None, gt=0)

    def apply(self, model: nn.Module) -> None:
        block = _block(model, self.block)
        before = _experts(block)
        stay = _numbers(before.num_experts)
        if self.experts is not None:
            stay = _first(f"{before.name}: experts", self.experts, before.num_experts)
        channels = None
        if self.width is not None:
            channels = [_first(f"{before.name}: channels", self.width, before.width)] * len(stay)
        narrow_experts(block, stay, channels)


@torch.no_grad()
def narrow_mlp(block: Block, keep: Tensor) -> NarrowMLP:
    """Keep some channels of a block's MLP: rows of gate and up with their biases, columns of down.

    Args:
        block: dense, on meta or filled; changed in place.
        keep: int64 [width], ascending, the channels that stay.

    Raises:
        ValueError: the block has no dense MLP, or `keep` does not fit it.
    """
    mlp = _mlp(block)
    keep = _checked(f"{block.name}: channels", keep, mlp.width)
    parts = [part for part in (mlp.gate, mlp.up, mlp.down) if part is not None]
    _slice([(part, part.rows[keep]) for part in parts])
    parent = block.model.get_submodule(mlp.down.name.rpartition(".")[0])
    _set_numbers(parent, ("intermediate_size",), len(keep))
    return NarrowMLP(block=block.name, width=len(keep))


@torch.no_grad()
def narrow_attention(block: Block, heads: Tensor, cross: bool = False) -> NarrowAttention:
    """Keep some query heads of a block, and the KV heads that one of them reads.

    Rows of q, k and v with their biases and columns of o go, and what the module remembers of its heads is set.

    Args:
        block: dense, on meta or filled; changed in place.
        heads: int64 [n], ascending, the query heads that stay; equally many of each KV head that stays.
        cross: the cross-attention instead.

    Raises:
        ValueError: the attention is not dense, or `heads` does not fit it.
    """
    attention = _attention(block, cross)
    heads = _checked(f"{attention.name}: heads", heads, attention.num_heads)
    kv_heads, readers = (heads // len(attention.readers(0))).unique(return_counts=True)
    if len(readers.unique()) > 1:
        raise ValueError(
            f"{attention.name}: heads {heads.tolist()} leave {readers.tolist()} readers to KV heads "
            f"{kv_heads.tolist()}; each KV head that stays needs equally many"
        )
    _check_parameters(attention)
    stay = ((attention.q, heads), (attention.k, kv_heads), (attention.v, kv_heads), (attention.o, heads))
    _slice([(part, part.rows.reshape(-1, attention.head_dim)[chosen].reshape(-1)) for part, chosen in stay])
    _set_heads(attention, len(heads), len(kv_heads))
    kept = None
    if takes_position_bias(attention.module):
        kept = tuple(heads.tolist())
        choose_bias_columns(attention.module, kept, attention.num_heads)
    return NarrowAttention(block=block.name, heads=len(heads), kv_heads=len(kv_heads), cross=cross, kept=kept)


@torch.no_grad()
def pool_kv_heads(block: Block, kv_heads: int) -> PoolKVHeads:
    """Put the mean of each group of consecutive KV heads in its place: rows of k and v, with their biases.

    Args:
        block: dense, on meta or filled; changed in place.
        kv_heads: how many there will be, a divisor of how many there are.

    Raises:
        ValueError: the attention is not dense, or `kv_heads` does not divide its KV heads.
    """
    attention = block.attention
    if attention.num_kv_heads % kv_heads:
        raise ValueError(
            f"{attention.name}: {attention.num_kv_heads} KV heads cannot be pooled into {kv_heads}"
        )
    _check_parameters(attention)
    firsts = []
    for part in (attention.k, attention.v):
        _check_linear(part)
        rows = part.rows.view(kv_heads, -1, attention.head_dim)
        firsts.append((part, rows[:, 0].reshape(-1)))
        for tensor in (dense_weight(part.module), cast("Tensor | None", part.module.bias)):
            if tensor is not None:
                rows = rows.to(tensor.device)
                tensor[rows[:, 0]] = tensor[rows].float().mean(1).to(tensor.dtype)
    _slice([(attention.q, attention.q.rows), *firsts])  # q: it may share their module
    _set_heads(attention, attention.num_heads, kv_heads)
    return PoolKVHeads(block=block.name, kv_heads=kv_heads)


@torch.no_grad()
def narrow_experts(
    block: Block, experts: Tensor | None = None, channels: Sequence[Tensor] | None = None
) -> NarrowExperts:
    """Keep some experts of a block, with their rows of the router, or some channels of each, or both.

    Args:
        block: on meta or filled, experts fused or unfused; changed in place. The shared expert is left alone.
        experts: int64 [n], ascending, those that stay; None: all.
        channels: for each expert that stays int64 [width], ascending, its channels that stay; None: all.

    Raises:
        ValueError: the block has no experts, fewer would stay than a token goes to, or it does not fit.
    """
    before = _experts(block)
    stay = _numbers(before.num_experts) if experts is None else experts
    stay = _checked(f"{before.name}: experts", stay, before.num_experts)
    if len(stay) < before.top_k:
        raise ValueError(f"{before.name}: each token goes to {before.top_k} experts, {len(stay)} are too few")
    if channels is not None:
        channels = [_checked(f"{before.name}: channels", keep, before.width) for keep in channels]
        if len(channels) != len(stay) or len({len(keep) for keep in channels}) != 1:
            raise ValueError(f"{before.name}: channels must be given for each expert, equally many")
    router = block.model.get_submodule(before.router)
    if foreign := [name for name, t in _own_tensors(router).items() if t.shape[:1] != (before.num_experts,)]:
        raise ValueError(f"{before.router}: {', '.join(foreign)} has no row per expert")
    if isinstance(before.module, UnfusedExperts):
        _narrow_unfused(before, stay, channels)
    else:
        _narrow_fused(before, stay, channels)
    for name, tensor in _own_tensors(router).items():
        _put(router, name, _select(tensor, 0, stay))
    for module in (router, before.module, block.model.get_submodule(before.name.rpartition(".")[0])):
        _set_numbers(module, ("num_experts", "out_features"), len(stay))
    return NarrowExperts(
        block=block.name,
        experts=None if experts is None else len(stay),
        width=None if channels is None else len(channels[0]),
    )


def _narrow_fused(experts: Experts, stay: Tensor, channels: list[Tensor] | None) -> None:
    """gate_up_proj [E, 2I, H] (gate rows, then up rows) and down_proj [E, H, I]."""
    gate_up, down = cast(Tensor, experts.module.gate_up_proj), cast(Tensor, experts.module.down_proj)
    if channels is None:
        gate_up, down = _select(gate_up, 0, stay), _select(down, 0, stay)
    else:
        pairs = list(zip(stay.tolist(), channels, strict=True))
        both = [torch.cat([keep, keep + experts.width]) for keep in channels]
        gate_up = torch.stack(
            [_select(gate_up[e], 0, rows) for (e, _), rows in zip(pairs, both, strict=True)]
        )
        down = torch.stack([_select(down[e], 1, keep) for e, keep in pairs])
        _set_numbers(experts.module, ("intermediate_dim", "intermediate_size"), len(channels[0]))
    _put(experts.module, "gate_up_proj", gate_up)
    _put(experts.module, "down_proj", down)


def _narrow_unfused(experts: Experts, stay: Tensor, channels: list[Tensor] | None) -> None:
    """A list of `Expert`s, each with Linears gate_up and down."""
    module = cast(UnfusedExperts, experts.module)
    chosen = [module[index] for index in stay.tolist()]
    cuts: list[tuple[Projection, Tensor]] = []
    for index, expert, keep in zip(stay.tolist(), chosen, channels or (), strict=False):
        name = f"{experts.name}.{index}"
        rows = torch.cat([keep, keep + experts.width])
        cuts.append((Projection(f"{name}.gate_up", expert.gate_up, rows, "out"), rows))  # type: ignore[arg-type]
        cuts.append((Projection(f"{name}.down", expert.down, keep, "in"), keep))  # type: ignore[arg-type]
    _slice(cuts)
    module._modules.clear()
    module.extend(chosen)


def _slice(cuts: list[tuple[Projection, Tensor]]) -> None:
    """Keep the given rows of each projection's module; all that share a module at once, in their old order."""
    modules: dict[tuple[str, Side], nn.Module] = {}
    rows: dict[tuple[str, Side], list[Tensor]] = defaultdict(list)
    for projection, keep in cuts:
        _check_linear(projection)
        modules[projection.name, projection.side] = projection.module
        rows[projection.name, projection.side].append(keep)
    for (name, side), module in modules.items():
        _slice_linear(module, torch.cat(rows[name, side]).sort().values, side)


def _check_linear(projection: Projection) -> None:
    if not is_linear(projection.module):
        raise ValueError(
            f"{projection.name} is a {type(projection.module).__name__}, and only a dense Linear can be "
            "narrowed: prune before quantizing or factorizing"
        )


def _slice_linear(linear: nn.Module, keep: Tensor, side: Side) -> None:
    conv1d = is_conv1d(linear)
    _put(linear, "weight", _select(cast(Tensor, linear.weight), int((side == "in") != conv1d), keep))
    if side == "out" and linear.bias is not None:
        _put(linear, "bias", _select(cast(Tensor, linear.bias), 0, keep))
    names = {"out": "nf", "in": "nx"} if conv1d else {"out": "out_features", "in": "in_features"}
    setattr(linear, names[side], len(keep))


def _set_heads(attention: Attention, heads: int, kv_heads: int) -> None:
    """Tell the attention module how many heads it has, in the words of every family."""
    module = attention.module
    _set_numbers(module, _HEADS, heads)
    _set_numbers(module, _WIDTHS, heads * attention.head_dim)
    _set_numbers(module, ("num_key_value_heads",), kv_heads)
    _set_numbers(module, ("num_key_value_groups",), heads // kv_heads)
    config = getattr(module, "config", None)
    if config is not None and attention.q.name == attention.k.name:  # Phi-3 splits them by its config
        shared = config.shared if isinstance(config, _LayerConfig) else config
        module.config = _LayerConfig(shared, num_attention_heads=heads, num_key_value_heads=kv_heads)  # type: ignore[assignment]


class _LayerConfig:
    """The model's config, live, but for a few values of one layer."""

    def __init__(self, shared: Any, **own: int) -> None:
        self.__dict__.update(own, shared=shared)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "shared":  # as while it is being copied
            raise AttributeError(name)
        return getattr(self.shared, name)


def _check_parameters(attention: Attention) -> None:
    """Refuse attention with parameters by head that would be left as they are (norms over all heads, sinks)."""
    known = {id(p) for role in "qkvo" for p in getattr(attention, role).module.parameters()}
    for name, parameter in attention.module.named_parameters():
        table = attention.position_bias is not None and f"{attention.name}.{name}" == (
            f"{attention.position_bias}.weight"
        )
        if id(parameter) not in known and not table and parameter.numel() != attention.head_dim:
            raise ValueError(
                f"{attention.name}.{name} spans all heads, and llmslim does not know how to narrow it"
            )


def _block(model: nn.Module, name: str) -> Block:
    blocks = {block.name: block for block in Anatomy(model).blocks}  # type: ignore[arg-type]
    if name not in blocks:
        raise ValueError(f"there is no block {name}")
    return blocks[name]


def _attention(block: Block, cross: bool) -> Attention:
    attention = block.cross_attention if cross else block.attention
    if attention is None:
        raise ValueError(f"{block.name} has no cross-attention")
    return attention


def _mlp(block: Block) -> MLP:
    mlp = block.mlp
    if not isinstance(mlp, MLP):
        what = "experts, which narrow_experts is for" if isinstance(mlp, Experts) else "no MLP"
        raise ValueError(f"{block.name} has {what}")
    return mlp


def _experts(block: Block) -> Experts:
    experts = block.mlp
    if not isinstance(experts, Experts):
        raise ValueError(f"{block.name} has no experts")
    return experts


def _first(what: str, stay: int, count: int) -> Tensor:
    """The numbers of the first that stay, of `count`: an edit is untrusted, and may say any number."""
    if stay > count:
        raise ValueError(f"{what}: {stay} cannot stay of {count}")
    return _numbers(stay)


def _numbers(count: int) -> Tensor:
    return torch.arange(count, device="cpu")  # also while from_pretrained makes all tensors on meta


def _checked(what: str, keep: Tensor, count: int) -> Tensor:
    """The indices on the CPU, or a ValueError when they do not choose some of `count`."""
    keep = keep.cpu()
    if keep.ndim != 1 or keep.dtype != torch.int64 or not len(keep):
        raise ValueError(f"{what}: give at least one index, as an int64 vector")
    if keep[0] < 0 or keep[-1] >= count or (len(keep) > 1 and not bool((keep.diff() > 0).all())):
        raise ValueError(f"{what}: indices must ascend within 0 to {count - 1}, not {keep.tolist()}")
    return keep


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in {**module._parameters, **module._buffers}.items() if isinstance(t, Tensor)}


def _select(tensor: Tensor, dim: int, keep: Tensor) -> Tensor:
    return tensor.detach().index_select(dim, keep.to(tensor.device))


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in place of a parameter or buffer, in memory of its own."""
    if name in module._buffers:
        module._buffers[name] = tensor
    else:
        old = module._parameters[name]
        module._parameters[name] = nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad)


def _set_numbers(module: nn.Module, names: Sequence[str], value: int) -> None:
    for name in names:
        if isinstance(vars(module).get(name), int):
            setattr(module, name, value)
