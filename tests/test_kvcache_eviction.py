"""Token eviction against a full cache in which the evicted tokens are masked; what it holds, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from llmslim.errors import UserError
from llmslim.kvcache.runtime.cache import KVCache, kv_cache
from llmslim.kvcache.runtime.eviction import EvictingLayer, attention_received
from llmslim.kvcache.runtime.layer import KVLayer
from tests import tiny

SMALL: dict[str, Any] = {"group_size": 8, "window": 8, "sink": 2, "keep": 0.5}
METHODS = ("streaming", "knorm", "snapkv")
PROMPT, CALLS = 40, (40, 5, *[1] * 15)
HELD: dict[int, Tensor] = {}
"""Layer -> which tokens the reference may look at, bool [batch, KV heads, seen]."""


def reference_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
):
    """Attention written out, over all tokens that were ever seen but those that `HELD` leaves out."""
    groups, (n, seen) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    allowed = torch.ones(n, seen, dtype=torch.bool).tril(seen - n)[None, None]
    allowed = allowed & mask if mask is not None else allowed
    if module.layer_idx in HELD:
        held = HELD[module.layer_idx]
        new = torch.ones(*held.shape[:2], seen - held.shape[2], dtype=torch.bool)
        allowed = allowed & torch.cat([held, new], 2).repeat_interleave(groups, 1)[:, :, None]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * options["scaling"]
    if options.get("softcap"):
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), None


AttentionInterface.register("held_reference", reference_attention)
AttentionMaskInterface.register("held_reference", sdpa_mask)


def held_tokens(layer: EvictingLayer, keys: Tensor) -> Tensor:
    """Which of all tokens, whose keys are [batch, KV heads, n, D], a 16-bit layer holds: found by their keys."""
    assert layer.tail is not None
    parts = [layer.sink[0]] if layer.sink else []
    parts += [layer.codecs[0].decode(page.keys) for page in layer.pages]
    held = torch.cat([*parts, layer.tail[0]], 2)
    found = ((keys[:, :, :, None] - held[:, :, None]).abs().amax(-1) < 1e-4).any(-1)
    assert (found.sum(-1) == held.shape[2]).all()
    return found


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny.tiny_model("llama").eval()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_equals_a_full_cache_with_the_evicted_tokens_masked(family: str, method: str, padded: bool) -> None:
    model, full = tiny.tiny_model(family).eval(), tiny.tiny_model(family).eval()
    full.set_attn_implementation("held_reference")
    tokens = tiny.example_inputs(model, batch=2, seq=sum(CALLS))["input_ids"]
    real = torch.ones_like(tokens)
    if padded:
        real[1, :30] = 0
    positions = (real.cumsum(1) - 1).clamp(min=0)
    theirs, start = DynamicCache(config=full.config), 0
    with kv_cache(model, bits=16, evict=method, **SMALL):
        ours = KVCache(model.config, bits=16, evict=method, **SMALL)
        evicting = {i: layer for i, layer in enumerate(ours.layers) if isinstance(layer, EvictingLayer)}
        for count in CALLS:
            HELD.clear()
            for index, layer in evicting.items():
                if start:
                    HELD[index] = held_tokens(layer, theirs.layers[index].keys)
            last = start + count
            call: dict[str, Any] = {
                "input_ids": tokens[:, start:last],
                "position_ids": positions[:, start:last],
            }
            if padded:
                call["attention_mask"] = real[:, :last]
            expected = full(**call, past_key_values=theirs).logits
            got = model(**call, past_key_values=ours).logits
            rows = real[:, start:last].bool()
            assert torch.allclose(got[rows], expected[rows], atol=2e-4)
            start = last
    assert evicting and all(layer.evicted >= 16 for layer in evicting.values())
    for layer in evicting.values():
        assert layer.length == sum(CALLS) and layer.get_mask_sizes(1) == (sum(CALLS) + 1, 0)


@torch.no_grad()
def test_streaming_holds_the_first_and_the_last_tokens(model: PreTrainedModel) -> None:
    tokens = tiny.example_inputs(model, batch=1, seq=64)["input_ids"]
    whole = model(tokens, use_cache=True).past_key_values.layers[0].keys
    with kv_cache(model, bits=16, evict="streaming", **SMALL):
        layer = model(tokens, use_cache=True).past_key_values.layers[0]
    held = held_tokens(layer, whole)[0, 0].nonzero()[:, 0].tolist()
    assert held == [0, 1, *range(34, 64)]


@torch.no_grad()
def test_knorm_holds_the_keys_of_small_norm(model: PreTrainedModel) -> None:
    tokens = tiny.example_inputs(model, batch=1, seq=42)["input_ids"]
    whole = model(tokens, use_cache=True).past_key_values.layers[0].keys
    with kv_cache(model, bits=16, evict="knorm", **SMALL):
        layer = model(tokens, use_cache=True).past_key_values.layers[0]
    held = held_tokens(layer, whole)
    for head in range(2):
        smallest = sorted(range(2, 34), key=lambda t: float(whole[0, head, t].norm()))[:16]
        assert held[0, head].nonzero()[:, 0].tolist() == [0, 1, *sorted(smallest), *range(34, 42)]
    assert not torch.equal(held[0, 0], held[0, 1])


def test_attention_received_is_the_sum_of_softmax_rows() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 10, 8)
    real = torch.ones(1, 1, 10, dtype=torch.bool)
    real[..., :2] = False
    expected = torch.zeros(1, 2, 10)
    for head in range(4):
        for query in range(3):
            last = 10 - 3 + query + 1
            weights = (keys[0, head // 2, 2:last] @ queries[0, head, query] * 0.3).softmax(0)
            expected[0, head // 2, 2:last] += weights
    assert torch.allclose(attention_received(queries, keys, real, 0.3), expected, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_holds_the_bytes_that_it_promises(model: PreTrainedModel, method: str) -> None:
    tokens = tiny.example_inputs(model, batch=1, seq=138)["input_ids"]
    sizes = {}
    for evict in ({}, {"evict": method, "keep": 0.5}):
        with torch.no_grad(), kv_cache(model, bits=4, group_size=8, window=8, sink=2, **evict):
            cache = model(tokens, use_cache=True).past_key_values
        layer = cache.layers[0]
        sizes[bool(evict)] = sum(page.tokens for page in layer.pages)
        observed = 4 * 8 * 16 * 4 if method == "snapkv" and evict else 0
        # of a packed token, in each of 2 heads: two rows of 16 codes of 4 bits; scale and minimum of 16 channels
        # per 8 tokens, and of two groups of the token; tokens kept as they are are float32
        packed, plain = 2 * (2 * 8 + 16 * 4 / 8 + 2 * 4), 2 * 2 * 16 * 4
        kept_as_they_are = 138 - sizes[bool(evict)] - getattr(layer, "evicted", 0)
        assert cache.nbytes == 3 * (sizes[bool(evict)] * packed + kept_as_they_are * plain + observed)
    assert sizes[True] in (64, 56) and sizes[False] == 128


def test_a_beam_takes_its_own_tokens_along(model: PreTrainedModel) -> None:
    tokens = tiny.example_inputs(model, batch=2, seq=40)["input_ids"]
    with torch.no_grad(), kv_cache(model, bits=4, evict="snapkv", **SMALL):
        cache = model(tokens, use_cache=True, attention_mask=torch.ones_like(tokens)).past_key_values
        cache.reorder_cache(torch.tensor([1, 1]))
        alone = model(tokens[1:], use_cache=True).past_key_values
        got = model(tokens[:1, :1].expand(2, 1), past_key_values=cache).logits
        expected = model(tokens[:1, :1], past_key_values=alone).logits
        assert torch.allclose(got, expected.expand_as(got), atol=1e-4)
        beams = model.generate(tokens, num_beams=2, max_new_tokens=30, do_sample=False)
    assert beams.shape == (2, 70)


@pytest.mark.parametrize("method", METHODS)
def test_crop_takes_back_what_is_not_packed_and_refuses_more(model: PreTrainedModel, method: str) -> None:
    tokens = tiny.example_inputs(model, batch=1, seq=46)["input_ids"]
    with torch.no_grad(), kv_cache(model, bits=4, evict=method, **SMALL):
        cache, other = (model(tokens[:, :44], use_cache=True).past_key_values for _ in range(2))
        model(tokens[:, 44:], past_key_values=other)
        before = other.layers[0].evicted
        other.crop(-2)
        assert other.layers[0].evicted == before == cache.layers[0].evicted
        assert torch.equal(
            model(tokens[:, 44:45], past_key_values=cache).logits,
            model(tokens[:, 44:45], past_key_values=other).logits,
        )
        with pytest.raises(UserError, match="evicted for good"):
            cache.crop(-40)


def test_refuses_what_cannot_be(model: PreTrainedModel) -> None:
    for fields, words in [
        ({"evict": "snapkv"}, "evict and keep go together"),
        ({"keep": 0.5}, "evict and keep go together"),
        ({"evict": "snapkv", "keep": 1.0}, "less than 1"),
        ({"evict": "h2o", "keep": 0.5}, "'streaming', 'knorm' or 'snapkv'"),
        ({"evict": "knorm", "keep": 0.5, "packed": False}, "evict needs to see the attention"),
    ]:
        with pytest.raises(UserError, match=words), kv_cache(model, **fields):
            pass
    cache = KVCache(model.config, evict="knorm", keep=0.5)
    with pytest.raises(UserError, match="needs llmslim's attention"):
        model(torch.tensor([[3, 4]]), past_key_values=cache)
    with pytest.raises(UserError, match="every layer has a sliding window"):
        KVCache(tiny.tiny_config("mistral"), evict="knorm", keep=0.5)
    mask = torch.zeros(1, 1, 40, 40)
    with (
        pytest.raises(UserError, match="masks of True and False"),
        kv_cache(model, evict="knorm", **SMALL),
    ):
        model(torch.full((1, 40), 3), attention_mask=mask)


def test_sliding_layers_are_left_alone() -> None:
    layers = KVCache(tiny.tiny_config("gemma2"), evict="knorm", keep=0.5).layers
    assert [type(layer) is KVLayer for layer in layers] == [True, False, True]
