"""Bits per layer: the allocation against trying all, what is measured, and the setting that comes of it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import llmslim
from llmslim.cli import main
from llmslim.errors import UserError
from llmslim.kvcache.allocation import CHOICES, allocate, allocate_kv_bits, measure, shared_out
from llmslim.kvcache.runtime.cache import KVCache, kv_cache
from llmslim.kvcache.settings import KVSettings
from llmslim.kvcache.store import QuantizeCache, read_setting
from tests import tiny

SMALL: dict[str, Any] = {"group_size": 8, "window": 8, "sink": 2}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny.tiny_model("llama").eval()


@pytest.fixture(scope="module")
def tokens(model: PreTrainedModel) -> Tensor:
    return tiny.example_inputs(model, batch=2, seq=60)["input_ids"]


@pytest.mark.parametrize("seed", range(6))
def test_allocation_is_the_best_of_all(seed: int) -> None:
    generator = random.Random(seed)
    sizes = [generator.choice([1, 2, 5]) for _ in range(5)]
    damage = [[generator.random() / 2**bits for bits in CHOICES] for _ in sizes]
    damage[2][1] = damage[2][0] * 2  # measured damage need not fall with the bits
    for budget in (2.0, 2.7, 3.0, 4.5, 8.0):
        chosen = allocate(damage, sizes, budget)

        def cost(bits: Any) -> float:
            return sum(b * n for b, n in zip(bits, sizes, strict=True)) / sum(sizes)

        def lost(bits: Any) -> float:
            return sum(row[CHOICES.index(b)] for row, b in zip(damage, bits, strict=True))

        ways = [bits for bits in itertools.product(CHOICES, repeat=5) if cost(bits) <= budget + 1e-9]
        assert cost(chosen) <= budget + 1e-9
        assert lost(chosen) == pytest.approx(min(map(lost, ways)), rel=1e-12)


def test_many_layers_take_no_time() -> None:
    generator = random.Random(0)
    damage = [[generator.random() / 2**bits for bits in CHOICES] for _ in range(80)]
    bits = allocate(damage, [3, 1] * 40, 3.0)
    assert sum(b * n for b, n in zip(bits, [3, 1] * 40, strict=True)) <= 3.0 * 160


@torch.no_grad()
def test_damage_is_the_divergence_with_one_layer_quantized(model: PreTrainedModel, tokens: Tensor) -> None:
    damage, sizes = measure(model, tokens, KVSettings(**SMALL))
    whole = model(tokens).logits.log_softmax(-1)
    with kv_cache(model, layer_bits=[16, (2, 16), 16], **SMALL):
        cache = KVCache(model.config, layer_bits=[16, (2, 16), 16], **SMALL)
        model(tokens[:, :18], past_key_values=cache)
        got = model(tokens[:, 18:], past_key_values=cache).logits.log_softmax(-1)
    expected = (whole[:, 18:].exp() * (whole[:, 18:] - got)).sum(-1).mean()
    assert damage[1, 0] == pytest.approx(float(expected), rel=1e-3)
    assert (damage > 0).all() and damage.shape == (3, 2)
    assert sizes.tolist() == [[2 * 60 * 32] * 2] * 3


def test_more_bits_go_where_two_cost_most() -> None:
    damage = torch.tensor([[0.01, 0.001], [0.5, 0.02], [0.01, 0.001]])
    assert shared_out(damage, torch.ones(3, 2, dtype=torch.int64), 2.0) == [(2, 2)] * 3
    assert shared_out(damage, torch.ones(3, 2, dtype=torch.int64), 2.34) == [(2, 2), (4, 2), (2, 2)]
    bits = shared_out(
        damage, torch.tensor([[1, 1], [4, 1], [1, 1]]), 3.0
    )  # large keys cost more of the budget
    assert sum(k * n + v for (k, v), n in zip(bits, (1, 4, 1), strict=True)) <= 27


def test_windows_of_sliding_layers_count_less() -> None:
    model = tiny.tiny_model("gemma2").eval()
    tokens = tiny.example_inputs(model, batch=1, seq=40)["input_ids"]
    _, sizes = measure(model, tokens, KVSettings(**SMALL))
    assert sizes[1].tolist() == [40 * 32] * 2 and sizes[0, 0] == sizes[2, 0] < sizes[1, 0]


def test_settings_with_bits_per_layer(model: PreTrainedModel, tokens: Tensor) -> None:
    done: list[tuple[int, int]] = []
    settings = allocate_kv_bits(model, tokens, 3.0, lambda *at: done.append(at), method="token", **SMALL)
    assert sum(keys + values for keys, values in settings.layer_bits) <= 18 and settings.method == "token"
    assert done[-1] == (12, 12)
    again = KVSettings.of(**settings.model_dump(exclude_unset=True, mode="json"))
    assert again == settings
    with torch.no_grad(), kv_cache(model, settings=settings):
        cache = model(tokens, use_cache=True).past_key_values
        model.generate(tokens, max_new_tokens=12, do_sample=False)
    assert [(one.settings.bits, one.settings.of_values) for one in cache.layers] == list(settings.layer_bits)
    mixed = KVCache(model.config, bits=[2, 4, 8])
    assert [layer.settings.bits for layer in mixed.layers] == [2, 4, 8]


def test_bytes_follow_the_bits(model: PreTrainedModel, tokens: Tensor) -> None:
    held = []
    for bits in (2, 8, [2, 8, 2], [2, (8, 2), 2]):
        with torch.no_grad(), kv_cache(model, bits=bits, **SMALL):
            held.append(model(tokens, use_cache=True).past_key_values.nbytes)
    assert held[2] == held[0] + (held[1] - held[0]) / 3
    assert held[3] == held[0] + (held[1] - held[0]) / 6
    with torch.no_grad(), kv_cache(model, bits=8, value_bits=2, **SMALL):
        assert model(tokens, use_cache=True).past_key_values.nbytes == (held[0] + held[1]) / 2


def test_refuses_what_cannot_be(model: PreTrainedModel, tokens: Tensor) -> None:
    with pytest.raises(UserError, match=r"A budget of 1\.5 bits is out of reach"):
        allocate_kv_bits(model, tokens, 1.5)
    with pytest.raises(UserError, match="Windows of 60 tokens are too short"):
        allocate_kv_bits(model, tokens, 3.0)
    with pytest.raises(UserError, match="for 2 attention layers, and this model has 3"):
        KVCache(model.config, layer_bits=[2, 4])
    with pytest.raises(UserError, match="layer_bits say how many bits, and so do bits"):
        KVSettings.of(bits=4, layer_bits=[2, 4, 4])
    with pytest.raises(UserError, match="layer_bits"):
        KVSettings.of(layer_bits=[2, 5, 4])
    with pytest.raises(UserError, match="both say"), kv_cache(model, settings=KVSettings(), bits=4):
        pass


def test_a_checkpoint_keeps_the_bits_that_were_measured(
    tmp_path: Path, verified_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = str(tiny.save_tiny("llama", tmp_path / "tiny")), tmp_path / "out"
    step = QuantizeCache(
        kv_bits="auto", kv_budget=3.0, kv_group_size=8, kv_window=8, kv_evict="knorm", kv_keep=0.5
    )
    calibration = {"text": str(Path(__file__).parent / "short.txt"), "num_samples": 1, "seq_len": 40}
    llmslim.compress(source, [step], output=output, calibration=calibration, evaluation=None)
    setting = read_setting(output)
    assert setting is not None and setting.evict == "knorm"
    assert sum(map(sum, setting.layer_bits)) <= 18
    model, _ = llmslim.load(output)
    words = model.generate(torch.full((1, 40), 5), max_new_tokens=12, do_sample=False)
    assert words.shape == (1, 52)
    with pytest.raises(UserError, match=r"A budget of 9 bits is out of reach"):
        llmslim.compress(source, [QuantizeCache(kv_bits="auto", kv_budget=9)], output=tmp_path / "no")
    path = output / "generation_config.json"
    path.write_text(path.read_text().replace('"layer_bits": [', '"layer_bits": [7, '))
    with pytest.raises(UserError, match="layer_bits"):
        llmslim.load(output)


@pytest.mark.parametrize("measured", [False, True])
def test_layers_do_not_go_from_under_bits_that_were_measured(
    measured: bool, tmp_path: Path, verified_here: None
) -> None:
    source = str(tiny.save_tiny("llama", tmp_path / "tiny"))
    bits: dict[str, Any] = {"kv_bits": "auto", "kv_budget": 3.0} if measured else {"kv_bits": 4}
    cache, fewer = QuantizeCache(**bits, kv_group_size=8, kv_window=8), llmslim.PruneLayers(drop=(1,))
    calibration = {"text": str(Path(__file__).parent / "short.txt"), "num_samples": 1, "seq_len": 40}
    options: dict[str, Any] = {"calibration": calibration, "evaluation": None}
    made = llmslim.compress(source, [cache], output=tmp_path / "made", **options).folder
    for number, (model, steps) in enumerate([(source, [cache, fewer]), (str(made), [fewer])]):
        output = tmp_path / f"out-{number}"
        if measured:
            with pytest.raises(
                UserError, match=("put kv_cache behind it", "take llmslim_kv_cache out")[number]
            ):
                llmslim.compress(model, steps, output=output, **options)
        else:
            assert llmslim.compress(model, steps, output=output, **options).report["verification"]["ok"]
    last = llmslim.compress(source, [fewer, cache], output=tmp_path / "last", **options)
    assert read_setting(last.folder) is not None


def test_verbs_measure_and_evict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(tiny.save_tiny("llama", tmp_path / "tiny"))
    generate = ["generate", source, "The first words", "--max-new-tokens", "3"]
    assert (
        main(
            [*generate, "--kv-bits", "auto", "--kv-budget", "3.0", "--kv-evict", "snapkv", "--kv-keep", "0.5"]
        )
        == 0
    )
    assert "bits of keys/values, layer by layer" in capsys.readouterr().err
    evaluate = ["evaluate", source, "--windows", "1", "--seq-len", "300"]
    assert main([*evaluate, "--kv-bits", "4", "--kv-evict", "knorm", "--kv-keep", "0.5"]) == 0
    assert "all but 0.5 (knorm)" in capsys.readouterr().out
    assert main([*generate, "--kv-bits", "auto"]) != 0
    assert "--kv-budget 3.0" in capsys.readouterr().err
    assert main([*evaluate, "--kv-bits", "4", "--kv-value-bits", "2"]) == 0
    assert "4/2 bits (kivi)" in capsys.readouterr().out
    assert main([*generate, "--kv-value-bits", "2"]) != 0
    assert "--kv-value-bits says how" in capsys.readouterr().err
    assert main([*generate, "--kv-evict", "knorm"]) != 0
    assert "go together" in capsys.readouterr().err
