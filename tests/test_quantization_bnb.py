"""bitsandbytes' 4 and 8 bits: the same tensors as its own saving, and checkpoints that plain transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmslim.checkpoint.formats import choose
from llmslim.checkpoint.load import load
from llmslim.errors import UserError
from llmslim.pipeline import compress
from llmslim.quantization.bnb import BitsAndBytes, PackBnb
from llmslim.quantization.bnb_linear import STATE_BYTES, BnbLinear, state_of
from llmslim.quantization.rtn import RTN
from llmslim.recovery.full import Full
from tests.checkpoints import make
from tests.reference import nf4
from tests.tiny import FAMILIES, example_inputs, meta_model, save_tiny, tiny_model

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("verified_here")

QUICK: dict[str, Any] = {"evaluation": None}


def reference(base: Path, folder: Path, step: BitsAndBytes, family: str = "llama") -> dict[str, Tensor]:
    """What transformers and bitsandbytes save themselves."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=step.bits == 4,
        load_in_8bit=step.bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=step.double_quant,
    )
    model = FAMILIES[family].auto_class.from_pretrained(base, quantization_config=config, dtype="auto")
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize(
    "step",
    [BitsAndBytes(), BitsAndBytes(double_quant=False), BitsAndBytes(bits=8)],
    ids=["nf4-dq", "nf4", "int8"],
)
def test_it_saves_what_bitsandbytes_saves(family: str, step: BitsAndBytes, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base")
    result = compress(str(base), [step], tmp_path / "made", **QUICK)
    assert result.report["format"] == "bitsandbytes"
    expected = reference(base, tmp_path / "reference", step, family)
    assert_same(load_file(tmp_path / "made/model.safetensors"), expected)


def assert_same(made: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        if "quant_state" in name:
            assert state_of(made[name]) == state_of(tensor) and len(made[name]) == STATE_BYTES
        else:
            assert made[name].dtype == tensor.dtype and torch.equal(made[name], tensor), name


@pytest.mark.parametrize("fast", [False, True])
def test_of_a_16_bit_model_too_whatever_the_cpu_computes_in(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmslim.loaders.models.fast_bfloat16", lambda: fast)
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "base")
    compress(str(tmp_path / "base"), [BitsAndBytes()], tmp_path / "made", **QUICK)
    expected = reference(tmp_path / "base", tmp_path / "reference", BitsAndBytes())
    assert_same(load_file(tmp_path / "made/model.safetensors"), expected)


@pytest.mark.parametrize("step", [BitsAndBytes(), BitsAndBytes(bits=8)], ids=["nf4", "int8"])
def test_plain_transformers_loads_it(step: BitsAndBytes, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    compress(str(base), [step], tmp_path / "made", **QUICK)
    plain = FAMILIES["llama"].auto_class.from_pretrained(tmp_path / "made")
    inputs = example_inputs(plain)
    named = {type(module).__name__ for module in plain.model.layers.modules()}
    assert named & {"Linear4bit", "Linear8bitLt"} and "Linear" not in named
    with torch.no_grad():
        plain.train(step.bits == 4)  # at an evaluation, 4 bits may be repacked
        theirs = plain(**inputs).logits
        ours = load(str(tmp_path / "made"), dtype="float32")[0](**inputs).logits
    torch.testing.assert_close(ours, theirs)


def test_nf4_is_the_nearest_of_its_values() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    layer = BnbLinear.quantize(weight, 4, double_quant=False)
    torch.testing.assert_close(layer.dequantize(), nf4(weight))


def test_int8_rounds_rows() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    layer = BnbLinear.quantize(weight, 8, double_quant=False)
    scale = weight.half().float().abs().amax(1, keepdim=True)
    codes = (weight.half().float() * 127 / scale).round()
    assert torch.equal(layer.weight.float(), codes)
    torch.testing.assert_close(layer.dequantize(), codes * scale / 127)


@pytest.mark.parametrize("bits", [4, 8])
def test_it_computes_with_its_weight_and_passes_gradients(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(32, 64, generator=generator), torch.randn(32, generator=generator)
    layer = BnbLinear.quantize(weight, bits, double_quant=bits == 4)
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    layer = layer.to(torch.bfloat16).to(torch.float32)  # which touches the bias alone
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    x = torch.randn(5, 64, generator=generator, requires_grad=True)
    y, dense = layer(x), layer.dequantize()
    tolerance = 1e-5 if bits == 4 else 0.02  # inputs are rounded, too
    error = (y - (x @ dense.T + bias)).square().mean().sqrt() / y.square().mean().sqrt()
    assert error < tolerance
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(5, -1), rtol=2e-3, atol=2e-3)


def test_some_linears_stay_dense(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    compress(str(base), [BitsAndBytes(exclude=("down_proj",))], tmp_path / "made", **QUICK)
    config = json.loads((tmp_path / "made/config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.down_proj" in config["llm_int8_skip_modules"]
    plain = FAMILIES["llama"].auto_class.from_pretrained(tmp_path / "made")
    assert type(plain.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_what_bitsandbytes_cannot_say_is_llmslims_own_format(tmp_path: Path) -> None:
    base = save_tiny("mixtral", tmp_path / "base")  # its experts become Linears
    result = compress(str(base), [BitsAndBytes()], tmp_path / "made", **QUICK)
    assert result.report["format"] == "llmslim" and result.report["verification"]["ok"]
    model, _ = load(str(tmp_path / "made"), dtype="float32")
    assert any(isinstance(module, BnbLinear) for module in model.modules())


def test_a_width_that_its_kernels_for_cpus_cannot_take_is_told(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", intermediate_size=96)
    for bits, said in ((4, 3), (8, 0)):
        result = compress(str(base), [BitsAndBytes(bits=bits)], tmp_path / f"{bits}", **QUICK)
        told = [note["where"] for note in result.report["notes"] if "no multiple of 64" in note["what"]]
        assert len(told) == said and all(name.endswith("down_proj") for name in told)


def test_refusals(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    with pytest.raises(ValueError, match="4 bits .NF4. and 8"):
        BitsAndBytes(bits=3)
    with pytest.raises(UserError, match="bitsandbytes or gptq can|llmslim or bitsandbytes can"):
        compress(str(base), [BitsAndBytes()], tmp_path / "x", format="gptq", **QUICK)
    with pytest.raises(UserError, match="leave no Linear"):
        compress(str(base), [BitsAndBytes(include=("nothing",))], tmp_path / "x", **QUICK)
    compress(str(base), [BitsAndBytes()], tmp_path / "made", **QUICK)
    for step in (BitsAndBytes(), RTN()):
        with pytest.raises(UserError, match="quantized already"):
            compress(str(tmp_path / "made"), [step], tmp_path / "x", **QUICK)
    with pytest.raises(UserError, match="cannot train packed weights"):
        compress(str(tmp_path / "made"), [Full(teacher=str(base))], tmp_path / "x", **QUICK)


@pytest.mark.parametrize(
    "change",
    [{"bnb_4bit_quant_type": "x"}, {"bnb_4bit_quant_storage": "bfloat16"}, {"llm_int8_threshold": 3.0}],
)
def test_configs_of_other_kinds_are_refused(change: dict[str, Any]) -> None:
    model = meta_model("llama")
    edits = [PackBnb(module="model.layers.0.mlp.up_proj", bits=4)]
    form = choose("bitsandbytes", edits, model, torch.float32)
    config = form.config(edits, model, torch.float32)
    assert form.edits(config, model) == edits
    with pytest.raises(UserError, match="llmslim reads"):
        form.edits({**config, **change}, model)


ABSMAX, STATE = "{}.weight.absmax", "{}.weight.quant_state.bitsandbytes__nf4"


def state(**change: Any) -> Callable[[Tensor], Tensor]:
    """A `quant_state` with entries that are others; None takes one out."""

    def changed(told: Tensor) -> Tensor:
        entries = {key: value for key, value in (state_of(told) | change).items() if value is not None}
        return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)

    return changed


@pytest.mark.parametrize(("step", "leaf", "damage", "said"), [
    (BitsAndBytes(), ABSMAX, lambda t: t[1:].clone(), "its config announces"),
    (BitsAndBytes(), ABSMAX, lambda t: t.float(), "its config announces"),
    (BitsAndBytes(double_quant=False), ABSMAX, lambda t: t * float("nan"), "has NaN"),
    (BitsAndBytes(), "{}.weight.nested_absmax", lambda t: t * float("inf"), "has NaN or infinite"),
    (BitsAndBytes(), STATE, torch.zeros_like, "quant_state that cannot be read"),
    (BitsAndBytes(), STATE, lambda t: t.float() + 0.5, "quant_state that cannot be read"),
    (BitsAndBytes(), STATE, state(dtype=None), "quant_state that cannot be read"),
    (BitsAndBytes(), STATE, state(nested_offset="x"), "quant_state that cannot be read"),
    (BitsAndBytes(), STATE, state(nested_offset=10**400), "quant_state that cannot be read"),
    (BitsAndBytes(), STATE, state(nested_offset=float("nan")), "with the offset nan; llmslim reads"),
    (BitsAndBytes(), STATE, state(dtype="nn"), "of 'nn' with .* llmslim reads"),
    (BitsAndBytes(), STATE, state(blocksize=64.0), "llmslim reads .*'blocksize': 64"),
    (BitsAndBytes(), STATE, state(shape=[64, 32]), "llmslim reads"),
    (BitsAndBytes(), STATE, state(absmax=[1.0]), "llmslim reads"),
    (BitsAndBytes(bits=8), "{}.SCB", lambda t: t[1:].clone(), "its config announces"),
    (BitsAndBytes(bits=8), "{}.SCB", lambda t: t * float("nan"), "has NaN"),
    (BitsAndBytes(bits=8), "{}.weight_format", lambda t: t + 1, "weight_format is 1; llmslim reads 0"),
])  # fmt: skip
def test_damaged_weights_are_refused(
    step: BitsAndBytes, leaf: str, damage: Callable[[Tensor], Tensor], said: str, tmp_path: Path
) -> None:
    """Before bitsandbytes sees them, which reads past their ends or ends in a traceback."""
    folder = made_by(step, save_tiny("llama", tmp_path / "base"), tmp_path / "made")
    name = leaf.format("model.layers.1.mlp.up_proj")
    rewrite(folder, name, damage)
    with pytest.raises(UserError, match=said):
        load(str(folder))


def made_by(step: BitsAndBytes, base: Path, folder: Path, form: str = "auto") -> Path:
    make(base, folder, step, form)
    return folder


def rewrite(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {name: change(tensors[name])}, folder / "model.safetensors", metadata={"format": "pt"}
    )


def test_a_damaged_state_in_llmslims_own_format_is_refused(tmp_path: Path) -> None:
    folder = made_by(BitsAndBytes(), save_tiny("llama", tmp_path / "base"), tmp_path / "made", "llmslim")
    rewrite(folder, "model.layers.1.mlp.up_proj.quant_state", torch.zeros_like)
    with pytest.raises(UserError, match="quant_state that cannot be read"):
        load(str(folder))


def test_the_state_of_others_may_have_another_length(tmp_path: Path) -> None:
    folder = made_by(BitsAndBytes(), save_tiny("llama", tmp_path / "base"), tmp_path / "made")
    inputs = example_inputs(tiny_model("llama"))
    before = load(str(folder), dtype="float32")[0](**inputs).logits
    rewrite(folder, STATE.format("model.layers.1.mlp.up_proj"), state())
    torch.testing.assert_close(load(str(folder), dtype="float32")[0](**inputs).logits, before)
