"""Quantized KV caches: nothing changes at 16 bits, codes are those of the formulas, packed reading is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llmslim
from llmslim.errors import UserError
from llmslim.kvcache import basis, codec, planes
from llmslim.kvcache.runtime import native
from llmslim.kvcache.runtime.attention import attend, attention, read
from llmslim.kvcache.runtime.cache import KVCache, kv_cache
from llmslim.kvcache.runtime.layer import KVLayer, View
from llmslim.kvcache.settings import KVSettings
from llmslim.kvcache.store import read_setting, write_setting
from tests.reference import min_max, pack_planes
from tests.tiny import DECODERS, example_inputs, save_tiny, tiny_model

SMALL = {"group_size": 8, "window": 5, "sink": 3}
"""Settings under which texts of some forty tokens are mostly quantized."""


METHODS = ["kivi", "token", "rotated", "pca"]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {family: tiny_model(family) for family in DECODERS}


def padded(model: Any, seq: int = 24) -> dict[str, torch.Tensor]:
    inputs = example_inputs(model, batch=2, seq=seq)
    inputs["attention_mask"][0, :7] = 0
    return inputs


def settings_of(method: str, dim: int, heads: int = 2, **fields: Any) -> KVSettings:
    """Of one layer; the components of `pca` fall in size from 1 to a hundredth, in any directions."""
    if method == "pca":
        made = torch.Generator().manual_seed(dim)
        turn = torch.linalg.qr(torch.randn(heads, dim, dim, generator=made))[0]
        sizes = torch.logspace(0, -2, dim) * torch.tensor([1.0, 3.0]).repeat(heads)[:heads, None]
        sizes[1:] = sizes[1:].sqrt()  # heads of their own
        fields["components"] = (turn * sizes[:, None],)
    return KVSettings.of(method=method, **fields)


def filled(bits: int, method: str = "kivi", dim: int = 16, value_dim: int = 16, **fields: Any) -> KVLayer:
    """A layer of two sequences, two heads and 60 tokens, with some taken back out of its packed part."""
    torch.manual_seed(0)
    layer = KVLayer(settings_of(method, dim, bits=bits, **(SMALL | fields)), lambda: True)
    layer.update(torch.randn(2, 2, 60, dim), torch.randn(2, 2, 60, value_dim))
    layer.crop(-20)
    return layer


# ---- plumbing ----


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_sixteen_bits_change_nothing_in_any_way_of_generating(models: Any, family: str, packed: bool) -> None:
    model = models[family]
    inputs = padded(model)
    ways: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"do_sample": True}]
    for way in ways:
        torch.manual_seed(1)
        wanted = model.generate(**inputs, max_new_tokens=12, **way)
        torch.manual_seed(1)
        with kv_cache(model, bits=16, packed=packed, **SMALL):
            assert torch.equal(model.generate(**inputs, max_new_tokens=12, **way), wanted), way


@pytest.mark.parametrize("family", DECODERS)
def test_logits_are_those_of_the_whole_cache_chunk_by_chunk(models: Any, family: str) -> None:
    model = models[family]
    tokens = example_inputs(model, batch=2, seq=40)["input_ids"]
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
        with kv_cache(model, bits=16, **(SMALL | {"window": 0})):
            past, got = None, []
            for chunk in tokens.split([17, 1, 9, 1, 12], 1):
                out = model(chunk, past_key_values=past, use_cache=True)
                past = out.past_key_values
                got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), wanted, rtol=1e-4, atol=1e-4)
    assert any(layer.pages for layer in past.layers)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_assisted_decoding_takes_tokens_back(models: Any, family: str) -> None:
    model, assistant = models[family], tiny_model(family, seed=0)
    next(assistant.parameters()).data.add_(0.02)  # so that it is sometimes wrong
    inputs = example_inputs(model, batch=1, seq=24)
    wanted = model.generate(**inputs, max_new_tokens=16)
    with kv_cache(model, bits=16, **SMALL):
        assert torch.equal(model.generate(**inputs, max_new_tokens=16, assistant_model=assistant), wanted)
        assert torch.equal(model.generate(**inputs, max_new_tokens=16, prompt_lookup_num_tokens=3), wanted)


def test_a_conversation_goes_on_and_a_prefix_is_used_again(models: Any) -> None:
    model = models["llama"]
    tokens = example_inputs(model, batch=1, seq=60)["input_ids"]
    cache = KVCache(model.config, bits=16, **SMALL)
    model.generate(tokens[:, :30], past_key_values=cache, max_new_tokens=1)
    assert torch.equal(
        model.generate(tokens, past_key_values=cache, max_new_tokens=8),
        model.generate(tokens, max_new_tokens=8),
    )
    cache.crop(30 - cache.get_seq_length())
    other = torch.cat([tokens[:, :30], tokens[:, 40:]], 1)
    assert torch.equal(
        model.generate(other, past_key_values=cache, max_new_tokens=8),
        model.generate(other, max_new_tokens=8),
    )
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0


def test_the_batch_is_reordered_repeated_and_selected_in_every_part() -> None:
    layer = filled(4)
    keys, values = layer.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16))[0].dense()
    for change, rows in (
        (lambda: layer.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda: layer.reorder_cache(torch.tensor([3, 0, 1, 1])), [1, 0, 0, 0]),
        (lambda: layer.batch_select_indices(torch.tensor([0, 2])), [1, 0]),
    ):
        change()
        now = View(layer.sink, tuple(layer.pages), layer.tail, layer.codecs, layer.settings).dense()
        assert torch.equal(now[0], keys[rows]) and torch.equal(now[1], values[rows])


def test_within_the_context_alone(models: Any) -> None:
    model = models["llama"]
    before = model.config._attn_implementation
    with kv_cache(model, bits=4, **SMALL):
        assert model.config._attn_implementation == "llmslim"
        assert isinstance(model(torch.ones(1, 3, dtype=torch.long)).past_key_values, KVCache)
    assert model.config._attn_implementation == before
    assert not isinstance(model(torch.ones(1, 3, dtype=torch.long)).past_key_values, KVCache)
    assert "_prepare_cache_for_generation" not in vars(model)


# ---- codes ----


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_planes(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 24), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = planes.pack(codes, bits)
    assert torch.equal(packed, pack_planes(codes, bits)) and packed.shape[1] == 24 * bits // 8
    assert torch.equal(planes.unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_kivi_is_a_grid_per_channel_for_keys_and_per_token_for_values(bits: int) -> None:
    keys, values = codec.codecs(KVSettings(bits=bits, group_size=8), 16, 16, torch.device("cpu"))
    x = torch.randn(1, 1, 8, 16, generator=torch.Generator().manual_seed(0))
    per_channel = torch.stack([min_max(x[0, 0, :, d], bits) for d in range(16)], 1)
    torch.testing.assert_close(keys.decode(keys.encode(x))[0, 0], per_channel)
    per_token = torch.stack([torch.cat([min_max(part, bits) for part in row.split(8)]) for row in x[0, 0]])
    torch.testing.assert_close(values.decode(values.encode(x))[0, 0], per_token)


@pytest.mark.parametrize("bits", [2, 3])
def test_the_searched_range_is_never_worse_than_the_whole(bits: int) -> None:
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    codes, scale, low = codec.quantize(x, bits)
    error = (low.float()[:, None] + scale.float()[:, None] * codes - x).square().sum(-1)
    whole = torch.stack([(min_max(row, bits) - row).square().sum() for row in x])
    assert (error <= whole * 1.001).all() and error.sum() < 0.9 * whole.sum()


@pytest.mark.parametrize("dim", [16, 24])
def test_the_rotation_is_one_and_its_error_that_of_the_levels(dim: int) -> None:
    turn = basis.rotation(dim)
    torch.testing.assert_close(turn @ turn.T, torch.eye(dim), rtol=0, atol=1e-5)
    # the mean squared errors of Lloyd's levels for a Gaussian (Max 1960): of 2 and 4 bits
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for bits, error in ((2, 0.1175), (4, 0.009497)):
        levels = basis.gaussian_levels(bits)
        near = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
        assert float((near - x).square().mean()) == pytest.approx(error, rel=0.02)


def test_a_rotated_block_leaves_its_mean_out_where_that_is_nearer() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 64, 64) + 5 * torch.randn(64)
    x[:, :, [7, 40]] = 0.1 * torch.randn(2, 64)  # unlike the others
    one = basis.Rotated(64, 2, 64, True, torch.device("cpu"))
    codes, size, mean = one.encode(x)
    assert torch.signbit(size).nonzero()[:, -1].tolist() == [7, 40]
    torch.testing.assert_close(mean[0, 0, 0].float(), (x[0, 0].mean(0) @ one.basis), rtol=1e-2, atol=1e-2)
    error = (one.decode((codes, size, mean)) - x)[0, 0].square().mean(-1)
    rest = x[0, 0] - x[0, 0].mean(0)
    rest[[7, 40]] = x[0, 0, [7, 40]]
    share = error / rest.square().mean(-1)
    assert share.mean() == pytest.approx(0.1175, rel=0.2)  # of a Gaussian in four levels, of what is left
    assert error.mean() < 0.1 * 0.1175 * x.square().mean()  # without the mean it would be of all


@pytest.mark.parametrize("method", METHODS)
def test_more_bits_are_nearer(method: str) -> None:
    errors = []
    for bits in (2, 3, 4, 8):
        layer, whole = filled(bits, method), filled(16)
        errors.append(float((layer.pages[0].tokens and _dense(layer)[0] - _dense(whole)[0]).square().sum()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01 * errors[0]


def _dense(layer: KVLayer) -> tuple[torch.Tensor, torch.Tensor]:
    assert layer.tail is not None
    return View(layer.sink, tuple(layer.pages), layer.tail, layer.codecs, layer.settings).dense()


def test_a_token_is_quantized_once_and_stays_so() -> None:
    torch.manual_seed(0)
    layer = KVLayer(KVSettings(bits=2, **SMALL), lambda: True)  # type: ignore[arg-type]
    seen: dict[int, torch.Tensor] = {}
    exact = torch.randn(1, 1, 90, 16)
    for count in [20, *[1] * 30, 25, -37, 1, 1, 12]:
        if count < 0:
            layer.crop(count)
        else:
            new = exact[:, :, layer.length : layer.length + count]
            layer.update(new, new)
        packed = layer.length - layer.tail[0].shape[2]  # type: ignore[index]
        now = _dense(layer)[0][0, 0]
        assert torch.equal(now[:3], exact[0, 0, :3]) and torch.equal(
            now[packed:], exact[0, 0, packed : layer.length]
        )
        seen = {place: token for place, token in seen.items() if place < packed}
        for place in range(3, packed):
            assert torch.equal(seen.setdefault(place, now[place]), now[place])
    assert len(layer.pages) == 2  # the first was cut, and another begun behind it


@pytest.mark.parametrize("method", METHODS)
def test_a_long_prompt_is_quantized_part_by_part_to_the_same(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(method, 16, bits=2, group_size=8, window=0, sink=0)
    keys, values = torch.randn(2, 1, 2, 80, 16)
    views = []
    for at_once in (80, 24):
        monkeypatch.setattr("llmslim.kvcache.runtime.layer.ENCODED", at_once)
        layer = KVLayer(settings, lambda: True)
        layer.update(keys, values)
        views.append(layer.pages[0])
    for whole, parts in zip(views[0].keys + views[0].values, views[1].keys + views[1].values, strict=True):
        assert torch.equal(whole, parts)


def test_bytes_promised_are_bytes_held() -> None:
    cache = KVLayer(KVSettings(bits=4))
    cache.update(torch.randn(1, 2, 1000, 64).bfloat16(), torch.randn(1, 2, 1000, 64).bfloat16())
    blocks = (1000 - 4 - 128) // 64
    packed = blocks * 64 * 2 * 2 * 64 * (4 + 32 / 64) / 8  # a scale and a minimum of 16 bits for 64 numbers
    assert cache.nbytes == packed + (1000 - blocks * 64) * 2 * 2 * 64 * 2


# ---- attention ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_reading_packed_is_writing_out_then_attending(bits: int, method: str) -> None:
    layer = filled(bits, method, 16, 24)
    view = layer.update(torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 24))[0]
    query = torch.randn(2, 6, 3, 16)
    mask = torch.ones(43, 43, dtype=torch.bool).tril()[-3:].expand(2, 1, 3, 43).clone()
    mask[0, :, :, :9] = False
    got = attend(query, read(view), mask, 0.3)
    keys, values = (part.repeat_interleave(3, 1) for part in view.dense())
    wanted = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, scale=0.3)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(native.library() is None, reason="the C library is not built")
@pytest.mark.parametrize("dims", [(16, 24, 8), (64, 64, None), (80, 80, None), (32, 64, 32)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (8, 8), (4, 2)])
def test_the_c_code_is_the_same_attention(
    bits: tuple[int, int], method: str, dims: tuple[int, int, int | None]
) -> None:
    key_dim, value_dim, group = dims
    for dtype, softcap, masked in ((torch.float32, None, True), (torch.bfloat16, 5.0, False)):
        torch.manual_seed(0)
        sizes = {"bits": bits[0], "value_bits": bits[1], "group_size": group, "window": 20}
        settings = settings_of(method, key_dim, **sizes)
        layer = KVLayer(settings, lambda: True)
        layer.update(
            torch.randn(2, 2, 230, key_dim, dtype=dtype), torch.randn(2, 2, 230, value_dim, dtype=dtype)
        )
        layer.crop(-70)
        new = torch.randn(2, 2, 1, key_dim, dtype=dtype), torch.randn(2, 2, 1, value_dim, dtype=dtype)
        view = layer.update(*new)[0]
        query = torch.randn(2, 10, 1, key_dim, dtype=dtype)
        mask = torch.rand(2, 1, 1, 161) > 0.3 if masked else None
        assert native.serves(query, view, mask)
        got = native.attend(query, view, mask, 0.3, softcap)
        wanted = attend(query.float(), read(view), mask, 0.3, softcap)
        torch.testing.assert_close(
            got.float(), wanted, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-2
        )


def test_who_sees_nothing_gets_nothing_and_a_sink_score_takes_its_share() -> None:
    layer = filled(4)
    view = layer.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16))[0]
    query, none = torch.randn(2, 4, 1, 16), torch.zeros(2, 1, 1, 41, dtype=torch.bool)
    assert not attend(query, read(view), none, 0.3).any()
    if native.library() is not None:
        assert not native.attend(query, view, none, 0.3).any()
    alone = attend(query, read(view), None, 0.3)
    shared, _ = attention(
        torch.nn.Module(), query, view, view, None, scaling=0.3, s_aux=torch.full((4,), 50.0)
    )
    assert shared.abs().max() < 1e-3 * alone.abs().max()


# ---- bad input ----


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bits": 5}, "bits = 5"),
        ({"bits": 4, "group_size": 12}, "multiple of 8: give 32"),
        ({"bits": 4, "group_size": 32}, "16 channels of a head; there fit 8, 16"),
        ({"bit": 4}, "did you mean 'bits'"),
        ({"window": -1}, "window = -1"),
    ],
)
def test_settings_that_do_not_fit(models: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        KVCache(models["llama"].config, **fields)


def test_a_cache_of_another_model_and_a_context_that_is_too_long(models: Any) -> None:
    cache = KVCache(models["llama"].config, bits=8, **SMALL)
    tokens = torch.ones(1, 4, dtype=torch.long)
    models["llama"](tokens, past_key_values=cache)
    with pytest.raises(UserError, match="a cache belongs to one model"):
        models["qwen3"](tokens, past_key_values=cache)
    with pytest.raises(UserError, match="more than the 512 positions"):
        models["llama"](torch.ones(1, 510, dtype=torch.long), past_key_values=cache)
    deeper = tiny_model("llama", num_hidden_layers=4)
    with pytest.raises(UserError, match="made for a model of 3 layers"):
        deeper(tokens, past_key_values=KVCache(models["llama"].config, bits=8, **SMALL))


def test_attention_that_cannot_be_intercepted_is_named_and_served_plainly() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=2)).eval()
    tokens = torch.randint(5, 500, (1, 30))
    wanted = model.generate(tokens, max_new_tokens=8)
    with (
        pytest.warns(UserWarning, match="BloomForCausalLM is written out"),
        kv_cache(model, bits=16, **SMALL),
    ):
        assert torch.equal(model.generate(tokens, max_new_tokens=8), wanted)


def test_no_cache_to_quantize() -> None:
    with pytest.raises(UserError, match="takes a causal language model"), kv_cache(tiny_model("t5"), bits=4):
        pass


# ---- checkpoints ----


def test_a_checkpoint_keeps_the_setting_and_load_honours_it(tmp_path: Path, verified_here: None) -> None:
    source = save_tiny("llama", tmp_path / "m")
    step = llmslim.QuantizeCache(kv_bits=4, kv_group_size=8, kv_window=5)
    result = llmslim.compress(str(source), [step], tmp_path / "out", evaluation=None)
    assert read_setting(result.folder) == step.settings
    model, _ = llmslim.load(str(result.folder))
    cache = model(torch.ones(1, 30, dtype=torch.long)).past_key_values
    assert isinstance(cache, KVCache) and cache.settings == step.settings and cache.layers[0].pages


def test_a_setting_is_not_trusted(tmp_path: Path) -> None:
    write_setting(tmp_path, KVSettings())
    assert read_setting(tmp_path) == KVSettings()
    for bad in ({"bits": 7}, {"bits": 4, "code": "x"}, "4", ["bits"]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"llmslim_kv_cache": bad}))
        with pytest.raises(UserError, match="generation_config.json"):
            read_setting(tmp_path)


# ---- the command line ----


def test_generate_and_evaluate_take_bits(tmp_path: Path, capsys: Any) -> None:
    from llmslim.cli import main

    folder = str(save_tiny("llama", tmp_path / "m"))
    assert main(["generate", folder, "import", "--max-new-tokens", "3", "--kv-bits", "4"]) == 0
    shared = [
        "--windows",
        "1",
        "--seq-len",
        "384",
        "--dtype",
        "float32",
        "--json",
    ]  # read quantized from 256 on
    capsys.readouterr()
    assert (
        main(["evaluate", folder, "--base", folder, "--kv-bits", "2", "--kv-method", "token", *shared]) == 0
    )
    figures = json.loads(capsys.readouterr().out)
    assert figures["kl"] > 0 and figures["kv_cache"] | {"bits": 2, "method": "token"} == figures["kv_cache"]
    assert main(["evaluate", folder, "--kv-method", "token", *shared]) != 0
    assert "give --kv-bits too" in capsys.readouterr().err
