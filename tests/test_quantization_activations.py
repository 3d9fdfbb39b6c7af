"""Inputs of Linears at 8 bits per token: what compressed-tensors computes, in training, saved and loaded alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open

from llmslim import cli
from llmslim.checkpoint.formats import input_step
from llmslim.checkpoint.load import load_model
from llmslim.errors import UserError
from llmslim.loaders.models import find
from llmslim.pipeline import compress
from llmslim.quantization._inputs import inputs_quantized
from llmslim.quantization.fake_quantize import TrainedInputs
from llmslim.quantization.grid import Scheme, quantize_static, quantize_tokens
from llmslim.quantization.packed import PackedLinear
from llmslim.quantization.qat import QAT
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Calibration
from tests.checkpoints import load_elsewhere
from tests.tiny import example_inputs, save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")
QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=8, seq_len=32), "evaluation": None}
W8A8 = RTN(bits=8, group_size="channel", activation_bits=8)
W4A8 = RTN(bits=4, group_size=32, activation_bits=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


def whole(folder: Path) -> Any:
    return load_model(find(str(folder)), torch.float32, torch.device("cpu"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**example_inputs(model)).logits


def test_a_token_is_rounded_as_compressed_tensors_does_it() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]
    x[0, 0] = 0
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    theirs = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(48, 2)), args)
    ours = quantize_tokens(x)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)
    step = x.abs().amax(-1, keepdim=True) / 127.5
    assert ((ours - x).abs() <= step * 0.5001).logical_or(x == x.abs().amax(-1, keepdim=True)).all()
    assert (
        len(ours[1, 3].div(step[1, 3]).round().unique()) > 8
        and quantize_tokens(x.bfloat16()).dtype == torch.bfloat16
    )


def test_the_gradient_passes_straight_through() -> None:
    x = torch.randn(3, 16, requires_grad=True)
    (quantize_tokens(x) * torch.arange(16.0)).sum().backward()
    torch.testing.assert_close(x.grad, torch.arange(16.0).expand(3, 16))


def test_w8a8_is_a_standard_checkpoint_that_plain_transformers_computes_alike(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = compress(str(base), [W8A8], tmp_path / "out", **QUICK).report
    assert report["format"] == "compressed-tensors"
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert config["format"] == "int-quantized" and group["input_activations"]["strategy"] == "token"
    with safe_open(tmp_path / "out/model.safetensors", "pt") as opened:
        assert opened.get_tensor("model.layers.0.mlp.up_proj.weight").dtype == torch.int8
    ours = whole(tmp_path / "out")
    module = ours.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(module, PackedLinear) and module.scheme.activation_bits == 8
    theirs = load_elsewhere("transformers", {"it": tmp_path / "out"}, tmp_path)["it"]
    near = (
        (logits(ours) - theirs).square().mean()
    )  # not equal: a product's last bit decides on roundings behind it
    monkeypatch.setattr(PackedLinear, "quantized_inputs", lambda self, x: x)
    assert near < 0.5 * (logits(ours) - theirs).square().mean()


def test_w4a8_is_kept_packed_in_the_own_format_and_rounds_its_inputs(base: Path, tmp_path: Path) -> None:
    report = compress(str(base), [W4A8], tmp_path / "out", **QUICK).report
    assert report["format"] == "llmslim"
    module = whole(tmp_path / "out").get_submodule("model.layers.1.self_attn.q_proj")
    x = torch.randn(5, 64)
    expected = quantize_tokens(x) @ module.dequantize().T
    torch.testing.assert_close(module(x), expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(module(x), x @ module.dequantize().T, atol=1e-3, rtol=1e-3)


def test_qat_trains_with_rounded_inputs(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training judged at its best is the error of the block as it is saved."""
    from llmslim.quantization import reconstruction

    seen: list[tuple[str, Any]] = []
    real = reconstruction.Reconstruction._put

    def put(self: Any, stream: Any, packed: Any, best: Any, record: Any) -> None:
        real(self, stream, packed, best, record)
        seen.extend((name, module.scheme.activation_bits) for name, module in packed.items())

    monkeypatch.setattr(reconstruction.Reconstruction, "_put", put)
    step = QAT(bits=4, group_size=32, activation_bits=8, epochs=2, validation=0)
    compress(str(base), [step], tmp_path / "out", **QUICK)
    assert len(seen) == 21 and {bits for _, bits in seen} == {8}
    linear = whole(base).get_submodule("model.layers.0.mlp.up_proj")
    packed = whole(tmp_path / "out").get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(4, 64)
    with inputs_quantized({"a": linear}, {"a": packed.quantized_inputs}):
        torch.testing.assert_close(linear(x), linear(quantize_tokens(x)), atol=1e-1, rtol=1e-1)
        inside = linear(x)
    torch.testing.assert_close(inside, quantize_tokens(x) @ linear.weight.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear(x), x @ linear.weight.T, atol=1e-5, rtol=1e-5)


def test_one_step_for_all_inputs_is_rounded_as_compressed_tensors_does_it() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(0)) * 3
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="tensor", dynamic=False)
    step = torch.tensor([0.04])  # clips
    theirs = fake_quantize(x, step, torch.zeros(1, dtype=torch.int8), args)
    torch.testing.assert_close(quantize_static(x, step), theirs, atol=0, rtol=1e-6)
    assert float(theirs.max()) < float(x.max())


def test_the_step_of_inputs_has_the_gradient_of_lsq() -> None:
    """Equation 3 of the paper, element by element."""
    scheme = Scheme(bits=8, group_size="channel", activation_bits=8, scale_dtype="float32")
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    inputs = TrainedInputs(torch.tensor([0.02]), scheme)  # clips some
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    found = inputs(x)
    torch.testing.assert_close(found.detach(), quantize_static(x, torch.tensor([0.02])))
    (found * weight).sum().backward()
    v = (x.detach() / 0.02).double()
    by_step = torch.where(v <= -128, -128.0, torch.where(v >= 127, 127.0, v.round() - v))
    wanted = (by_step * weight).sum() * 0.02  # the step is 0.02 (1 + change)
    assert float(inputs.change.grad) == pytest.approx(float(wanted), rel=1e-4)  # type: ignore[arg-type]
    inside = (v > -128) & (v < 127)
    assert 0.5 < inside.float().mean() < 1
    torch.testing.assert_close(x.grad, weight * inside)


def test_learned_steps_of_inputs_are_a_standard_checkpoint_that_plain_transformers_computes_alike(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = QAT(
        bits=8, group_size="channel", activation_bits=8, activation_scale="learned", epochs=24, validation=0
    )
    report = compress(str(base), [step], tmp_path / "out", **QUICK).report
    assert report["format"] == "compressed-tensors" and report["verification"]["max_error"] == 0
    rows = [row for row in report["linears"] if "output_error_before" in row]
    assert any(row["output_error"] < row["output_error_before"] for row in rows)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_activations"]["strategy"] == "tensor"
    ours = whole(tmp_path / "out")
    module = ours.get_submodule("model.layers.0.mlp.up_proj")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as opened:
        stored = opened.get_tensor("model.layers.0.mlp.up_proj.input_scale")
    assert (
        isinstance(module, PackedLinear) and torch.equal(module.input_scale, stored) and stored.shape == (1,)
    )
    x = torch.randn(5, 64)
    expected = quantize_static(x, stored) @ module.dequantize().T
    torch.testing.assert_close(module(x), expected, atol=1e-3, rtol=1e-3)
    assert module.bfloat16().input_scale.dtype == stored.dtype
    theirs = load_elsewhere("transformers", {"it": tmp_path / "out"}, tmp_path)["it"]
    ours = whole(tmp_path / "out")
    near = (logits(ours) - theirs).square().mean()
    monkeypatch.setattr(PackedLinear, "quantized_inputs", lambda self, x: x)
    assert near < 0.5 * (logits(ours) - theirs).square().mean()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_learned_steps_of_inputs_are_kept_in_the_own_format(family: str, tmp_path: Path) -> None:
    """Also by what stores a weight anew (merging an adapter), and in experts that no token reaches."""
    base = save_tiny(family, tmp_path / "base")
    step = QAT(bits=4, group_size=32, activation_bits=8, activation_scale="learned", epochs=4, validation=0)
    report = compress(str(base), [step], tmp_path / "out", **QUICK).report
    assert report["format"] == "llmslim" and report["verification"]["max_error"] == 0
    packed = [m for m in whole(tmp_path / "out").modules() if isinstance(m, PackedLinear)]
    assert len(packed) > 10 and all(m.scheme.static_inputs and float(m.input_scale) > 0 for m in packed)
    before = packed[0].quantized()
    packed[0].store(replace(before, input_scale=None))
    assert torch.equal(packed[0].quantized().input_scale, before.input_scale)


@pytest.mark.parametrize("scale", [float("nan"), 0.0, -1.0])
def test_a_damaged_step_of_inputs_is_refused(scale: float) -> None:
    scheme = Scheme(bits=8, activation_bits=8, activation_scale="tensor", scale_dtype="float32")
    with pytest.raises(UserError, match="a.input_scale is .* damaged"):
        input_step("a", {"a.input_scale": torch.tensor([scale])}, scheme)


def test_what_no_format_holds_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValidationError):
        RTN(activation_bits=4)
    with pytest.raises(ValidationError, match="activation_scale learned is of quantized inputs"):
        QAT(activation_scale="learned")
    with pytest.raises(UserError, match="8-bit weights with a scale per channel or tensor"):
        compress(str(base), [W4A8], tmp_path / "out", format="compressed-tensors", **QUICK)
    with pytest.raises(UserError, match="no quantized activations"):
        compress(
            str(base),
            [W4A8.model_copy(update={"scale_dtype": "float16"})],
            tmp_path / "out",
            format="gptq",
            **QUICK,
        )
    words = f"quantize {base} --method rtn --bits 8 --group-size channel --activation-bits 8 --plan"
    assert cli.main(words.split()) == 0 and "compressed-tensors" in capsys.readouterr().out
    assert cli.main([*words.split(), "--activation-bits", "6"]) == 2
    assert "activation_bits = 6" in capsys.readouterr().err
