"""Bit packing, the packed layers and every route of their products, against dense arithmetic."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from llmslim.quantization import native, packing, routes
from llmslim.quantization.grid import GroupSize, QuantizedWeight, Scheme
from llmslim.quantization.packed import PackedEmbedding, PackedLinear


def _load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", Path(__file__).parent / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = sys.modules.get("reference") or _load_reference()

needs_native = pytest.mark.skipif(native.library() is None, reason="the C library is not built")

WIDTHS = range(2, 9)
GRIDS: list[tuple[GroupSize, int]] = [(32, 96), (64, 128), (128, 384), (256, 512), (40, 120), (48, 96)]
GRIDS += [("channel", 200), ("channel", 77), ("tensor", 77), (7, 21), (12, 36), (8, 40)]
"""(group_size, in_features): whole and broken chunks, groups that start inside a byte, odd rows."""


def random_weight(
    out_features: int,
    in_features: int,
    bits: int,
    group_size: GroupSize,
    symmetric: bool = True,
    dtype: str = "bfloat16",
) -> QuantizedWeight:
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)  # type: ignore[arg-type]
    shape = scheme.scale_shape(out_features, in_features)
    codes = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8)
    scale = (torch.rand(shape) * 0.02 + 0.001).to(getattr(torch, dtype)).float()
    zero_point = None if symmetric else torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    return QuantizedWeight(scheme, codes, scale, zero_point)


def dense(weight: QuantizedWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in float64."""
    y = x.double() @ weight.dequantize().double().T
    return y if bias is None else y + bias.double()


def error(y: Tensor, expected: Tensor, weight: QuantizedWeight, x: Tensor) -> float:
    """Largest error relative to |x| |W|, the scale on which floating-point products err."""
    bound = x.double().norm(dim=-1, keepdim=True) * weight.dequantize().double().norm(dim=-1)
    return float(((y.double() - expected).abs() / bound).max())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# ---- packing ----


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", [1, 7, 8, 13, 40])
def test_packing_equals_a_loop_over_bits(bits: int, n: int) -> None:
    codes = torch.randint(0, 2**bits, (3, n), dtype=torch.uint8)
    packed = packing.pack(codes, bits)
    assert torch.equal(packed, reference.pack_bits(codes, bits))
    assert torch.equal(packing.unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_packing_in_slices_equals_packing_at_once(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 2**bits, (50, 24), dtype=torch.uint8)
    whole = packing.pack(codes, bits)
    monkeypatch.setattr(packing, "CODES_AT_ONCE", 100)
    assert torch.equal(packing.pack(codes, bits), whole)
    assert torch.equal(packing.unpack(whole, bits, 24), codes)


# ---- values ----


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_storage_gives_back_the_weight(bits: int, symmetric: bool) -> None:
    for group_size, in_features in GRIDS:
        check_storage(bits, group_size, in_features, symmetric)


def check_storage(bits: int, group_size: GroupSize, in_features: int, symmetric: bool) -> None:
    weight = random_weight(9, in_features, bits, group_size, symmetric)
    layer = PackedLinear.from_quantized(weight)
    again = layer.quantized()
    assert torch.equal(again.codes, weight.codes) and torch.equal(again.scale, weight.scale)
    assert symmetric or torch.equal(again.zero_point, weight.zero_point)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    assert torch.equal(layer.dequantize(torch.bfloat16), weight.dequantize().bfloat16())
    assert torch.equal(
        routes._dequantize_rows_torch(layer, range(2, 5), torch.float32), weight.dequantize()[2:5]
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scales_of_every_type(dtype: str) -> None:
    weight = random_weight(20, 64, 4, 32, False, dtype)
    weight.scale[0, 0] = torch.tensor(6e-8 if dtype == "float16" else 1e-20).to(getattr(torch, dtype))
    layer = PackedLinear.from_quantized(weight)
    x = torch.randn(3, 64)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    assert error(layer(x), dense(weight, x), weight, x) < 2e-5


# ---- products ----


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
@needs_native
def test_native_products(bits: int, symmetric: bool) -> None:
    for group_size, in_features in GRIDS:
        weight = random_weight(37, in_features, bits, group_size, symmetric)
        bias = torch.randn(37)
        layer = PackedLinear.from_quantized(weight, bias)
        for rows in (1, 2, 6):
            x = torch.randn(rows, in_features)
            y = routes.native_linear(layer, x)
            assert error(y, dense(weight, x, bias), weight, x) < 2e-5, (group_size, in_features, rows)


@pytest.mark.parametrize("group_size", ["channel", 129])  # AVX2, portable
def test_the_largest_sums_fit(group_size: GroupSize) -> None:
    weight = random_weight(40, 516, 8, group_size, False)
    weight.codes.fill_(255)
    assert weight.zero_point is not None
    for zero in (0, 255):
        weight.zero_point.fill_(zero)
        layer = PackedLinear.from_quantized(weight)
        x = torch.full((1, 516), 3.0)
        torch.testing.assert_close(layer(x), dense(weight, x).float(), rtol=2e-5, atol=1e-2)


@pytest.mark.parametrize("route", ["native_linear", "blocked_linear", "dense_linear", "int4pack_linear"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_routes_agree(route: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is None and route in ("native_linear", "blocked_linear"):
        pytest.skip("the C library is not built")
    monkeypatch.setattr(routes, "BLOCK_BYTES", 1)  # many blocks
    weight = random_weight(208, 256, 4, 64, symmetric)
    bias = torch.randn(208).bfloat16()
    layer = PackedLinear.from_quantized(weight, bias)
    x = torch.randn(5, 256).bfloat16()
    y = getattr(routes, route)(layer, x)
    assert y.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; torch's operator also rounds scale * zero point to it.
    assert error(y, dense(weight, x, bias), weight, x) < 4e-3


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_follows_the_input(rows: int, dtype: torch.dtype) -> None:
    weight = random_weight(48, 96, 3, 32, False)
    bias = torch.randn(48)
    layer = PackedLinear.from_quantized(weight, bias)
    x = torch.randn(2, rows, 96).to(dtype)
    y = layer(x)
    assert y.shape == (2, rows, 48) and y.dtype == dtype
    tolerance = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    assert error(y, dense(weight, x, bias), weight, x) < tolerance


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(64, 128, 4, 32, False)
    layer = PackedLinear.from_quantized(weight)
    embedding = PackedEmbedding.from_quantized(weight, torch.float32)
    monkeypatch.setattr(native, "library", lambda: None)
    x = torch.randn(3, 128)
    assert routes.choose(layer, x) is routes.dense_linear
    assert routes.choose(layer, x.bfloat16()) is routes.int4pack_linear
    assert error(layer(x), dense(weight, x), weight, x) < 1e-6
    assert torch.equal(embedding(torch.tensor([[5, 2]])), weight.dequantize()[[5, 2]][None])


@needs_native
def test_route_depends_on_the_rows() -> None:
    layer = PackedLinear.from_quantized(random_weight(64, 128, 4, 32))
    assert routes.choose(layer, torch.randn(1, 128)) is routes.native_linear
    assert routes.choose(layer, torch.randn(routes.NATIVE_ROWS + 1, 128)) is routes.blocked_linear


@needs_native
def test_threads_give_the_same_bits() -> None:
    layer = PackedLinear.from_quantized(random_weight(1031, 128, 4, 32))
    x = torch.randn(3, 128)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = layer(x)
        torch.set_num_threads(2)
        assert torch.equal(layer(x), alone) and torch.equal(
            layer.dequantize(), layer.quantized().dequantize()
        )
    finally:
        torch.set_num_threads(before)


def test_outliers_do_not_drown_other_groups() -> None:
    weight = random_weight(64, 512, 4, 64)
    layer = PackedLinear.from_quantized(weight)
    x = torch.randn(2, 512)
    x[:, 3] = 1e4
    assert error(layer(x), dense(weight, x), weight, x) < 2e-5
    without = x.clone()
    without[:, :64] = 0  # the outlier's group
    assert error(layer(without), dense(weight, without), weight, without) < 2e-5


def test_zero_and_non_finite_inputs() -> None:
    layer = PackedLinear.from_quantized(random_weight(16, 64, 4, 32, False))
    x = torch.zeros(3, 64)
    x[1, 40] = float("nan")
    x[2, 40] = float("inf")
    y = layer(x)
    assert torch.equal(y[0], torch.zeros(16))
    assert y[1].isnan().all() and not y[2].isfinite().any()


def test_empty_input() -> None:
    layer = PackedLinear.from_quantized(random_weight(16, 64, 4, 32))
    assert layer(torch.zeros(0, 64)).shape == (0, 16)


# ---- gradients ----


@pytest.mark.parametrize("rows", [2, 40])
def test_gradient_to_the_input(rows: int) -> None:
    weight = random_weight(48, 96, 4, 32, False)
    layer = PackedLinear.from_quantized(weight, torch.randn(48))
    x = torch.randn(rows, 96, requires_grad=True)
    up = torch.randn(rows, 48)
    y = layer(x)
    (y * up).sum().backward()
    torch.testing.assert_close(x.grad, up @ weight.dequantize())
    with torch.no_grad():
        assert torch.equal(layer(x), y)  # training and inference see the same function


# ---- as modules ----


def test_embedding() -> None:
    weight = random_weight(30, 96, 6, 32, False)
    embedding = PackedEmbedding.from_quantized(weight, torch.bfloat16, padding_idx=3)
    ids = torch.tensor([[0, 29, 3], [5, 5, 1]])
    assert torch.equal(embedding(ids), weight.dequantize()[ids].bfloat16())
    assert embedding.padding_idx == 3
    assert embedding.to(torch.float32)(ids).dtype == torch.float32
    with pytest.raises(IndexError):
        embedding(torch.tensor([30]))


def test_embedding_scale_as_in_gemma() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    weight = random_weight(30, 96, 6, 32)
    theirs = Gemma3TextScaledWordEmbedding(30, 96, 0, embed_scale=1152**0.5)
    theirs.weight = nn.Parameter(weight.dequantize())
    ours = PackedEmbedding.from_quantized(weight, torch.bfloat16, 0, embed_scale=1152**0.5)
    ids = torch.arange(30)
    assert torch.equal(ours(ids), theirs.to(torch.bfloat16)(ids))


def test_a_tied_head_shares_the_storage() -> None:
    weight = random_weight(40, 96, 8, 32)
    model = nn.Module()
    model.embedding = PackedEmbedding.from_quantized(weight, torch.float32)
    model.head = model.embedding.tie_head()
    model.to(torch.bfloat16)
    assert len(list(model.parameters())) == 2
    assert model.head.weight_packed is model.embedding.weight_packed
    x = torch.randn(2, 96)
    assert error(model.head(x), dense(weight, x), weight, x) < 2e-5
    assert copy.deepcopy(model).head.weight_packed.data_ptr() != model.head.weight_packed.data_ptr()


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_casts_leave_the_grid_alone(scale_dtype: str) -> None:
    weight = random_weight(8, 64, 4, 32, False, scale_dtype)
    layer = PackedLinear.from_quantized(weight, torch.randn(8))
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), copy.deepcopy):
        layer = cast(layer)
        assert torch.equal(layer.quantized().scale, weight.scale)
        assert layer.weight_scale.dtype == getattr(torch, scale_dtype)
    assert layer.bias is not None and layer.bias.dtype == torch.float64
    assert torch.equal(layer.dequantize(), weight.dequantize())


def test_state_dict_into_a_meta_skeleton() -> None:
    weight = random_weight(24, 77, 5, "channel", False)
    layer = PackedLinear.from_quantized(weight, torch.randn(24))
    state = layer.state_dict()
    assert sorted(state) == ["bias", "weight_packed", "weight_scale", "weight_zero_point"]
    assert state["weight_packed"].shape == (24, 49)  # 77 * 5 / 8, rounded up
    skeleton = PackedLinear(77, 24, weight.scheme, True, torch.float32, device="meta")
    assert skeleton(torch.empty(2, 77, device="meta")).shape == (2, 24)
    skeleton.load_state_dict(state, assign=True)
    x = torch.randn(3, 77)
    assert torch.equal(skeleton(x), layer(x))
    empty = PackedLinear(77, 24, weight.scheme, True, torch.float32, device="meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    assert torch.equal(empty(x), layer(x))


def test_loading_drops_what_was_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    first, second = (PackedLinear.from_quantized(random_weight(32, 64, 4, 32)) for _ in range(2))
    x = torch.randn(2, 64).bfloat16()
    first(x)
    assert first.int4pack is not None
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))
