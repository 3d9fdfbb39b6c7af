"""The FP8 KV cache of vLLM in a compressed-tensors checkpoint: its scales, and who reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.cache_utils import DynamicCache

import llmslim
from llmslim.checkpoint.formats import formats
from llmslim.errors import UserError
from llmslim.kvcache.fp8 import LARGEST, SCHEME, ScaleCache
from llmslim.loaders.models import find
from llmslim.loaders.texts import sample
from tests.tiny import example_inputs, save_tiny, tiny_model

RTN = llmslim.RTN(bits=4, group_size=32)
FP8 = llmslim.QuantizeCache(kv_fp8=True, kv_group_size=8)
TEXT = {"text": "builtin", "num_samples": 3, "seq_len": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with packed and with dense weights."""
    from llmslim import pipeline
    from llmslim.checkpoint.verify import verify

    root = tmp_path_factory.mktemp("fp8")
    source = save_tiny("llama", root / "source")
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify_in_fresh_process", verify)
        for name, steps in {"packed": [RTN, FP8], "dense": [FP8]}.items():
            result = llmslim.compress(
                str(source),
                steps,
                root / name,
                calibration=TEXT,
                evaluation=None,
                format="compressed-tensors",
            )
            assert result.report["verification"]["ok"] and result.report["format"] == "compressed-tensors"
            assert any("in FP8" in note["what"] for note in result.report["notes"])
            folders[name] = Path(result.folder)
    return folders


class Rounding(DynamicCache):
    """Keys and values through float8 e4m3, as vLLM stores them."""

    def __init__(self, scales: dict[str, Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scales = scales

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        rounded = []
        for what, states in (("k", keys), ("v", values)):
            scale = self.scales[f"model.layers.{layer}.self_attn.{what}_scale"]
            codes = (states / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
            rounded.append(codes.float() * scale)
        return super().update(*rounded, layer, *args, **kwargs)


def stored_scales(folder: Path) -> dict[str, Tensor]:
    return {
        name: one
        for name, one in load_file(folder / "model.safetensors").items()
        if name.endswith(("k_scale", "v_scale"))
    }


@pytest.mark.parametrize("name", ["packed", "dense"])
def test_the_scales_are_the_greatest_keys_and_values_by_448(made: dict[str, Path], name: str) -> None:
    folder = made[name]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == SCHEME and config["quant_method"] == "compressed-tensors"
    model, tokenizer = llmslim.load(str(folder), dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(sample("builtin", tokenizer, 3, 32, seed=0).tokens, past_key_values=cache)
    found = stored_scales(folder)
    assert len(found) == 2 * model.config.num_hidden_layers
    for index, layer in enumerate(cache.layers):
        for what, states in (("k", layer.keys), ("v", layer.values)):
            scale = found[f"model.layers.{index}.self_attn.{what}_scale"]
            assert scale.shape == (1,) and scale.item() == pytest.approx(
                float(states.abs().max()) / 448, rel=1e-5
            )
            assert torch.equal(getattr(model.model.layers[index].self_attn, f"{what}_scale"), scale)


@pytest.mark.parametrize("name", ["packed", "dense"])
def test_plain_transformers_rounds_as_vllm_does(
    made: dict[str, Path], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        plain = AutoModelForCausalLM.from_pretrained(made[name], dtype=torch.float32).eval()
    finally:
        logging.disable_propagation()
    assert not [one for one in caplog.records if one.levelname in ("WARNING", "ERROR")]
    ours, _ = llmslim.load(str(made[name]), dtype=torch.float32)
    inputs = example_inputs(ours)
    scales = stored_scales(made[name])
    with torch.no_grad():
        rounded = ours(**inputs, past_key_values=Rounding(scales, config=ours.config)).logits
        exact = ours(**inputs, past_key_values=DynamicCache(config=ours.config)).logits
        found = plain(**inputs).logits
    # another order of summing moves a few numbers over the edge between two codes
    assert (found - rounded).norm() < 0.2 * (found - exact).norm()
    if name == "dense":
        assert torch.allclose(found, rounded, atol=1e-4)
    prompt = inputs["input_ids"][:1, :8]
    assert plain.generate(prompt, max_new_tokens=4, do_sample=False).shape[1] >= 9


def test_it_is_read_again_and_another_scheme_is_not(made: dict[str, Path]) -> None:
    form, model = formats()["compressed-tensors"], tiny_model("llama")
    config = json.loads((made["packed"] / "config.json").read_text())["quantization_config"]
    edits = form.edits(config, model)
    assert [edit.module for edit in edits if isinstance(edit, ScaleCache)] == [
        f"model.layers.{index}.self_attn" for index in range(model.config.num_hidden_layers)
    ]
    again = form.config(edits, model, torch.float32)
    assert (
        again["kv_cache_scheme"] == SCHEME and again["config_groups"].keys() == config["config_groups"].keys()
    )
    for other in ({**SCHEME, "strategy": "attn_head"}, {**SCHEME, "num_bits": 4}, "fp8"):
        with pytest.raises(UserError, match="kv_cache_scheme"):
            form.edits({**config, "kv_cache_scheme": other}, model)


def test_where_it_has_no_place(made: dict[str, Path], tmp_path: Path) -> None:
    gpt2, opt = (save_tiny(family, tmp_path / family) for family in ("gpt2", "opt"))
    for model, steps, form, says in (
        (find(str(made["packed"])).spec, [FP8], "auto", "already"),
        (str(gpt2), [FP8], "auto", "h.0.attn is a GPT2Attention"),
        (str(opt), [FP8], "auto", "number of KV heads"),
        (str(made["packed"].parent / "source"), [FP8], "llmslim", "'compressed-tensors' only"),
        (
            str(made["packed"].parent / "source"),
            [llmslim.RTN(bits=5, group_size=32), FP8],
            "auto",
            "bit widths",
        ),
    ):
        with pytest.raises(UserError, match=says):
            llmslim.compress(model, steps, tmp_path / "out", calibration=TEXT, evaluation=None, format=form)
