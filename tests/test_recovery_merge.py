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
from llmslim.prepare import prepare
from llmslim.pruning.weights import Magnitude
from llmslim.quantization.bnb import BitsAndBytes
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Calibration, Recipe
from llmslim.recovery.lora import LoRA, with_adapter
from llmslim.recovery.merge import Adapter, MergeAdapter
from llmslim.recovery.scales import Scales
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


def test_another_base_is_refused_whatever_form_it_has(
    kept: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed and dense Linears cannot be compared: norms and tables can."""
    other, packed = str(save_tiny("llama", tmp_path / "other", seed=7)), tmp_path / "packed"
    compress(other, [RTN(bits=4, group_size=32)], packed, **QUICK)
    for name, model in (("packed", other), ("sparse", other), ("dense", str(packed))):
        adapter, out = kept[name] / "adapter", tmp_path / "out"
        words = ["recover", model, "--method", "merge", "--adapter", str(adapter), "--output", str(out)]
        assert cli.main([*words, "--no-evaluate"]) == 2
        assert "was trained beside other weights than those of" in capsys.readouterr().err
        assert not out.exists() and not (tmp_path / "out.partial").exists()
        with pytest.raises(UserError, match="trained beside other weights"):
            evaluate(model, "builtin", adapter=str(adapter), seq_len=32, windows=1)
    late = [
        RTN(bits=4, group_size=32),
        MergeAdapter(adapter=str(kept["dense"] / "adapter"), rounding="nearest"),
    ]
    with pytest.raises(UserError, match="trained beside other weights"):
        compress(other, late, tmp_path / "out", **QUICK)


def notes_of(model: Path, adapter: Path, out: Path) -> list[str]:
    """What the report of merging has to say of the base."""
    step = MergeAdapter(adapter=str(adapter), rounding="nearest")
    report = compress(str(model), [step], out, overwrite=True, **QUICK).report
    return [note["what"] for note in report["notes"] if note["where"] == "merge"]


def test_its_own_base_is_taken_whatever_form_it_has(kept: dict[str, Path], tmp_path: Path) -> None:
    out, base = tmp_path / "out", kept["dense"].with_name("dense-base")
    assert notes_of(kept["packed"].with_name("packed-base"), kept["packed"] / "adapter", out) == []
    compress(str(base), [RTN(bits=3, group_size=16)], tmp_path / "packed", **QUICK)
    assert notes_of(tmp_path / "packed", kept["dense"] / "adapter", out) == []
    trained = [Scales(max_steps=1, batch_size=2, objective="next_token")]
    compress(str(tmp_path / "packed"), trained, tmp_path / "trained", **QUICK)
    (note,) = notes_of(tmp_path / "trained", kept["dense"] / "adapter", out)
    assert note.startswith("7 of 9 norms, biases and other weights") and "layernorm" in note


def foreign(adapter: Path, folder: Path, base: str | None) -> Path:
    """The adapter as plain peft would have saved it."""
    shutil.copytree(adapter, folder)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file(load_file(file), file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    return folder


def test_the_base_that_an_adapter_names(kept: dict[str, Path], tmp_path: Path) -> None:
    """Ours names it without its place; of peft's own, which have nothing else, another one is told of."""
    ours = json.loads((kept["dense"] / "adapter/adapter_config.json").read_text())
    assert ours["base_model_name_or_path"] == "dense-base"
    for number, (base, words) in enumerate(
        {
            None: ["nothing in the adapter says which model it was trained beside"],
            "ann/other": [
                f"the adapter names ann/other as its base, and {kept['dense']} is not known to come from it"
            ],
            "ann/Dense-Base": [],  # by the report of what it is merged into
        }.items()
    ):
        adapter = foreign(kept["dense"] / "adapter", tmp_path / str(number), base)
        assert notes_of(kept["dense"], adapter, tmp_path / "out") == words


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
    assert "No adapter in" in capsys.readouterr().err
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


A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ([1], {}, "is not the config of an adapter of LoRA: what it holds"),
        ({"lora_alpha": None}, {}, "of LoRA: lora_alpha: Input should be a valid number"),
        ({"peft_type": "IA3"}, {}, "of LoRA: peft_type: Input should be 'LORA'"),
        ({"peft_type": None}, {}, "of LoRA: peft_type: Input should be 'LORA'"),
        ({"r": 0}, {}, "of LoRA: r: Input should be greater"),
        ("{", {}, "is damaged, so save or download it again"),
        ({}, {A: None}, f"it has {A.replace('lora_A', 'lora_B')}, and no {A}"),
        ({}, {A: torch.zeros(7, 64)}, r"which have not one rank"),
        ({}, {A: torch.zeros(0, 64)}, r"which have not one rank"),
    ],
)
def test_a_damaged_adapter_is_refused_by_all_who_take_one(
    config: Any, tensors: dict[str, Any], says: str, kept: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(kept["dense"] / "adapter", tmp_path / "a"))
    path, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    whole_config = {**json.loads(path.read_text()), **config} if isinstance(config, dict) else config
    path.write_text(config if isinstance(config, str) else json.dumps(whole_config))
    there = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in there.items() if tensor is not None}, file)
    beside = ["--adapter", str(folder)]
    for words in (
        ["recover", str(kept["dense"]), "--method", "merge", "--plan"],
        ["evaluate", str(kept["dense"])],
        ["generate", str(kept["dense"]), "word"],
    ):
        assert cli.main([*words, *beside]) == 2
        assert says in " ".join(capsys.readouterr().err.split())


def test_a_seal_that_is_no_seal(kept: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kept["dense"] / "adapter", tmp_path / "a"))
    file = folder / "adapter_model.safetensors"
    for entry in ("[1]", '{"a": 1}', "{"):
        save_file(load_file(file), file, metadata={"format": "pt", "llmslim_base": entry})
        with pytest.raises(UserError, match="the entry llmslim_base of its metadata is none"):
            prepare(str(kept["dense"]), Recipe(steps=(MergeAdapter(adapter=str(folder)),), **QUICK))


def test_from_the_command_line(
    kept: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"recover {kept['packed']} --method merge --adapter {kept['packed']}/adapter --num-samples 4 --seq-len 32"
    assert cli.main([*words.split(), "--no-evaluate", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/config.json").is_file() and not (tmp_path / "out/adapter").exists()
