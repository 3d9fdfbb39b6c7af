"""Adapters merged later: exactly into dense weights, by quantizing anew into packed ones, never into another base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmslim import cli
from llmslim.checkpoint.load import load_model
from llmslim.errors import UserError
from llmslim.evaluation.run import evaluate
from llmslim.loaders.models import find
from llmslim.pipeline import compress
from llmslim.pruning.weights import Magnitude
from llmslim.quantization.bnb import BitsAndBytes
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Calibration
from llmslim.recovery.lora import LoRA, with_adapter
from llmslim.recovery.merge import Adapter, MergeAdapter
from tests.tiny import example_inputs, save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")
QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=8, seq_len=32), "evaluation": None}
KEEP = LoRA(max_steps=3, batch_size=4, lr=2e-2, rank=4, objective="next_token", save_adapter=True)
FIRST = {"gpt2": [], "dense": [], "sparse": [Magnitude(sparsity=0.5)], "packed": [RTN(bits=4, group_size=32)]}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with an adapter beside them."""
    from llmslim import pipeline
    from llmslim.checkpoint.verify import verify

    root = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify_in_fresh_process", verify)
        for name, steps in FIRST.items():
            base = save_tiny("gpt2" if name == "gpt2" else "llama", root / f"{name}-base")
            compress(str(base), [*steps, KEEP], root / name, **QUICK)
    return {name: root / name for name in FIRST}


def whole(folder: Path) -> Any:
    return load_model(find(str(folder)), torch.float32, torch.device("cpu"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**example_inputs(model)).logits


@pytest.mark.parametrize("name", ["gpt2", "dense"])
def test_into_dense_weights_exactly_and_without_a_text(
    name: str, kept: dict[str, Path], tmp_path: Path
) -> None:
    step = MergeAdapter(adapter=str(kept[name] / "adapter"))
    report = compress(str(kept[name]), [step], tmp_path / "out", **QUICK).report
    assert report["calibration"] is None
    beside = logits(with_adapter(whole(kept[name]), kept[name] / "adapter"))
    assert not torch.allclose(beside, logits(whole(kept[name])), atol=1e-2)
    torch.testing.assert_close(logits(whole(tmp_path / "out")), beside, atol=1e-4, rtol=1e-4)


def test_into_sparse_weights_only_where_they_are_kept(kept: dict[str, Path], tmp_path: Path) -> None:
    step = MergeAdapter(adapter=str(kept["sparse"] / "adapter"))
    report = compress(str(kept["sparse"]), [step], tmp_path / "out", **QUICK).report
    before, after = whole(kept["sparse"]), whole(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    weights = before.get_parameter(name), after.get_parameter(name)
    assert torch.equal(weights[0] == 0, weights[1] == 0) and not torch.equal(*weights)
    delta = Adapter(kept["sparse"] / "adapter").delta(name.removesuffix(".weight"))
    lost = float(delta[weights[0] == 0].norm() / delta.norm())
    notes = {note["where"]: note["what"] for note in report["notes"]}
    assert notes[name.removesuffix(".weight")].startswith(f"pruned weights stay zero: {lost:.0%} of what")


def test_a_base_of_the_same_shapes_is_another_one(kept: dict[str, Path], tmp_path: Path) -> None:
    other = save_tiny("llama", tmp_path / "other", seed=7)
    adapter = str(kept["dense"] / "adapter")
    with pytest.raises(
        UserError, match=r"trained beside other weights than those of .*/other \(model\.layers"
    ):
        compress(str(other), [MergeAdapter(adapter=adapter)], tmp_path / "out", **QUICK)
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(UserError, match="trained beside other weights"):
        evaluate(str(other), "builtin", adapter=adapter, seq_len=32, windows=1)
    plain = tmp_path / "plain"  # peft's own says nothing of its base
    shutil.copytree(adapter, plain)
    save_file(load_file(plain / "adapter_model.safetensors"), plain / "adapter_model.safetensors")
    compress(str(other), [MergeAdapter(adapter=str(plain))], tmp_path / "out", **QUICK)


def test_into_packed_weights_by_the_text_closer_than_by_rounding(
    kept: dict[str, Path], tmp_path: Path
) -> None:
    """Bits and groups are those of before, scales are new, and what is lost is reported."""
    beside = logits(with_adapter(whole(kept["packed"]), kept["packed"] / "adapter"))
    distance = {}
    for rounding in ("gptq", "nearest"):
        step = MergeAdapter(adapter=str(kept["packed"] / "adapter"), rounding=rounding)
        report = compress(str(kept["packed"]), [step], tmp_path / rounding, **QUICK).report
        rows = [row for row in report["linears"] if row.get("what") == "merged"]
        assert len(rows) == 21 and {row["bits"] for row in rows} == {4}
        assert all(("output_error" in row) == (rounding == "gptq") for row in rows)
        distance[rounding] = float((logits(whole(tmp_path / rounding)) - beside).square().mean())
    assert distance["gptq"] < distance["nearest"]
    before, after = whole(kept["packed"]), whole(tmp_path / "gptq")
    module = "model.layers.0.mlp.down_proj"
    one, two = before.get_submodule(module), after.get_submodule(module)
    assert one.scheme == two.scheme and not torch.equal(one.weight_scale, two.weight_scale)


def test_what_does_not_fit_is_refused_before_weights_are_read(kept: dict[str, Path], tmp_path: Path) -> None:
    adapter = kept["dense"] / "adapter"
    other = save_tiny("llama", tmp_path / "other", intermediate_size=96)
    shallow = save_tiny("llama", tmp_path / "shallow", num_hidden_layers=2)
    four = tmp_path / "nf4"
    compress(str(kept["dense"]), [BitsAndBytes()], four, **QUICK)
    for folder, words in (
        (other, r"does not fit this LlamaForCausalLM: model.layers.0.mlp.down_proj is \(64, 96\)"),
        (shallow, "it has no Linear model.layers.2"),
        (kept["gpt2"], "it has no Linear model.layers.0"),
        (four, "cannot merge into weights of bitsandbytes"),
    ):
        with pytest.raises(UserError, match=words):
            compress(str(folder), [MergeAdapter(adapter=str(adapter))], tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_what_is_no_plain_adapter_is_refused(
    kept: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(kept["dense"])
    assert cli.main(["recover", base, "--method", "merge", "--plan"]) == 2
    assert "Give --adapter FOLDER" in capsys.readouterr().err
    assert cli.main(["recover", base, "--method", "merge", "--adapter", base, "--plan"]) == 2
    assert "is no adapter" in capsys.readouterr().err
    shutil.copytree(kept["dense"] / "adapter", tmp_path / "dora")
    config = json.loads((tmp_path / "dora/adapter_config.json").read_text())
    (tmp_path / "dora/adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(UserError, match="has use_dora, and merge takes plain LoRA"):
        compress(base, [MergeAdapter(adapter=str(tmp_path / "dora"))], tmp_path / "out", **QUICK)
    (tmp_path / "dora/adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    with pytest.raises(UserError, match="began as 'pissa', for which peft changes the weights below it"):
        compress(base, [MergeAdapter(adapter=str(tmp_path / "dora"))], tmp_path / "out", **QUICK)
    (tmp_path / "dora/adapter_config.json").write_text(json.dumps(config))
    file = tmp_path / "dora/adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="lm_head.weight, and merge takes plain LoRA"):
        compress(base, [MergeAdapter(adapter=str(tmp_path / "dora"))], tmp_path / "out", **QUICK)


def test_from_the_command_line(
    kept: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"recover {kept['packed']} --method merge --adapter {kept['packed']}/adapter --num-samples 4 --seq-len 32"
    assert cli.main([*words.split(), "--no-evaluate", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/config.json").is_file() and not (tmp_path / "out/adapter").exists()
