"""The layouts on disk against independent ones, what formats refuse, and configs that were tampered with."""

import copy

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from llmslim.checkpoint.formats import choose, formats
from llmslim.edit import replay
from llmslim.errors import UserError
from llmslim.experts import UnfuseExperts
from llmslim.quantization.edits import PackEmbedding, PackLinear
from llmslim.quantization.grid import QuantizedWeight, Scheme
from llmslim.quantization.packed import PackedLinear
from tests.reference import gptq_words
from tests.tiny import meta_model

OUT, IN = 32, 96
GRIDS = {
    name: form for name, form in formats().items() if name != "bitsandbytes"
}  # that: test_quantization_bnb


def scheme_of(bits=4, group_size=32, symmetric=True, scale_dtype="float16"):
    return Scheme(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)


def random_packed(scheme, rows=OUT, columns=IN):
    generator = torch.Generator().manual_seed(scheme.bits)

    def integers(*shape):
        return torch.randint(0, 2**scheme.bits, shape, generator=generator, dtype=torch.uint8)

    grid = scheme.scale_shape(rows, columns)
    scale = torch.rand(grid, generator=generator).to(getattr(torch, scheme.scale_dtype)).float()
    zero = None if scheme.symmetric else integers(*grid)
    weight = QuantizedWeight(scheme, integers(rows, columns), scale, zero)
    return weight, PackedLinear.from_quantized(weight)


def same(a, b):
    zeros = (a.zero_point is None and b.zero_point is None) or torch.equal(a.zero_point, b.zero_point)
    return torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and zeros


SCHEMES = [
    scheme_of(bits, size, symmetric)
    for bits in (2, 3, 4, 8)
    for size in (32, "channel")
    for symmetric in (True, False)
]


@pytest.mark.parametrize("form", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("scheme", [*SCHEMES, scheme_of(5, "tensor"), scheme_of(7, 48, False)], ids=str)
def test_round_trip_and_meta(form, scheme):
    if form.name == "gptq" and (scheme.group_size == "tensor" or scheme.bits not in (2, 3, 4, 8)):
        pytest.skip("GPTQ has no such scheme")
    weight, module = random_packed(scheme)
    stored = form.stored("x", module)
    skeleton = PackedLinear(IN, OUT, scheme, False, torch.float32, "meta")
    announced = form.stored("x", skeleton)
    assert {k: (v.shape, v.dtype) for k, v in stored.items()} == {
        k: (v.shape, v.dtype) for k, v in announced.items()
    }
    assert all(tensor.is_contiguous() for tensor in stored.values())
    assert same(form.read("x", skeleton, stored.__getitem__), weight)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gptq_layout(scheme):
    weight, module = random_packed(scheme)
    stored = formats()["gptq"].stored("x", module)
    for column in (0, 7, OUT - 1):
        assert stored["x.qweight"][:, column].tolist() == gptq_words(
            weight.codes[column].tolist(), scheme.bits
        )
    zero = (
        weight.zero_point
        if weight.zero_point is not None
        else torch.full(weight.scale.shape, scheme.midpoint - 1)
    )
    for group in range(weight.scale.shape[1]):
        assert stored["x.qzeros"][group].tolist() == gptq_words(zero[:, group].tolist(), scheme.bits)
    assert torch.equal(stored["x.scales"], weight.scale.T.half())
    assert stored["x.g_idx"].tolist() == [i // scheme.group_width(IN) for i in range(IN)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_compressed_tensors_layout_is_the_package_s(scheme):
    weight, module = random_packed(scheme, columns=64 if scheme.bits != 3 else 96)
    stored = formats()["compressed-tensors"].stored("x", module)
    signed = (weight.codes.int() - scheme.midpoint).to(torch.int8)
    assert torch.equal(stored["x.weight_packed"], pack_to_int32(signed, scheme.bits))
    assert stored["x.weight_shape"].tolist() == list(weight.codes.shape)
    if weight.zero_point is not None:
        unpacked = unpack_from_int32(
            stored["x.weight_zero_point"], scheme.bits, torch.Size((OUT, weight.scale.shape[1])), packed_dim=0
        )
        assert torch.equal(unpacked.int() + scheme.midpoint, weight.zero_point.int())


def test_dynamic_activation_order_is_refused():
    _, module = random_packed(scheme_of())
    form = formats()["gptq"]
    stored = form.stored("x", module)
    stored["x.g_idx"] = stored["x.g_idx"].flip(0)
    with pytest.raises(UserError, match="activation order"):
        form.read("x", module, stored.__getitem__)


@pytest.mark.parametrize("form", GRIDS.values(), ids=GRIDS)
def test_tensors_of_another_shape_are_refused(form):
    _, module = random_packed(scheme_of())
    stored = {name: tensor[..., :-1] for name, tensor in form.stored("x", module).items()}
    with pytest.raises(UserError, match="its config announces"):
        form.read("x", module, stored.__getitem__)


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"


def everywhere(model, scheme):
    linears = [
        name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")
    ]
    return [PackLinear(module=name, scheme=scheme) for name in linears if "layers" in name or ".h." in name]


@pytest.mark.parametrize(("form", "edits", "reason"), [
    ("compressed-tensors", [PackLinear(module=Q, scheme=scheme_of(symmetric=False))], "asymmetric"),
    ("compressed-tensors", [PackLinear(module=Q, scheme=scheme_of(5))], "5-bit codes"),
    ("compressed-tensors", [PackEmbedding(module="model.embed_tokens", scheme=scheme_of())], "embedding"),
    ("gptq", [PackLinear(module=Q, scheme=scheme_of(6))], "not 6"),
    ("gptq", [PackLinear(module=Q, scheme=scheme_of(scale_dtype="bfloat16"))], "scale_dtype"),
    ("gptq", [PackLinear(module=Q, scheme=scheme_of(group_size="tensor"))], "tensor"),
    ("gptq", [PackLinear(module=Q, scheme=scheme_of())], "left dense"),
    ("gptq", [PackLinear(module="lm_head", scheme=scheme_of())], "outside the blocks"),
    ("gptq", [PackLinear(module=Q, scheme=scheme_of()), PackLinear(module=DOWN, scheme=scheme_of(8))], "ov"),
])  # fmt: skip
def test_refusals_name_the_reason_and_what_works(form, edits, reason):
    model = meta_model("llama")
    with pytest.raises(UserError, match=f"{reason}.*llmslim.* can") as error:
        choose(form, edits, model, torch.float32)
    assert "\n" not in str(error.value)
    assert choose("llmslim", edits, model, torch.float32).name == "llmslim"


def test_scales_must_survive_the_checkpoint_s_type():
    model = meta_model("llama")
    edits = everywhere(model, scheme_of(scale_dtype="bfloat16"))
    assert choose("auto", edits, model, torch.bfloat16).name == "compressed-tensors"
    assert choose("auto", edits, model, torch.float16).name == "llmslim"


def test_conv1d_and_experts_go_into_our_own_format():
    gpt2, mixtral = meta_model("gpt2"), meta_model("mixtral")
    edits = everywhere(gpt2, scheme_of())
    assert choose("auto", edits, gpt2, torch.float32).name == "llmslim"
    with pytest.raises(UserError, match="Conv1D"):
        choose("gptq", edits, gpt2, torch.float32)
    experts = [UnfuseExperts(module="model.layers.0.mlp.experts")]
    assert choose("auto", experts, mixtral, torch.float32).name == "llmslim"


def test_a_misspelt_format_gets_a_suggestion():
    with pytest.raises(UserError, match="did you mean 'gptq'"):
        choose("gtpq", [], None)


@pytest.mark.parametrize("form", GRIDS.values(), ids=GRIDS)
def test_config_gives_the_edits_back(form):
    model = meta_model("llama")
    edits = everywhere(model, scheme_of(4, 32))
    if form.name != "gptq":  # overrides
        edits = [
            e.model_copy(update={"scheme": scheme_of(8, "channel")}) if "down" in e.module else e
            for e in edits
        ][1:]
    config = form.config(edits, model, torch.float32)
    assert form.edits(copy.deepcopy(config), meta_model("llama")) == edits
    replay(model, edits)
    assert form.config(edits, model, torch.float32) == config


def tampered(form, scheme=None):
    model = meta_model("llama")
    return form.config(everywhere(model, scheme or scheme_of()), model, torch.float32)


@pytest.mark.parametrize("change", [
    lambda c: c.update(format_version=2),
    lambda c: c.update(edits="rm -rf"),
    lambda c: c.update(code="import os"),
    lambda c: c["edits"].append({"edit": "exec", "module": "x"}),
    lambda c: c["edits"].append(["pack_linear"]),
    lambda c: c["edits"][0].update(path="/etc"),
    lambda c: c["edits"][0]["scheme"].update(bits=9),
    lambda c: c["edits"][0]["scheme"].update(group_size=7),
    lambda c: c["edits"][0]["scheme"].update(group_size=0),
    lambda c: c["edits"][0]["scheme"].update(group_size=-64),
    lambda c: c["edits"][0].pop("scheme"),
    lambda c: c["edits"][0].update(module="../../etc/passwd"),
    lambda c: c["edits"][0].update(module=""),
    lambda c: c["edits"][0].update(module="__class__"),
    lambda c: c["edits"][0].update(module="layers.0.self_attn"),
    lambda c: c["edits"][0].update(module="layers.99.self_attn.q_proj"),
    lambda c: c["edits"].append(c["edits"][0]),
])  # fmt: skip
def test_tampered_edits_are_refused(change):
    form, model = formats()["llmslim"], meta_model("llama")
    config = tampered(form)
    change(config)
    with pytest.raises(UserError):
        replay(model, form.edits(config, model))


@pytest.mark.parametrize(("form", "change"), [
    ("compressed-tensors", lambda c: c.update(config_groups=[])),
    ("compressed-tensors", lambda c: c.update(kv_cache_scheme={"num_bits": 8})),
    ("compressed-tensors", lambda c: c.update(quantization_status="frozen")),
    ("compressed-tensors", lambda c: c["config_groups"]["group_0"].update(targets="Linear")),
    ("compressed-tensors", lambda c: c["config_groups"]["group_0"].update(targets=["re:("])),
    ("compressed-tensors", lambda c: c.update(ignore=["re:("])),
    ("compressed-tensors", lambda c: c["config_groups"]["group_0"].update(format="float-quantized")),
    ("compressed-tensors", lambda c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8})),
    ("compressed-tensors", lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=1)),
    ("compressed-tensors", lambda c: c["config_groups"]["group_0"]["weights"].update(type="float")),
    ("compressed-tensors", lambda c: c["config_groups"]["group_0"]["weights"].update(group_size="all")),
    ("compressed-tensors", lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=0)),
    ("gptq", lambda c: c.update(group_size=-64)),
    ("gptq", lambda c: c.update(bits=5.5)),
    ("gptq", lambda c: c.update(group_size="x")),
    ("gptq", lambda c: c.update(dynamic={"+:x": {"bits": 8}})),
    ("gptq", lambda c: c.update(checkpoint_format="marlin")),
    ("gptq", lambda c: c.update(modules_in_block_to_quantize=[[1]])),
])  # fmt: skip
def test_foreign_configs_that_we_cannot_read_are_refused(form, change):
    config = tampered(formats()[form])
    change(config)
    with pytest.raises(UserError):
        formats()[form].edits(config, meta_model("llama"))
