"""Files that lack tensors, hold more than the config announces, or hold NaN: told where they are read."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmslim import compress
from llmslim.calibration.statistics import is_finite
from llmslim.checkpoint.load import load
from llmslim.checkpoint.reader import CheckpointReader
from llmslim.errors import UserError
from llmslim.loaders.models import find
from llmslim.prepare import prepare
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Recipe
from tests.checkpoints import logits_of, make
from tests.tiny import FAMILIES, save_tiny, tiny_model, tiny_tokenizer

UP = "model.layers.1.mlp.up_proj.weight"


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path, metadata={"format": "pt"})


def without(folder, name):
    rewrite(folder, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})


def refusal(folder):
    with pytest.raises(UserError, match="lacks 1 tensors") as refused:
        CheckpointReader(find(str(folder)))
    return str(refused.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_tensor_that_is_gone_is_named(family, tmp_path):
    folder = save_tiny(family, tmp_path / "model")
    CheckpointReader(find(str(folder)))
    names = sorted(load_file(folder / "model.safetensors"))
    for name in {names[0], names[len(names) // 2], names[-1]}:  # with experts in the layout of the files
        shutil.copytree(folder, tmp_path / name)
        without(tmp_path / name, name)
        assert f"such as {name}, that" in refusal(tmp_path / name)


def test_loading_and_planning_refuse(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    without(folder, UP)
    recipe = Recipe(steps=(RTN(bits=4, group_size=32),))
    for work in (lambda: load(str(folder)), lambda: prepare(str(folder), recipe)):
        with pytest.raises(UserError, match=f"lacks 1 tensors, such as {UP}"):
            work()


@pytest.mark.parametrize("form", ["llmslim", "compressed-tensors", "gptq"])
def test_a_packed_weight_without_its_scales_is_refused(form, tmp_path):
    step = RTN(bits=4, group_size=32, scale_dtype="float16")
    make(save_tiny("llama", tmp_path / "source"), tmp_path / "made", step, form)
    scale = UP.replace(".weight", ".scales" if form == "gptq" else ".weight_scale")
    without(tmp_path / "made", scale)
    with pytest.raises(UserError, match=f"such as {scale}"):
        load(str(tmp_path / "made"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found(value, dtype):
    tensor = torch.randn(100, 333).to(dtype)
    assert is_finite(tensor) and is_finite(tensor[:0])
    tensor[-1, -1] = value
    assert not is_finite(tensor)


def test_what_is_not_finite_is_named_as_it_is_read(tmp_path):
    """Also of a packed weight, and of what only the type of the run cannot hold."""
    source = save_tiny("llama", tmp_path / "source")
    rewrite(source, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * 1e6}))
    reader = CheckpointReader(find(str(source)))
    reader.fill([reader.model_skeleton()], None, torch.float32)
    with pytest.raises(UserError, match="model.norm.weight has .* larger ones than the type of the run"):
        reader.fill([reader.model_skeleton()], None, torch.float32, round_to=torch.float16)
    make(source, tmp_path / "made", RTN(bits=4, group_size=32), "compressed-tensors")
    scale = UP.replace(".weight", ".weight_scale")
    rewrite(tmp_path / "made", lambda t: t.update({scale: t[scale] * float("nan")}))
    with pytest.raises(UserError, match=f"{scale} has NaN"):
        load(str(tmp_path / "made"))


def test_what_transformers_puts_in_itself_is_not_missed(tmp_path):
    """A tied pair under its other name; names without the base model's prefix, and with it in excess."""
    folder = save_tiny("qwen2", tmp_path / "tied")
    rewrite(folder, lambda t: {k.replace("model.embed_tokens", "lm_head"): v for k, v in t.items()})
    bare = save_tiny("gpt2", tmp_path / "bare")
    rewrite(bare, lambda t: {k.removeprefix("transformer."): v for k, v in t.items()})
    for place, family in ((folder, "qwen2"), (bare, "gpt2")):
        model, _ = load(str(place), dtype=torch.float32)
        assert torch.equal(logits_of(model), logits_of(tiny_model(family)))


def test_a_fresh_head_may_be_missing_but_no_block(tmp_path):
    folder = save_tiny("bert", tmp_path / "bert")
    rewrite(folder, lambda t: {k: v for k, v in t.items() if not k.startswith("cls.")})
    with pytest.raises(UserError, match="such as cls.predictions"):
        CheckpointReader(find(str(folder)))
    CheckpointReader(find(str(folder)), fresh_head=True)
    without(folder, "bert.encoder.layer.1.output.dense.weight")
    with pytest.raises(UserError, match="such as bert.encoder.layer.1.output.dense.weight"):
        CheckpointReader(find(str(folder)), fresh_head=True)


def test_a_head_of_another_size_is_made_anew_but_no_block(tmp_path):
    folder = save_tiny("bert", tmp_path / "bert")

    def shorten(name):
        rewrite(folder, lambda t: t.update({name: t[name][1:].clone()}))

    shorten("cls.predictions.bias")
    with pytest.raises(UserError, match=r"cls.predictions.bias is .*\[511\], its config announces"):
        CheckpointReader(find(str(folder)))
    CheckpointReader(find(str(folder)), fresh_head=True)
    shorten("bert.encoder.layer.1.output.dense.weight")
    with pytest.raises(UserError, match="layer.1.output.dense.weight is .*, its config announces"):
        CheckpointReader(find(str(folder)), fresh_head=True)


def test_an_encoder_saved_without_a_pooler_is_one_all_the_same(tmp_path):
    """As from a model with a head that has none; the plan says that the pooler is at random."""
    tiny_model("bert").bert.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert not any("pooler" in name for name in load_file(tmp_path / "model.safetensors"))
    load(str(tmp_path))
    plan = prepare(str(tmp_path), Recipe(steps=(RTN(bits=4, group_size=32),))).plan
    assert plan.chosen == ("at random, as the files lack it: pooler.dense.weight, pooler.dense.bias",)
    without(tmp_path, "encoder.layer.1.output.dense.weight")
    assert "such as encoder.layer.1.output.dense.weight, that" in refusal(tmp_path)


def test_blocks_beyond_those_of_the_config_are_noted(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2, "layer_types": None}))
    plan = prepare(str(folder), Recipe(steps=(RTN(bits=4, group_size=32),), evaluation=None)).plan
    assert plan.chosen == ("left out, beyond the blocks that config.json counts: model.layers.2",)
    report = compress(str(folder), [RTN(bits=4, group_size=32)], tmp_path / "made", evaluation=None).report
    assert [note["where"] for note in report["notes"]] == ["model.layers.2"]


def test_two_tensors_where_the_config_ties_them_are_refused(tmp_path):
    """transformers computes with both; one would be lost, and what is measured be another model."""
    folder = save_tiny("qwen2", tmp_path / "model")
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    rewrite(folder, lambda tensors: {**tensors, head: tensors[embeddings].clone()})
    CheckpointReader(find(str(folder)))  # the same one twice, as some save it
    rewrite(folder, lambda tensors: {**tensors, head: torch.randn_like(tensors[embeddings])})
    recipe = Recipe(steps=(RTN(bits=4, group_size=32),))
    for work in (lambda: load(str(folder)), lambda: prepare(str(folder), recipe)):
        with pytest.raises(UserError, match=f"ties {head} to {embeddings}.* two different tensors"):
            work()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(load(str(folder))[0].get_output_embeddings().weight, plain.lm_head.weight)
