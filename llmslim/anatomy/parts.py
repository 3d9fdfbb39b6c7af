"""The parts of a block, as views: which module holds a matrix, and which of its rows are whose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

Side = Literal["out", "in"]


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D (GPT-2), known by its name: importing it takes seconds."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a dense matrix: nn.Linear (weight [out, in]) or Conv1D (weight [in, out])."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_matrix(module: nn.Module) -> bool:
    """Whether the module maps `in_features` to `out_features`, be it dense, packed or factored."""
    return is_conv1d(module) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def is_packed(module: nn.Module) -> bool:
    """Whether the weight of a matrix or table is kept in fewer bits, of whatever kind."""
    return hasattr(module, "dequantize") and hasattr(module, "shape")


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a LayerNorm, RMSNorm or one of their many namesakes."""
    vectors = [parameter.ndim == 1 for parameter in module.parameters(recurse=False)]
    return "norm" in type(module).__name__.lower() and bool(vectors) and all(vectors)


def features(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a matrix."""
    if is_conv1d(module):
        inputs, outputs = cast(Tensor, module.weight).shape
        return outputs, inputs
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Matrices:
    """Matrices of one shape [rows, width]: `count` there are, `used` of them, on average, a token passes."""

    rows: int
    width: int
    count: int = 1
    used: float = 1.0

    @property
    def weights(self) -> int:
        return self.count * self.rows * self.width

    @property
    def passed(self) -> float:
        """Weights that a token meets."""
        return self.used * self.rows * self.width


@dataclass(frozen=True, eq=False)
class Projection:
    """One of q, k, v, o, gate, up, down: a module, or the share of a module, that does one thing.

    Attributes:
        name: dotted name of the module in the model; q, k and v of a fused matrix have the same.
        module: what is there now (dense, packed or factored).
        rows: int64 [n], which of the module's outputs are this projection's (for `o` and `down`: which of its
            inputs), in the order of heads or channels; `weight.index_select(dim, rows)` takes them.
        side: whether `rows` are outputs ("out") or inputs ("in") of the module.
    """

    name: str
    module: nn.Module
    rows: Tensor
    side: Side

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored [in, out] (Conv1D)."""
        return is_conv1d(self.module)

    @property
    def dim(self) -> int:
        """The dimension of `module.weight` that `rows` index."""
        return int((self.side == "in") != self.transposed)


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention of one block. Query heads read KV heads in equal consecutive runs.

    Attributes:
        name, module: the module that computes attention and holds q, k and v.
        head_dim: width of one head, the same for q, k and v.
        position_bias: name of the nn.Embedding [buckets, heads] added to the scores (T5), or None.
        is_causal: whether a token sees only itself and those before it.
    """

    name: str
    module: nn.Module
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    head_dim: int
    position_bias: str | None
    is_causal: bool

    @property
    def num_heads(self) -> int:
        return len(self.q.rows) // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return len(self.k.rows) // self.head_dim

    def readers(self, kv_head: int) -> range:
        """The query heads that read a KV head."""
        run = self.num_heads // self.num_kv_heads
        return range(kv_head * run, (kv_head + 1) * run)


@dataclass(frozen=True, eq=False)
class MLP:
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate.

    Channel j is row j of `gate.rows`, of `up.rows` and of `down.rows`.
    """

    up: Projection
    gate: Projection | None
    down: Projection

    @property
    def width(self) -> int:
        """Number of channels."""
        return len(self.down.rows)


@dataclass(frozen=True, eq=False)
class Experts:
    """A mixture of gated MLPs; a router sends each token to `top_k` of them.

    Attributes:
        name, module: the module that holds all experts.
        gate_up: name of its parameter [num_experts, 2 * width, hidden]: gate rows, then up rows; None when
            the experts are unfused, each an `llmslim.experts.Expert` with Linears gate_up and down.
        down: name of its parameter [num_experts, hidden, width], or None.
        width: channels of one expert.
        router: name of the module that chooses; never compressed.
        shared: the expert that every token passes, if the family has one.
    """

    name: str
    module: nn.Module
    gate_up: str | None
    down: str | None
    num_experts: int
    top_k: int
    width: int
    router: str
    shared: MLP | None


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight of a Linear as [out, in]; transformers' Conv1D (GPT-2) keeps it the other way round."""
    weight = cast(Tensor, linear.weight)
    return weight.T if is_conv1d(linear) else weight
