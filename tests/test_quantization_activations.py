"""Inputs of Linears at 8 bits per token: what compressed-tensors computes, in training, saved and loaded alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open

from llmslim import cli
from llmslim.checkpoint.load import load_model
from llmslim.errors import UserError
from llmslim.loaders.models import find
from llmslim.pipeline import compress
from llmslim.quantization.grid import quantize_tokens
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

    def put(self: Any, stream: Any, packed: Any, best: Any) -> None:
        real(self, stream, packed, best)
        seen.extend((name, module.scheme.activation_bits) for name, module in packed.items())

    monkeypatch.setattr(reconstruction.Reconstruction, "_put", put)
    step = QAT(bits=4, group_size=32, activation_bits=8, epochs=2, validation=0)
    compress(str(base), [step], tmp_path / "out", **QUICK)
    assert len(seen) == 21 and {bits for _, bits in seen} == {8}
    linear = whole(base).get_submodule("model.layers.0.mlp.up_proj")
    packed = whole(tmp_path / "out").get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(4, 64)
    with reconstruction._inputs_quantized({"a": linear}, {"a": packed}):
        torch.testing.assert_close(linear(x), linear(quantize_tokens(x)), atol=1e-1, rtol=1e-1)
        inside = linear(x)
    torch.testing.assert_close(inside, quantize_tokens(x) @ linear.weight.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear(x), x @ linear.weight.T, atol=1e-5, rtol=1e-5)


def test_what_no_format_holds_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValidationError):
        RTN(activation_bits=4)
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
