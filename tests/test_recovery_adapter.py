"""Adapters kept beside: what is saved is what was trained, over dense, packed, sparse and bitsandbytes' weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmslim.checkpoint.load import load_model
from llmslim.errors import UserError
from llmslim.evaluation.divergence import compare
from llmslim.evaluation.run import evaluate
from llmslim.loaders.models import find
from llmslim.loaders.texts import sample
from llmslim.pipeline import compress
from llmslim.pruning.weights import Magnitude
from llmslim.quantization.bnb import BitsAndBytes
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Calibration
from llmslim.recovery.lora import LoRA, with_adapter
from llmslim.training.loop import train
from tests.tiny import FAMILIES, example_inputs, save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")
QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=8, seq_len=32), "evaluation": None}
FAST: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "lr": 1e-2, "rank": 4, "objective": "next_token"}
STEPS = {
    "packed": RTN(bits=4, group_size=32),
    "sparse": Magnitude(sparsity=0.5),
    "nf4": BitsAndBytes(),
    "int8": BitsAndBytes(bits=8),
}


def whole(folder: Path) -> Any:
    return load_model(find(str(folder)), torch.float32, torch.device("cpu"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**example_inputs(model)).logits


def spied(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The logits that each model gave when its training was over."""
    given: list[torch.Tensor] = []

    def spy(model: Any, *args: Any, **kwargs: Any) -> None:
        train(model, *args, **kwargs)
        given.append(logits(model))

    monkeypatch.setattr("llmslim.training.loop.train", spy)
    return given


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_plain_peft_gives_what_was_trained(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    base, trained = save_tiny(family, tmp_path / "base"), spied(monkeypatch)
    compress(str(base), [LoRA(save_adapter=True, **FAST)], tmp_path / "made", **QUICK)
    plain = FAMILIES[family].auto_class.from_pretrained(tmp_path / "made")
    torch.testing.assert_close(logits(plain), logits(whole(base)))  # the base is left as it is
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "made/adapter")).eval()
    assert not torch.allclose(logits(adapted), logits(whole(base)), atol=1e-2)
    torch.testing.assert_close(logits(adapted), trained[0])


@pytest.mark.parametrize("kind", STEPS)
def test_over_compressed_weights(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, trained = save_tiny("llama", tmp_path / "base"), spied(monkeypatch)
    step = STEPS[kind]
    if isinstance(step, BitsAndBytes):
        pytest.importorskip("bitsandbytes")
    compress(str(base), [step], tmp_path / "source", **QUICK)
    compress(str(tmp_path / "source"), [LoRA(save_adapter=True, **FAST)], tmp_path / "made", **QUICK)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "made"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    adapters = load_file(tmp_path / "made/adapter/adapter_model.safetensors")
    assert all(bool(tensor.any()) for name, tensor in adapters.items() if "lora_B" in name)  # gradients came
    adapted = with_adapter(whole(tmp_path / "made"), tmp_path / "made/adapter")
    torch.testing.assert_close(logits(adapted), trained[0])


def test_evaluate_takes_the_adapter_along(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    compress(str(base), [RTN(bits=2, group_size=16)], tmp_path / "packed", **QUICK)
    step = LoRA(save_adapter=True, **{**FAST, "objective": "distill", "max_steps": 20})
    compress(str(tmp_path / "packed"), [step], tmp_path / "made", **QUICK)
    asked: dict[str, Any] = {"base": str(base), "seq_len": 32, "windows": 2}
    without = evaluate(str(tmp_path / "made"), "builtin", **asked)
    beside = evaluate(str(tmp_path / "made"), "builtin", adapter=str(tmp_path / "made/adapter"), **asked)
    adapted, text = (
        with_adapter(whole(tmp_path / "made"), tmp_path / "made/adapter"),
        find(str(base)).tokenizer(),
    )
    tokens = sample("builtin", text, 2, 32, builtin_part="test")
    assert beside["kl"] == pytest.approx(compare(adapted, whole(base), tokens).kl.value, rel=1e-4)
    assert abs(beside["kl"] - without["kl"]) > 1e-3
    with pytest.raises(UserError, match="OUTPUT/adapter"):
        evaluate(str(base), "builtin", adapter=str(tmp_path / "nowhere"))
    adapter = tmp_path / "made/adapter"
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(load_file(adapter / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    for read in (
        lambda: evaluate(str(base), "builtin", adapter=str(pickled)),
        lambda: with_adapter(whole(base), pickled),
    ):
        with pytest.raises(UserError, match="and adapter_model.safetensors"):
            read()
    with pytest.raises(UserError, match="--stream"):
        evaluate(str(base), "builtin", adapter=str(tmp_path / "made/adapter"), streamed=True)


def test_refusals(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    with pytest.raises(UserError, match="make it the last step"):
        compress(str(base), [LoRA(save_adapter=True, **FAST), RTN()], tmp_path / "x", **QUICK)
    compress(str(base), [LoRA(save_adapter=True, **FAST)], tmp_path / "made", **QUICK)
    for other in ("qwen3", "gpt2"):
        with pytest.raises(UserError, match="does not fit"):
            with_adapter(whole(save_tiny(other, tmp_path / other)), tmp_path / "made/adapter")


def test_bitsandbytes_is_not_merged_into(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = save_tiny("llama", tmp_path / "base")
    with pytest.raises(UserError, match="--save-adapter"):
        compress(str(base), [BitsAndBytes(), LoRA(**FAST)], tmp_path / "x", **QUICK)
