"""Adapters kept beside: what is saved is what was trained, over dense, packed, sparse and bitsandbytes' weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmslim import cli
from llmslim.checkpoint.load import load_model
from llmslim.errors import UserError
from llmslim.evaluation.divergence import compare
from llmslim.evaluation.run import evaluate
from llmslim.factorization.svd import SVD
from llmslim.generation import generate
from llmslim.loaders.models import find
from llmslim.loaders.texts import sample
from llmslim.pipeline import compress
from llmslim.pruning.weights import Magnitude
from llmslim.quantization.bnb import BitsAndBytes
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Calibration
from llmslim.recovery.lora import LoRA, with_adapter
from llmslim.recovery.merge import Adapter, MergeAdapter
from llmslim.sharing.share import ShareBlocks
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


SHARES = ShareBlocks(unique_blocks=2)  # of three blocks the first two share
PLAIN = """
import sys, torch, llmslim
from peft import PeftModel
from tests.tiny import example_inputs
model = llmslim.load(sys.argv[1], dtype="float32")[0]
adapted = PeftModel.from_pretrained(model, sys.argv[1] + "/adapter").eval()
with torch.no_grad():
    torch.save(adapted(**example_inputs(model)).logits, sys.argv[2])
"""


def test_each_use_of_a_shared_weight_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And plain peft, in a fresh process, gives what was trained."""
    base, trained, made = save_tiny("llama", tmp_path / "base"), spied(monkeypatch), tmp_path / "made"
    compress(str(base), [SHARES, LoRA(save_adapter=True, **FAST)], made, **QUICK)
    adapters = load_file(made / "adapter/adapter_model.safetensors")
    for path in ("self_attn.q_proj", "mlp.down_proj"):
        ups = [adapters[f"base_model.model.model.layers.{n}.{path}.lora_B.weight"] for n in range(3)]
        assert all(bool(up.any()) for up in ups) and not torch.equal(ups[0], ups[1])
    command = [sys.executable, "-c", PLAIN, str(made), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), trained[0])
    assert not torch.allclose(logits(whole(made)), trained[0], atol=1e-2)
    merge = MergeAdapter(adapter=str(made / "adapter"))
    with pytest.raises(
        UserError, match=r"weight that blocks share, such as model.layers.0.*evaluate --adapter"
    ):
        compress(str(made), [merge], tmp_path / "out", **QUICK)


@pytest.mark.parametrize(
    "first", [SVD(ratio=0.4), ShareBlocks(unique_blocks=2, delta_rank=8)], ids=["svd", "share"]
)
def test_over_factors_and_corrections(first: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged at once, merged later, and kept beside: all give what was trained."""
    trained, source = spied(monkeypatch), tmp_path / "source"
    compress(str(save_tiny("llama", tmp_path / "base")), [first], source, **QUICK)
    compress(str(source), [LoRA(**FAST)], tmp_path / "merged", **QUICK)
    compress(str(source), [LoRA(save_adapter=True, **FAST)], tmp_path / "made", **QUICK)
    adapter = tmp_path / "made/adapter"
    later = MergeAdapter(adapter=str(adapter))
    compress(str(tmp_path / "made"), [later], tmp_path / "later", **QUICK)
    names = load_file(adapter / "adapter_model.safetensors")
    assert any(".q_proj.u.lora_" in name for name in names) and not any(".base." in name for name in names)
    assert not torch.allclose(logits(whole(source)), trained[0], atol=1e-2)
    torch.testing.assert_close(trained[0], trained[1])
    torch.testing.assert_close(logits(with_adapter(whole(tmp_path / "made"), adapter)), trained[1])
    for name in ("merged", "later"):
        torch.testing.assert_close(logits(whole(tmp_path / name)), trained[0], atol=1e-4, rtol=1e-4)


def test_beside_pruned_weights_the_report_tells_what_merging_would_lose(tmp_path: Path) -> None:
    base, made = save_tiny("llama", tmp_path / "base"), tmp_path / "made"
    steps = [Magnitude(sparsity=0.5), LoRA(save_adapter=True, target_modules=("up_proj",), **FAST)]
    notes = {
        note["where"]: note["what"] for note in compress(str(base), steps, made, **QUICK).report["notes"]
    }
    for number in range(3):
        name = f"model.layers.{number}.mlp.up_proj"
        delta = Adapter(made / "adapter").delta(name)
        lost = float(delta[whole(made).get_parameter(f"{name}.weight") == 0].norm() / delta.norm())
        assert lost > 0.1 and f"leave out up to {lost:.0%} of what" in notes[f"model.layers.{number}"]


def test_generate_takes_the_adapter_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, made = save_tiny("llama", tmp_path / "base"), tmp_path / "made"
    compress(str(base), [RTN(bits=4, group_size=32), LoRA(save_adapter=True, **FAST)], made, **QUICK)
    adapter = str(made / "adapter")
    texts = []
    for words in ([], ["--adapter", adapter], ["--adapter", adapter, "--kv-bits", "8"]):
        given = ["generate", str(made), "The", "--max-new-tokens", "12", "--dtype", "float32", *words]
        assert cli.main(given) == 0
        texts.append(capsys.readouterr().out)
    adapted, tokenizer = with_adapter(whole(made), adapter), find(str(made)).tokenizer()
    assert texts[1] == generate(adapted, tokenizer, "The", max_new_tokens=12) + "\n" != texts[0]
    assert texts[2]
    other = save_tiny("llama", tmp_path / "other", seed=7)
    assert cli.main(["generate", str(other), "The", "--adapter", adapter]) == 2
    assert "trained beside other weights" in capsys.readouterr().err
    assert cli.main(["generate", str(other), "The", "--adapter", str(base)]) == 2
    assert "No adapter in" in capsys.readouterr().err


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
