"""Fewer channels, heads and experts: the same as masking, replayed on meta, saved, loaded, generated with."""

import json
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import AutoModel

import llmslim.step
from llmslim.anatomy import MLP, Anatomy, Experts
from llmslim.checkpoint.load import load
from llmslim.checkpoint.plain import absorb
from llmslim.edit import parse_edit, replace_module, replay
from llmslim.errors import UserError
from llmslim.experts import UnfuseExperts
from llmslim.loaders.models import skeleton
from llmslim.pipeline import compress
from llmslim.pruning import residual  # noqa: F401  its edits
from llmslim.pruning.edits import (
    NarrowAttention,
    NarrowMLP,
    narrow_attention,
    narrow_experts,
    narrow_mlp,
)
from llmslim.quantization.edits import PackLinear
from llmslim.quantization.grid import Scheme
from llmslim.quantization.rtn import RTN
from llmslim.step import STEPS as STEPS_KNOWN
from llmslim.step import BlockStep
from tests.checkpoints import inputs_of, load_elsewhere, logits_of, make
from tests.tiny import DECODERS, FAMILIES, head_rows, meta_model, save_tiny, tiny_config, tiny_model

MOE = ("mixtral", "qwen3_moe")
# families whose config derives the width of a head from the number of heads, or (T5) shares columns of a table
NO_PLAIN_HEADS = ("gpt2", "opt", "gpt_neox", "bert", "roberta", "distilbert", "modernbert", "t5")
DIVIDES_HIDDEN = ("llama", "gemma2", "gemma3_text")  # hidden 64 takes 2 heads, not 3


def choose(count, of, generator):
    return torch.randperm(of, generator=generator)[:count].sort().values


def heads_of(attention, generator, count=None):
    """One or two heads of each KV head that stays, at random."""
    run, kv = len(attention.readers(0)), attention.num_kv_heads
    if run == 1:
        return choose(count or 3, kv, generator)
    return torch.arange(kv) * run + torch.randint(run, (kv,), generator=generator)


def narrow_all(model, what, seed=0, varied=True):
    """Narrow every block, by other indices and (when varied) to other sizes; the edits."""
    generator, edits = torch.Generator().manual_seed(seed), []
    for number, block in enumerate(Anatomy(model).blocks):
        shrink = number % 2 if varied else 0
        if "heads" in what:
            count = 3 - shrink
            edits.append(narrow_attention(block, heads_of(block.attention, generator, count)))
            if block.cross_attention is not None:
                edits.append(narrow_attention(block, heads_of(block.cross_attention, generator, count), True))
        mlp = block.mlp
        if "channels" in what and isinstance(mlp, MLP):
            edits.append(narrow_mlp(block, choose(96 - 32 * shrink, mlp.width, generator)))
        if isinstance(mlp, Experts):
            stay = choose(3 - (number == 2 and varied), 4, generator) if "experts" in what else None
            count = 4 if stay is None else len(stay)
            width = 32 + 16 * shrink
            each = [choose(width, mlp.width, generator) for _ in range(count)] if "channels" in what else None
            if stay is not None or each is not None:
                edits.append(narrow_experts(block, stay, each))
    return edits


class _Masked(nn.Module):
    """A router whose logits of some experts are minus infinity, as transformers' routers compute them."""

    def __init__(self, router, gone, norm):
        super().__init__()
        self.router, self.gone, self.norm = router, gone, norm

    def forward(self, hidden):
        logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.router.weight)
        logits[:, self.gone] = -torch.inf
        top, chosen = logits.softmax(-1).topk(self.router.top_k, -1)
        return logits, top / top.sum(-1, keepdim=True) if self.norm else top, chosen


@torch.no_grad()
def mask_all(model, what, seed=0, varied=True):
    """What `narrow_all` does, by zeroing columns of o and down and masking routers."""
    generator = torch.Generator().manual_seed(seed)
    for number, block in enumerate(Anatomy(model).blocks):
        shrink = number % 2 if varied else 0
        if "heads" in what:
            for attention in filter(None, (block.attention, block.cross_attention)):
                kept = heads_of(attention, generator, 3 - shrink)
                for head in set(range(attention.num_heads)) - set(kept.tolist()):
                    zero(attention.o, head_rows(attention, "o", head))
        mlp = block.mlp
        if "channels" in what and isinstance(mlp, MLP):
            kept = choose(96 - 32 * shrink, mlp.width, generator)
            zero(mlp.down, others(mlp.width, kept))
        if isinstance(mlp, Experts):
            stay = torch.arange(4)
            if "experts" in what:
                stay = choose(3 - (number == 2 and varied), 4, generator)
                norm = getattr(model.config, "norm_topk_prob", True)
                router = model.get_submodule(mlp.router)
                replace_module(model, mlp.router, _Masked(router, others(4, stay), norm))
            if "channels" in what:
                for expert in stay.tolist():
                    kept = choose(32 + 16 * shrink, mlp.width, generator)
                    mlp.module.down_proj[expert][:, others(mlp.width, kept)] = 0
    return model


def others(count, kept):
    return torch.tensor(sorted(set(range(count)) - set(kept.tolist())), dtype=torch.int64)


def zero(projection, rows):
    weight = projection.module.weight
    weight.index_fill_(projection.dim, projection.rows[torch.isin(projection.rows, rows)], 0)


def cases():
    for family in FAMILIES:
        yield family, ("heads",)
        yield family, ("channels",)
        if family in MOE:
            yield family, ("experts",)
            yield family, ("heads", "channels", "experts")


@pytest.mark.parametrize("family, what", [*cases()])
def test_surgery_equals_masking(family, what):
    model = tiny_model(family)
    before = logits_of(model)
    narrow_all(model, what)
    masked = mask_all(tiny_model(family), what)
    logits = logits_of(model)
    torch.testing.assert_close(logits, logits_of(masked), rtol=1e-4, atol=1e-4)
    assert (logits - before).abs().max() > 0.1  # something was taken out
    for either in (model, masked):
        either.set_attn_implementation("eager")
    torch.testing.assert_close(logits_of(model), logits_of(masked), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_narrowed_twice_is_narrowed_at_once(family):
    twice, once = tiny_model(family), tiny_model(family)
    for one, other in zip(Anatomy(twice).blocks, Anatomy(once).blocks, strict=True):
        if isinstance(one.mlp, MLP):
            narrow_mlp(one, torch.arange(0, 128, 2))
            narrow_mlp(one, torch.arange(0, 64, 2))
            narrow_mlp(other, torch.arange(0, 128, 4))
        if one.attention.num_kv_heads == 4:
            narrow_attention(one, torch.tensor([0, 2, 3]))
            narrow_attention(one, torch.tensor([1, 2]))
            narrow_attention(other, torch.tensor([2, 3]))
        else:
            narrow_attention(one, torch.tensor([1, 3]))
            narrow_attention(one, torch.tensor([1]))
            narrow_attention(other, torch.tensor([3]))
        if one.cross_attention is not None:
            narrow_attention(one, torch.tensor([0, 2]), cross=True)
            narrow_attention(one, torch.tensor([1]), cross=True)
            narrow_attention(other, torch.tensor([2]), cross=True)
    assert torch.equal(logits_of(twice), logits_of(once))


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_on_meta_gives_the_edited_shapes(family):
    model = tiny_model(family)
    edits = narrow_all(model, ("heads", "channels", "experts"))
    assert not Anatomy(model).unmatched
    meta = meta_model(family)
    replay(meta, [parse_edit(json.loads(json.dumps(edit.to_json()))) for edit in edits])
    assert {n: p.shape for n, p in meta.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert all(parameter.is_meta for parameter in meta.parameters())
    meta.to_empty(device="cpu")
    meta.load_state_dict(model.state_dict())
    for (name, a), (_, b) in zip(model.named_modules(), meta.named_modules(), strict=True):
        kept = {key: value for key, value in vars(a).items() if type(value) in (int, float)}
        assert kept == {key: value for key, value in vars(b).items() if type(value) in (int, float)}, name


@pytest.mark.parametrize("family", [*DECODERS, "t5"])
@torch.no_grad()
def test_generation_with_a_cache_equals_the_masked_model(family):
    model, what = tiny_model(family), ("heads", "channels", "experts")
    narrow_all(model, what)
    masked = mask_all(tiny_model(family), what)
    inputs = {key: value[:1] for key, value in inputs_of(model).items() if key != "decoder_input_ids"}
    text = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    expected = masked.generate(**inputs, **text)
    assert torch.equal(model.generate(**inputs, **text, use_cache=True), expected)
    assert torch.equal(model.generate(**inputs, **text, use_cache=False), expected)


class _Narrow(BlockStep):
    """Narrows each block to the front of what it has."""

    varied: bool = False
    heads: int = 0
    width: int = 0
    experts: int = 0

    def narrow(self, block):
        shrink = int(self.varied and block.index == 1)
        if self.heads:
            for cross in (False, True):
                attention = block.cross_attention if cross else block.attention
                if attention is not None:
                    run = len(attention.readers(0))
                    kv = self.heads - shrink
                    yield narrow_attention(block, torch.arange(run * kv) if run == 1 else
                                           torch.arange(1, attention.num_heads, run)[:kv], cross)  # fmt: skip
        if isinstance(block.mlp, MLP):
            if self.width:
                yield narrow_mlp(block, torch.arange(2, 2 + self.width - 32 * shrink))
        elif self.experts or self.width:
            count = self.experts or 4
            stay = torch.arange(1, 1 + count) if self.experts else None
            each = [torch.arange(i, i + 32 - 8 * shrink) for i in range(count)] if self.width else None
            yield narrow_experts(block, stay, each)

    def planned_edits(self, anatomy):
        meta = skeleton(anatomy.model.config)
        return [edit for block in Anatomy(meta).blocks for edit in self.narrow(block)]

    def compress_block(self, block, stream, reference, record):
        record.edits += self.narrow(block)


STEPS = {
    "mlp": _Narrow(width=96),
    "heads": _Narrow(heads=2),
    "all": _Narrow(heads=2, width=96, experts=3),
    "varied": _Narrow(heads=2, width=96, experts=3, varied=True),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """ "family-step" -> (folder, logits in memory)."""
    root, result = tmp_path_factory.mktemp("pruned"), {}
    for family in FAMILIES:
        source = save_tiny(family, root / family)
        for name, step in STEPS.items():
            folder = root / f"{family}-{name}"
            result[folder.name] = folder, logits_of(make(source, folder, step))
    return result


def is_plain(folder):
    return "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_a_plain_config_is_written_where_it_can_express_the_result(made):
    expected = {f"{family}-mlp" for family in FAMILIES}
    expected |= {f"{f}-{step}" for f in FAMILIES if f not in NO_PLAIN_HEADS for step in ("heads", "all")}
    assert {name for name, (folder, _) in made.items() if is_plain(folder)} == expected


@pytest.mark.parametrize("how", ["llmslim", "plugin"])
def test_loading_gives_equal_logits(made, how, tmp_path):
    loaded = load_elsewhere(how, {name: folder for name, (folder, _) in made.items()}, tmp_path)
    assert not [name for name, (_, logits) in made.items() if not torch.equal(loaded[name], logits)]


def test_plain_ones_load_without_llmslim(made, tmp_path):
    plain = {name: folder for name, (folder, _) in made.items() if is_plain(folder)}
    loaded = load_elsewhere("transformers", plain, tmp_path)
    assert not [name for name in plain if not torch.equal(loaded[name], made[name][1])]


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_the_base_model_alone_loads(made, family):
    import llmslim.plugin  # noqa: F401

    folder = made[f"{family}-varied"][0]
    base, (whole, _) = (
        AutoModel.from_pretrained(folder, dtype=torch.float32),
        load(str(folder), dtype=torch.float32),
    )
    state = whole.state_dict()
    for name, tensor in base.state_dict().items():
        if "pooler" not in name:  # BERT's masked model has none
            full = name if name in state else f"{whole.base_model_prefix}.{name}"
            assert torch.equal(tensor, state[full]), name


def test_a_pruned_checkpoint_is_quantized_on_either_road(made, tmp_path):
    for name, method in (
        ("llama-all", "compressed-tensors"),
        ("llama-varied", "llmslim"),
        ("t5-all", "llmslim"),
    ):
        folder = tmp_path / name
        model = make(
            made[name][0], folder, RTN(bits=4, group_size=16), "llmslim" if method == "llmslim" else "auto"
        )
        assert (
            json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == method
        )
        again, _ = load(str(folder), dtype=torch.float32)
        assert torch.equal(logits_of(again), logits_of(model))


def test_the_whole_road_narrows_then_quantizes(tmp_path, monkeypatch):
    """Experts go first, so the later step must plan for those that are left; both run, saved and verified."""
    monkeypatch.setattr(llmslim.step, "STEPS", dict(STEPS_KNOWN))  # the class below is for here alone

    class Narrow(_Narrow):
        kind: ClassVar[str] = "narrow"
        verb: ClassVar[str] = "prune"

    steps = [Narrow(heads=2, width=96, experts=3), RTN(bits=4, group_size=16)]
    result = compress(str(save_tiny("mixtral", tmp_path / "base")), steps, tmp_path / "out", evaluation=None)
    assert result.report["verification"]["ok"] and result.report["verification"]["max_error"] == 0
    model, _ = load(str(result.folder))
    assert model.config.num_local_experts == 3 and model.config.num_attention_heads == 2


@pytest.mark.parametrize("family", DIVIDES_HIDDEN)
def test_a_number_of_heads_that_the_config_refuses_stays_an_edit(family):
    model = skeleton(tiny_config(family, num_key_value_heads=4))
    edits = [NarrowAttention(block=b.name, heads=3, kv_heads=3) for b in Anatomy(model).blocks]
    assert absorb(model.config, edits, model) == (model.config, edits)
    two = [edit.model_copy(update={"heads": 2, "kv_heads": 2}) for edit in edits]
    config, rest = absorb(model.config, two, model)
    assert not rest and (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (
        2,
        2,
        16,
    )
    assert model.config.num_attention_heads == 4  # the given one is as it was


def test_one_block_left_as_it_was_is_no_plain_config_and_packing_remains():
    model = skeleton(tiny_config("llama"))
    narrow = [NarrowMLP(block=block.name, width=64) for block in Anatomy(model).blocks]
    assert absorb(model.config, narrow[1:], model)[1] == narrow[1:]
    pack = PackLinear(module="model.layers.0.mlp.down_proj", scheme=Scheme(bits=4, group_size=32))
    config, rest = absorb(model.config, [*narrow, pack], model)
    assert rest == [pack] and config.intermediate_size == 64


def test_only_dense_matrices_are_narrowed():
    model = meta_model("llama")
    PackLinear(module="model.layers.0.mlp.up_proj", scheme=Scheme(bits=4, group_size=32)).apply(model)
    block = Anatomy(model).blocks[0]
    with pytest.raises(ValueError, match=r"mlp.up_proj is a PackedLinear.*prune before quantizing"):
        narrow_mlp(block, torch.arange(64))
    assert block.mlp.gate.module.out_features == 128  # nothing was sliced


@pytest.mark.parametrize("family", MOE)
def test_unfused_experts_are_narrowed_as_fused_ones(family):
    fused, unfused = tiny_model(family), tiny_model(family)
    for block in Anatomy(unfused).blocks:
        if isinstance(block.mlp, Experts):
            UnfuseExperts(module=block.mlp.name).apply(unfused)
    for model in (fused, unfused):
        narrow_all(model, ("channels", "experts"))
    torch.testing.assert_close(logits_of(unfused), logits_of(fused), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "heads, reason",
    [
        ([0, 1, 2], "equally many"),
        ([], "at least one"),
        ([1, 0], "ascend"),
        ([0, 4], "0 to 3"),
        ([-1, 0], "ascend"),
        ([0, 0], "ascend"),
    ],
)
def test_heads_that_cannot_stay_are_refused(heads, reason):
    block = Anatomy(tiny_model("llama")).blocks[0]
    with pytest.raises(ValueError, match=reason):
        narrow_attention(block, torch.tensor(heads, dtype=torch.int64))


def test_parts_that_are_not_there_are_refused():
    block = Anatomy(meta_model("llama")).blocks[0]
    with pytest.raises(ValueError, match="no cross-attention"):
        narrow_attention(block, torch.arange(2), cross=True)
    with pytest.raises(ValueError, match="no experts"):
        narrow_experts(block, torch.arange(2))
    mixture = Anatomy(meta_model("mixtral")).blocks[0]
    with pytest.raises(ValueError, match="narrow_experts"):
        narrow_mlp(mixture, torch.arange(2))
    with pytest.raises(ValueError, match="goes to 2 experts"):
        narrow_experts(mixture, torch.arange(1))
    with pytest.raises(ValueError, match="equally many"):
        narrow_experts(mixture, torch.arange(2), [torch.arange(4), torch.arange(5)])


@pytest.mark.parametrize(
    "record",
    [
        {"edit": "narrow_mlp", "block": "model.layers.9", "width": 4},
        {"edit": "narrow_mlp", "block": "model.layers.0", "width": 129},
        {"edit": "narrow_attention", "block": "model.layers.0", "heads": 3, "kv_heads": 1},
        {"edit": "narrow_attention", "block": "model.layers.0", "heads": 4, "kv_heads": 4},
        {"edit": "narrow_attention", "block": "model.layers.0", "heads": 2, "kv_heads": 2, "kept": [0, 2]},
        {"edit": "narrow_experts", "block": "model.layers.0", "experts": 2},
        {"edit": "narrow_residual", "block": "model.layers.0", "width": 65},
        {"edit": "narrow_outer", "width": 65},
        {"edit": "drop_blocks", "stack": "model.layers", "keep": [-1, 0]},
        {"edit": "drop_blocks", "stack": "model.layers", "keep": [1, 0]},
        {"edit": "drop_blocks", "stack": "model.layers", "keep": [0, 3]},
        {"edit": "drop_blocks", "stack": "model.layers", "keep": []},
    ],
)
def test_damaged_records_are_refused(record):
    with pytest.raises(UserError, match=r"does not fit the model: .*[^.]\.$"):
        replay(meta_model("llama"), [parse_edit(record)])


@pytest.mark.parametrize(
    "family, numbers",
    [
        ("llama", {"edit": "narrow_mlp", "width": 10**15}),
        ("llama", {"edit": "narrow_attention", "heads": 10**15, "kv_heads": 10**15}),
        ("mixtral", {"edit": "narrow_experts", "experts": 10**15}),
        ("mixtral", {"edit": "narrow_experts", "width": 10**15}),
    ],
)
def test_a_record_cannot_ask_for_memory(family, numbers):
    record = parse_edit({**numbers, "block": "model.layers.0"})
    with pytest.raises(UserError, match=f"{10**15} cannot stay of"):
        replay(meta_model(family), [record])
