"""KV heads pooled by their means: the same as every head at its group's mean; plain, refitted, refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmslim.anatomy import Anatomy
from llmslim.calibration.stream import BlockStream, Lane
from llmslim.edit import parse_edit, replay
from llmslim.errors import UserError
from llmslim.pipeline import compress
from llmslim.pruning.edits import pool_kv_heads
from llmslim.pruning.kv_groups import KVGroups
from llmslim.recipe import Calibration
from llmslim.step import StepRecord, build_step
from tests.checkpoints import inputs_of, logits_of
from tests.reference import pooled_heads
from tests.tiny import meta_model, save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("verified_here")

QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=4, seq_len=32), "evaluation": None}
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe")


@torch.no_grad()
def at_their_means(model: PreTrainedModel, kv_heads: int) -> PreTrainedModel:
    """The unconverted model, each KV head at its group's mean."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_key_value_heads * head_dim
    for layer in model.model.layers:
        if config.model_type == "phi3":
            k, v = layer.self_attn.qkv_proj.weight.split(width)[-2:]
            tensors = [k, v]
        else:
            projections = (layer.self_attn.k_proj, layer.self_attn.v_proj)
            tensors = [t for p in projections for t in (p.weight, p.bias) if t is not None]
        for tensor in tensors:
            tensor.copy_(pooled_heads(tensor, kv_heads, head_dim))
    return model


@pytest.mark.parametrize(
    ("family", "before", "after"), [*((f, 4, 2) for f in GROUPED), ("llama", 4, 1), ("phi3", 2, 1)]
)
def test_surgery_equals_every_head_at_the_mean_of_its_group(family: str, before: int, after: int) -> None:
    model = tiny_model(family, num_key_value_heads=before)
    old = logits_of(model)
    edits = [pool_kv_heads(block, after) for block in Anatomy.of(model).blocks]
    pooled = at_their_means(tiny_model(family, num_key_value_heads=before), after)
    assert {block.attention.num_kv_heads for block in Anatomy.of(model).blocks} == {after}
    torch.testing.assert_close(logits_of(model), logits_of(pooled), rtol=1e-4, atol=1e-4)
    assert (logits_of(model) - old).abs().max() > 0.1
    inputs = {key: value[:1] for key, value in inputs_of(model).items()}
    text = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    assert torch.equal(model.generate(**inputs, **text), pooled.generate(**inputs, **text))
    for either in (model, pooled):
        either.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(model), logits_of(pooled), rtol=1e-4, atol=1e-4)
    meta = meta_model(family, num_key_value_heads=before)
    replay(meta, [parse_edit(json.loads(json.dumps(edit.to_json()))) for edit in edits])
    shapes = [{n: p.shape for n, p in one.named_parameters()} for one in (meta, model)]
    assert shapes[0] == shapes[1] and all(parameter.is_meta for parameter in meta.parameters())


def pass_through(
    model: PreTrainedModel, step: KVGroups, tokens: Tensor
) -> tuple[dict[str, Tensor], StepRecord]:
    """Convert the first block; its o inputs before and after by hand, on the same hidden states."""
    model.config.use_cache = False  # as in a run
    stream, record, seen = BlockStream(model, torch.device("cpu"), torch.float32), StepRecord(), {}
    lane = Lane.of_tokens("calibration", tokens, False)
    stream.add(lane)
    stack = stream.anatomy.stacks[0]
    stream.enter(stack)
    name, start = stack.blocks[0].attention.o.name, list(lane.hidden)
    seen["before"] = torch.cat(stream.inputs_of(stack.blocks[0], lane, [name])[name]).flatten(0, -2)
    lane.hidden[:] = start
    step.compress_block(stack.blocks[0], stream, None, record)
    seen["behind"] = torch.cat(lane.hidden)
    lane.hidden[:] = start
    seen["after"] = torch.cat(stream.inputs_of(stack.blocks[0], lane, [name])[name]).flatten(0, -2)
    seen["again"] = torch.cat(lane.hidden)
    return seen, record


def test_the_refit_is_least_squares_on_the_inputs_of_the_block() -> None:
    tokens = torch.randint(5, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    model = tiny_model("llama", num_key_value_heads=4)
    projection = model.model.layers[0].self_attn.o_proj
    old = projection.weight.detach().clone()
    seen, record = pass_through(model, KVGroups(kv_heads=2, refit_damping=1e-9), tokens)
    target = seen["before"].double() @ old.T.double()
    best = torch.linalg.lstsq(seen["after"].double(), target).solution.T
    torch.testing.assert_close(projection.weight.double(), best, rtol=1e-3, atol=1e-3)
    assert torch.equal(seen["behind"], seen["again"])  # the lane went on through the refitted block
    error = float((target - seen["after"].double() @ best.T).square().sum() / target.square().sum())
    (row,) = record.linears
    assert (row["kept"], row["total"], row["tokens"]) == (2, 4, 512)
    assert row["output_error"] == pytest.approx(error, rel=1e-2)
    bare = float((target - seen["after"].double() @ old.T.double()).square().sum() / target.square().sum())
    assert 0 < error < 0.9 * bare


def test_heads_that_are_alike_already_lose_nothing() -> None:
    tokens = torch.randint(5, 512, (4, 32), generator=torch.Generator().manual_seed(0))
    alike = at_their_means(tiny_model("qwen2", num_key_value_heads=4), 2)
    old = logits_of(alike)
    _, record = pass_through(alike, KVGroups(), tokens)
    assert record.linears[0]["kept"] == 2 and record.linears[0]["output_error"] < 1e-6
    torch.testing.assert_close(logits_of(alike), old, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "fields"),
    [("llama", {}), ("qwen2", {"refit": False}), ("qwen3", {"kv_heads": 1}), ("phi3", {}), ("mixtral", {})],
)
def test_the_result_is_plain_and_loads(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    source = save_tiny(family, tmp_path / "source")
    step = build_step("kv_groups", fields)
    report = compress(str(source), [step], tmp_path / "out", **QUICK).report
    assert report["verification"]["ok"] and report["verification"]["max_error"] == 0
    assert all((row["what"], row["kept"], row["total"]) == ("KV heads", 1, 2) for row in report["linears"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["num_key_value_heads"], config["num_attention_heads"]) == (1, 4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    if step.needs_calibration:
        return
    by_hand = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    by_hand = at_their_means(by_hand, 1)
    torch.testing.assert_close(logits_of(model), logits_of(by_hand), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_pooled_is_refused_in_words() -> None:
    for family, overrides, fields, words in (
        ("gpt2", {}, {}, "config of a gpt2 model has no num_key_value_heads"),
        ("bert", {}, {}, "no num_key_value_heads"),
        ("llama", {"num_key_value_heads": 1}, {}, "has one KV head"),
        ("llama", {"num_key_value_heads": 4}, {"kv_heads": 3}, "kv_heads 3 is no .*possible: 1, 2"),
        ("llama", {"num_key_value_heads": 4}, {"kv_heads": 4}, "kv_heads 4 is no .*possible: 1, 2"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            build_step("kv_groups", fields).check(Anatomy.of(meta_model(family, **overrides)))
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="does not fit the model"):
        replay(
            meta_model("llama"),
            [parse_edit({"edit": "pool_kv_heads", "block": "model.layers.0", "kv_heads": 4})],
        )


def test_a_quantized_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    steps = [build_step("rtn", {"group_size": 16}), build_step("kv_groups", {})]
    source = save_tiny("llama", tmp_path / "source")
    with pytest.raises(UserError, match="prune before you quantize"):
        compress(str(source), steps, tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()
