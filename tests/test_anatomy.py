"""The view is right if turning what it calls a head or a channel turns just that in the real forward."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmslim.anatomy import MLP, Anatomy, Attention, Experts, Projection, families
from llmslim.anatomy.family import TESTED
from llmslim.anatomy.inspect import render, summary
from llmslim.errors import UserError
from tests.tiny import DECODERS, FAMILIES, example_inputs, head_rows, meta_model, tiny_model

each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def spied() -> Iterator[dict[nn.Module, tuple[Tensor, Tensor, Tensor]]]:
    """What reached the attention function: module -> (query, key, value), each [batch, heads, seq, dim].

    A model joins by `set_attn_implementation("spy")`.
    """
    seen: dict[nn.Module, tuple[Tensor, Tensor, Tensor]] = {}

    def spy(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: object
    ) -> object:
        seen[module] = (q, k, v)
        kwargs.pop("softcap", None)  # of Gemma 2; sdpa has none, and who reads what is the same without
        return sdpa_attention_forward(module, q, k, v, mask, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    yield seen
    del AttentionInterface._global_mapping["spy"], AttentionMaskInterface._global_mapping["spy"]


@contextmanager
def edited(projection: Projection, rows: Tensor, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The weight rows (and bias, where rows are outputs) changed for a while."""
    module = projection.module
    tensors = [(module.weight.data, projection.dim)]
    if projection.side == "out" and module.bias is not None:
        tensors.append((module.bias.data, 0))
    kept = [tensor.clone() for tensor, _ in tensors]
    for tensor, dim in tensors:
        tensor.index_copy_(dim, rows, edit(tensor.index_select(dim, rows)))
    yield
    for (tensor, _), old in zip(tensors, kept, strict=True):
        tensor.copy_(old)


def add_noise(weight: Tensor) -> Tensor:
    return weight + torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(model: PreTrainedModel, reader: nn.Module | None = None) -> tuple[Tensor, Tensor | None]:
    """Logits, and the input that `reader` got."""
    seen: list[Tensor] = []
    hook = reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())) if reader else None
    logits = model(**example_inputs(model)).logits
    if hook:
        hook.remove()
    return logits, seen[-1] if seen else None


@torch.no_grad()
def logits_without_inputs(model: PreTrainedModel, reader: nn.Module, columns: slice) -> Tensor:
    """Logits when these columns of the input of `reader` are zero."""

    def mask(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        masked = args[0].clone()
        masked[..., columns] = 0
        return (masked,)

    hook = reader.register_forward_pre_hook(mask)
    logits = run(model)[0]
    hook.remove()
    return logits


def changed(before: Tensor, after: Tensor, dim: int = -1) -> set[int]:
    """The indices along `dim` where the tensors differ by more than rounding."""
    difference = (after - before).abs().movedim(dim, 0).flatten(1).amax(1)
    return set(torch.nonzero(difference > 1e-5).flatten().tolist())


def attentions(model: PreTrainedModel) -> list[Attention]:
    """All self- and cross-attentions of the first and the last block of each stack."""
    blocks = [block for stack in Anatomy.of(model).stacks for block in (stack.blocks[0], stack.blocks[-1])]
    return [view for block in blocks for view in (block.attention, block.cross_attention) if view]


@each_family
def test_rows_of_a_head_reach_that_head_and_no_other(family: str, spied: dict) -> None:
    model = tiny_model(family)
    model.set_attn_implementation("spy")
    for view in attentions(model):
        base = run(model, view.o.module)[1]
        before = spied[view.module]
        assert [tensor.shape[1::2] for tensor in before] == [
            (heads, view.head_dim) for heads in (view.num_heads, view.num_kv_heads, view.num_kv_heads)
        ]
        for position, role in enumerate("qkv"):
            for head in range(before[position].shape[1]):
                with edited(getattr(view, role), head_rows(view, role, head), add_noise):
                    heads_read = run(model, view.o.module)[1]
                for other in range(3):
                    moved = changed(before[other], spied[view.module][other], dim=1)
                    assert moved == ({head} if other == position else set()), (role, head)
                readers = [head] if role == "q" else view.readers(head)
                columns = {h * view.head_dim + c for h in readers for c in range(view.head_dim)}
                assert changed(base, heads_read) == columns, (role, head)


@each_family
def test_row_of_v_is_one_channel_of_its_head(family: str) -> None:
    model = tiny_model(family)
    view = attentions(model)[-1]
    base = run(model, view.o.module)[1]
    for head, channel in ((0, 3), (view.num_kv_heads - 1, view.head_dim - 1)):
        with edited(view.v, head_rows(view, "v", head)[channel : channel + 1], add_noise):
            moved = changed(base, run(model, view.o.module)[1])
        assert moved == {h * view.head_dim + channel for h in view.readers(head)}


@each_family
def test_zeroing_the_rows_of_o_or_down_equals_masking_its_input(family: str) -> None:
    model = tiny_model(family)
    for view in attentions(model):
        head = view.num_heads - 1
        columns = slice(head * view.head_dim, (head + 1) * view.head_dim)
        masked = logits_without_inputs(model, view.o.module, columns)
        with edited(view.o, head_rows(view, "o", head), torch.zeros_like):
            torch.testing.assert_close(run(model)[0], masked)
        assert (masked - run(model)[0]).abs().max() > 1e-2
    for mlp in mlps(model):
        masked = logits_without_inputs(model, mlp.down.module, slice(8, 40))
        with edited(mlp.down, mlp.down.rows[8:40], torch.zeros_like):
            torch.testing.assert_close(run(model)[0], masked)
        assert (masked - run(model)[0]).abs().max() > 1e-2


def mlps(model: PreTrainedModel) -> list[MLP]:
    return [block.mlp for block in Anatomy.of(model).blocks if isinstance(block.mlp, MLP)]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_row_of_up_or_gate_is_one_channel_and_up_is_the_linear_one(family: str) -> None:
    model = tiny_model(family)
    mlp = mlps(model)[-1]
    base = run(model, mlp.down.module)[1]
    for channel in (0, 5, mlp.width - 1):
        for part in filter(None, (mlp.up, mlp.gate)):
            with edited(part, part.rows[channel : channel + 1], add_noise):
                assert changed(base, run(model, mlp.down.module)[1]) == {channel}
        if mlp.gate:
            with edited(mlp.up, mlp.up.rows[channel : channel + 1], lambda weight: -2 * weight):
                torch.testing.assert_close(
                    run(model, mlp.down.module)[1][..., channel],
                    -2 * base[..., channel],
                    rtol=1e-4,
                    atol=1e-5,
                )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_computed_from_the_view_equal_the_module(family: str) -> None:
    model = tiny_model(family)
    experts = Anatomy.of(model).blocks[-1].mlp
    assert isinstance(experts, Experts) and (experts.num_experts, experts.top_k, experts.width) == (4, 2, 64)
    assert "gate" in dict(model.get_submodule(experts.router.rpartition(".")[0]).named_children())
    calls: list = []
    hook = experts.module.register_forward_hook(lambda _, args, output: calls.append((args, output)))
    run(model)
    hook.remove()
    (hidden, chosen, weights), output = calls[0]
    gate, up = model.get_parameter(experts.gate_up).split(experts.width, dim=1)
    down = model.get_parameter(experts.down)
    expected = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            inner = nn.functional.silu(gate[expert] @ hidden[token]) * (up[expert] @ hidden[token])
            expected[token] += weight * (down[expert] @ inner)
    assert chosen.shape[-1] == experts.top_k
    torch.testing.assert_close(output.reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


@each_family
def test_every_parameter_has_a_part_and_meta_equals_real(family: str) -> None:
    model, meta = tiny_model(family), meta_model(family)
    told = summary(model)
    assert told["unmatched"] == [] and "unmatched" not in told["parts"]
    assert told["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert told["bytes"] == 4 * told["parameters"]
    assert summary(meta) == told == json.loads(json.dumps(told))
    assert summary(meta, torch.bfloat16)["bytes"] == 2 * told["parameters"]
    assert render(told).renderables
    for real, empty in zip(Anatomy.of(model).blocks, Anatomy.of(meta).blocks, strict=True):
        assert list(real.linears()) == list(empty.linears())
        for role in "qkvo":
            assert torch.equal(getattr(real.attention, role).rows, getattr(empty.attention, role).rows)


def test_summary_counts_by_part() -> None:
    told = summary(meta_model("llama"))
    blocks = 3
    assert {part: count["parameters"] for part, count in told["parts"].items()} == {
        "embeddings": 512 * 64,
        "attention": blocks * (2 * 64 * 64 + 2 * 32 * 64),
        "mlp": blocks * 3 * 64 * 128,
        "norms": (2 * blocks + 1) * 64,
        "head": 512 * 64,
    }
    assert told["stacks"] == [
        {"stack": "model.layers", "blocks": 3, "causal": True, "num_heads": 4, "num_kv_heads": 2}
        | {"head_dim": 16, "mlp_width": 128}
    ]


@each_family
def test_linears_are_the_matrices_of_the_block(family: str) -> None:
    for block in Anatomy.of(meta_model(family)).blocks:
        named = dict(block.model.named_modules())
        expected = {
            name
            for name, module in named.items()
            if name.startswith(f"{block.name}.") and type(module).__name__ in ("Linear", "Conv1D")
        }
        assert set(block.linears()) == expected  # the routers of these families are not nn.Linear
        assert all(named[name] is module for name, module in block.linears().items())
        assert not any(name.split(".")[-1] == "gate" for name in block.linears())


def test_the_whole_model() -> None:
    seen = {family: Anatomy.of(meta_model(family)) for family in FAMILIES}
    assert [family for family, anatomy in seen.items() if anatomy.is_decoder] == DECODERS
    tied = {family for family in FAMILIES if seen[family].tied}
    assert tied == {
        *(
            "qwen2",
            "gemma2",
            "gemma3_text",
            "gpt2",
            "opt",
            "bert",
            "roberta",
            "distilbert",
            "modernbert",
            "t5",
        )
    }
    assert {family for family in FAMILIES if not seen[family].final_norm} == {"bert", "roberta", "distilbert"}
    assert [name for name, _ in seen["gpt2"].embeddings] == ["transformer.wte", "transformer.wpe"]
    assert seen["opt"].final_norm[0] == "model.decoder.final_layer_norm"
    assert seen["bert"].head[0] == "cls.predictions.decoder"
    assert [stack.name for stack in seen["t5"].stacks] == ["encoder.block", "decoder.block"]
    assert [stack.is_causal for stack in seen["t5"].stacks] == [False, True]
    assert [bool(block.cross_attention) for block in seen["t5"].blocks] == [False] * 3 + [True] * 3
    assert seen["t5"].blocks[3].attention.position_bias.endswith("SelfAttention.relative_attention_bias")
    assert [type(block.mlp) for block in seen["qwen3_moe"].blocks] == [Experts, MLP, Experts]


def test_the_view_follows_the_model() -> None:
    model = tiny_model("llama")
    anatomy = Anatomy.of(model)
    block = anatomy.blocks[1]

    attention = block.module.self_attn
    attention.q_proj, attention.o_proj = nn.Linear(64, 32, bias=False), nn.Linear(32, 64, bias=False)
    assert (block.attention.num_heads, block.attention.num_kv_heads) == (2, 2)
    assert summary(model)["stacks"][0]["num_heads"] == [4, 2, 4]

    factored = nn.Sequential()  # its factors have the names of other parts
    factored.down_proj, factored.up_proj = nn.Linear(64, 8, bias=False), nn.Linear(8, 128, bias=False)
    factored.in_features, factored.out_features = 64, 128
    block.module.mlp.up_proj = factored
    assert block.mlp.up.module is factored and block.mlp.width == 128
    factors = [name.removeprefix(f"{block.name}.mlp.") for name in block.linears() if "up_proj" in name]
    assert factors == ["up_proj.down_proj", "up_proj.up_proj"]

    anatomy.blocks[2].module.mlp.down_proj = anatomy.blocks[0].module.mlp.down_proj  # shared, so counted once
    assert summary(model)["parameters"] == sum(parameter.numel() for parameter in model.parameters())

    del model.model.layers[0]
    assert len(anatomy.blocks) == 2 and anatomy.blocks[0].mlp.up.module is factored
    assert not anatomy.unmatched


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)


class Unheard(PreTrainedModel):
    """A stack of blocks that have no attention."""

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.embed, self.layers = nn.Embedding(8, 8), nn.ModuleList(Mixer() for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def test_an_unknown_architecture_is_refused_with_the_list() -> None:
    model = Unheard(PreTrainedConfig())
    with pytest.raises(
        UserError, match=r"layers\.0 \(attention\): no q, k, v, o.*layers\.1\.mixer \(Linear\).*llama"
    ):
        Anatomy.of(model)
    told = summary(model)
    assert "layers.1.mixer (Linear)" in told["unmatched"]
    assert told["parts"]["unmatched"]["parameters"] == 2 * 72
    assert len(render(told).renderables) == 3
    with pytest.raises(UserError, match="Linear"):
        Anatomy.of(nn.Linear(2, 2))  # type: ignore[arg-type]


def odd_extra(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.adapter = nn.Linear(4, 4)


def odd_router_without_experts(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.gate = nn.Linear(64, 4)


def odd_second_up(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp2 = nn.ModuleDict({"up_proj": nn.Linear(64, 128)})


def odd_heads(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.k_proj = nn.Linear(64, 24)


def odd_channels(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 96)


@pytest.mark.parametrize(
    "spoil",
    [odd_extra, odd_router_without_experts, odd_second_up, odd_heads, odd_channels],
    ids=lambda f: f.__name__,
)
def test_one_odd_block_is_named(spoil: Callable[[PreTrainedModel], None]) -> None:
    model = tiny_model("llama")
    spoil(model)
    with pytest.raises(UserError, match=r"model\.layers\.1") as refusal:
        Anatomy.of(model)
    assert "layers.0" not in str(refusal.value) and "layers.2" not in str(refusal.value)


def test_experts_stored_otherwise_are_refused() -> None:
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.experts.gate_up_proj = nn.Parameter(torch.zeros(4, 64, 130))
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.experts"):
        Anatomy.of(model)


def test_supported_families_are_the_tested_ones_and_a_family_is_a_few_lines_of_data() -> None:
    assert sorted(TESTED) == sorted(FAMILIES)
    for file in Path(families.__path__[0]).glob("[a-z]*.py"):
        assert len(file.read_text().splitlines()) <= 15
