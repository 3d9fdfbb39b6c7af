"""KV caches in principal components: the best bits, the components of a formula, checkpoints, and bad input."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import llmslim
from llmslim.errors import UserError
from llmslim.kvcache.basis import Components, Rotated, gaussian_error, gaussian_levels, spread
from llmslim.kvcache.components import fit_kv_components, moment, principal, with_components
from llmslim.kvcache.runtime.cache import KVCache, kv_cache
from llmslim.kvcache.settings import KVSettings
from llmslim.kvcache.store import COMPONENTS, FILE, KEY, read_setting
from tests.tiny import DECODERS, example_inputs, save_tiny, tiny_model

SMALL = {"group_size": 8, "window": 5, "sink": 3}


def tokens_of(model: Any, windows: int) -> torch.Tensor:
    return example_inputs(model, batch=windows, seq=40)["input_ids"]


def test_the_error_of_the_levels_is_that_of_numbers_drawn() -> None:
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    for bits in (1, 2, 3, 4):
        levels = gaussian_levels(bits)
        near = levels[(x[:, None] - levels).abs().argmin(1)]
        assert gaussian_error(bits) == pytest.approx(float((near - x).square().mean()), rel=0.02)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_bits_are_spread_in_the_best_of_all_ways(bits: int, seed: int) -> None:
    variance = torch.rand(5, generator=torch.Generator().manual_seed(seed)).pow(6).sort(descending=True)[0]
    found = spread(variance, bits).tolist()
    assert sum(found) == 5 * bits and found == sorted(found, reverse=True)

    def error(widths: tuple[int, ...]) -> float:
        return sum(v * gaussian_error(w) for v, w in zip(variance.tolist(), widths, strict=True))

    ways = [ways for ways in itertools.product(range(5), repeat=5) if sum(ways) == 5 * bits]
    assert error(tuple(found)) == pytest.approx(min(map(error, ways)))


def test_components_are_those_of_the_covariance() -> None:
    keys = torch.randn(1, 2, 68, 8, generator=torch.Generator().manual_seed(0)) @ torch.randn(8, 8)
    basis = principal(moment(keys, 3, 16))
    for head in range(2):
        blocks = [keys[0, head, at : at + 16] for at in (3, 19, 35, 51)]  # one token is left over
        covariance = sum(16 * torch.cov(block.T, correction=0) for block in blocks)
        scale = covariance.diagonal().mean()
        torch.testing.assert_close(basis[head] @ basis[head].T, covariance / scale, rtol=1e-3, atol=1e-3)
        lengths = basis[head].norm(dim=0)
        assert torch.equal(lengths, lengths.sort(descending=True)[0])
        off = basis[head].T @ basis[head]
        torch.testing.assert_close(off, torch.diag(lengths.square()), rtol=0, atol=1e-3)


def test_correlated_keys_lose_far_less_than_by_a_random_rotation() -> None:
    made = torch.Generator().manual_seed(0)
    mix = torch.randn(2, 32, 32, generator=made) * torch.logspace(0, -1.5, 32)
    x = torch.randn(1, 2, 256, 32, generator=made) @ mix.mT
    basis = principal(torch.stack([one.T @ one for one in x[0].double()]))
    codecs = Components(64, 2, basis), Rotated(64, 2, 32, True, torch.device("cpu"))
    errors = [float((one.decode(one.encode(x)) - x).square().mean()) for one in codecs]
    assert errors[0] < 0.5 * errors[1]
    sizes = [sum(part.numel() * part.element_size() for part in one.encode(x)) for one in codecs]
    assert sizes[0] == sizes[1]  # at the same bytes


def test_heads_have_bits_of_their_own_and_unpack_to_what_was_packed() -> None:
    even, steep = torch.eye(16), torch.diag(torch.logspace(0, -3, 16))
    one = Components(16, 2, torch.stack([even, steep]))
    assert one.widths[0].tolist() == [2] * 16 and one.widths[1, 0] == 4 and one.widths[1, -1] == 0
    x = torch.randn(3, 2, 48, 16, generator=torch.Generator().manual_seed(0)) @ one.basis.mT
    codes, size, mean = one.encode(x)
    assert codes.shape == (3, 2, 3, 16 * 16 * 2 // 8) and codes.dtype == torch.uint8
    decoded = one.decode((codes, size, mean))
    steps = decoded.unflatten(2, (-1, 16)) / one.variance.sqrt()[:, None, None]
    signed = torch.where(torch.signbit(size)[..., None], 0, mean.float()[..., None, :])
    levels = (steps - signed) / size.abs().float()[..., None]
    wanted = torch.cat([gaussian_levels(4), torch.zeros(1)])
    assert (levels[:, 1, ..., 0, None] - wanted).abs().min(-1)[0].max() < 1e-2
    assert levels[:, 1, ..., -1].abs().max() < 1e-2  # no bits: the mean alone


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_reads_packed_what_it_writes_out(family: str) -> None:
    model = tiny_model(family)
    tokens = tokens_of(model, 2)
    settings = fit_kv_components(model, tokens, bits=3, **SMALL)
    plain = DynamicCache(config=model.config)
    model(input_ids=tokens[:1], past_key_values=plain, use_cache=True)
    assert [len(one) for one in settings.components] == [layer.keys.shape[1] for layer in plain.layers]
    written = []
    for packed in (True, False):
        with torch.no_grad(), kv_cache(model, settings=settings, packed=packed):
            parts, cache = [], None
            for part in tokens[:1].split([30, 1, 1, 8], 1):
                output = model(input_ids=part, past_key_values=cache, use_cache=True)
                parts.append(output.logits)
                cache = output.past_key_values
            written.append(torch.cat(parts, 1))
    torch.testing.assert_close(written[0], written[1], rtol=1e-3, atol=1e-3)


def test_a_checkpoint_keeps_the_components(tmp_path: Path, verified_here: None) -> None:
    source = save_tiny("llama", tmp_path / "m")
    step = llmslim.QuantizeCache(kv_bits=2, kv_method="pca", kv_group_size=8, kv_window=5)
    calibration = llmslim.Calibration(text="builtin", num_samples=4, seq_len=64)
    result = llmslim.compress(str(source), [step], tmp_path / "out", calibration=calibration, evaluation=None)
    stored = load_file(result.folder / COMPONENTS)
    model, _ = llmslim.load(str(result.folder))
    cache = model(torch.ones(1, 40, dtype=torch.long)).past_key_values
    assert isinstance(cache, KVCache) and cache.settings.method == "pca" and cache.layers[0].pages
    assert [torch.equal(stored[str(i)], one) for i, one in enumerate(cache.settings.components)] == [True] * 3
    again = llmslim.compress(
        str(result.folder), [llmslim.RTN(bits=8)], tmp_path / "8bit", calibration=calibration, evaluation=None
    )
    assert read_setting(again.folder) is not None  # a later run takes the components along
    # a file that is not what it was
    save_file({"0": torch.full((2, 8, 8), torch.nan)}, result.folder / COMPONENTS)
    with pytest.raises(UserError, match=r"kv_cache/components.safetensors has other tensors"):
        read_setting(result.folder)
    (result.folder / COMPONENTS).unlink()
    with pytest.raises(UserError, match=r"kv_cache/components.safetensors cannot be read"):
        read_setting(result.folder)


def test_bits_by_sensitivity_and_components_together(tmp_path: Path, verified_here: None) -> None:
    source = save_tiny("llama", tmp_path / "m")
    step = llmslim.QuantizeCache(
        kv_bits="auto", kv_budget=2.5, kv_method="pca", kv_group_size=8, kv_window=5, kv_sink=0
    )
    calibration = llmslim.Calibration(text="builtin", num_samples=1, seq_len=64)
    result = llmslim.compress(str(source), [step], tmp_path / "out", calibration=calibration, evaluation=None)
    setting = read_setting(result.folder)
    assert setting is not None and setting.method == "pca" and len(setting.components) == 3
    assert sum(map(sum, setting.layer_bits)) <= 2.5 * 6


def test_bad_input(tmp_path: Path) -> None:
    model, other = tiny_model("llama"), tiny_model("qwen3")
    with pytest.raises(UserError, match="measured on a text first"):
        KVCache(model.config, method="pca", bits=2)
    with pytest.raises(UserError, match=r"too short to measure the keys on.*a block has 128"):
        fit_kv_components(model, tokens_of(model, 1))
    settings = fit_kv_components(model, tokens_of(model, 1), bits=2, **SMALL)
    wrong = settings.model_copy(update={"components": settings.components[:1]})
    with pytest.raises(UserError, match=r"components are of 1 layers"):
        KVCache(other.config, wrong)
    with pytest.raises(UserError, match="components are tensors"):
        KVSettings.of(method="pca", components=[[1.0]])
    (tmp_path / FILE).write_text(json.dumps({KEY: {"method": "pca", "bits": 2, "components": ["x"]}}))
    with pytest.raises(UserError, match="components are tensors"):
        read_setting(tmp_path)


@pytest.mark.parametrize(
    "basis",
    [torch.zeros(2, 16, 16), torch.full((2, 16, 16), torch.nan), torch.ones(2, 16, 16), torch.ones(16)],
)
def test_components_that_have_no_inverse_are_refused(basis: torch.Tensor, tmp_path: Path) -> None:
    good = torch.eye(16).expand(2, 16, 16)
    with pytest.raises(
        UserError, match=r"components of layer 1 are no bases .* measure them again"
    ) as refused:
        KVSettings.of(method="pca", bits=2, components=(good, basis))
    assert "\n" not in str(refused.value) and "tensor" not in str(refused.value)
    (tmp_path / "kv_cache").mkdir()
    (tmp_path / FILE).write_text(json.dumps({KEY: {"method": "pca", "bits": 2}}))
    save_file({"0": basis}, tmp_path / COMPONENTS)
    with pytest.raises(UserError, match=r"components of layer 0 are no bases|has other tensors"):
        read_setting(tmp_path)


def test_components_of_another_number_of_heads_are_refused() -> None:
    """The attention in C would read past their end."""
    model = tiny_model("llama")
    settings = fit_kv_components(model, tokens_of(model, 1), bits=2, **SMALL)
    fewer = with_components(settings, [one[:1] for one in settings.components])
    with (
        kv_cache(model, settings=fewer),
        pytest.raises(UserError, match=r"of 1 KV heads of 16 .*this model has 2 of 16"),
    ):
        model(input_ids=tokens_of(model, 1), use_cache=True)


def test_generate_and_evaluate_measure_what_they_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmslim.cli import main

    folder = str(save_tiny("llama", tmp_path / "m"))
    words = ["--kv-bits", "2", "--kv-method", "pca"]
    assert main(["generate", folder, "import", "--max-new-tokens", "3", *words]) == 0
    capsys.readouterr()
    shape = ["--windows", "1", "--seq-len", "512", "--dtype", "float32", "--json"]
    assert main(["evaluate", folder, "--base", folder, *words, *shape]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["kl"] > 0 and figures["kv_cache"]["method"] == "pca"
