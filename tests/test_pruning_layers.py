"""Pruning of whole blocks: scores and refit against naive ones, and what is saved against skipping blocks by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

import llmslim
from llmslim import pipeline
from llmslim.anatomy import Anatomy
from llmslim.checkpoint.plain import absorb
from llmslim.checkpoint.verify import verify
from llmslim.checkpoint.writer import CheckpointWriter
from llmslim.edit import DropBlocks
from llmslim.errors import UserError
from llmslim.loaders.models import skeleton
from llmslim.pipeline import compress
from llmslim.pruning import _depth
from llmslim.pruning._neighbour import refit_neighbours
from llmslim.pruning.edits import NarrowMLP
from llmslim.pruning.layers import PruneLayers, pinned_blocks
from llmslim.recipe import Calibration
from llmslim.report.figures import pruned
from llmslim.step import build_step
from tests.checkpoints import load_elsewhere, outlook
from tests.test_pruning_structured import Look
from tests.tiny import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    example_inputs,
    meta_model,
    save_tiny,
    tiny_config,
    tiny_model,
)

pytestmark = pytest.mark.usefixtures("verified_here")

QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=8, seq_len=32), "evaluation": None}
LLAMA = "model.layers"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


def look_at(family: str, blocks: int = 3) -> Look:
    look = Look(family)
    if blocks != 3:
        look.model = tiny_model(family, num_hidden_layers=blocks)
        look.model.config.use_cache = False
        look.anatomy = Anatomy.of(look.model)
    return look


@contextmanager
def outputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Name -> (input, output) of modules in the forwards meanwhile."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            seen[name] = args[0], output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    yield seen
    for handle in handles:
        handle.remove()


@torch.no_grad()
def hidden_states(look: Look) -> tuple[Tensor, ...]:
    """In front of each block, and behind the last (without the norm that follows there)."""
    model = copy.deepcopy(look.model)
    if hasattr(model, "model"):
        model.model.norm = nn.Identity()
    return model(input_ids=look.tokens, output_hidden_states=True).hidden_states


# --- scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_influence_is_the_formula_on_hidden_states(family: str) -> None:
    look = look_at(family)
    states = hidden_states(look)
    (scores,) = _depth.influence(look).values()
    for score, x, y in zip(scores, states[:-1], states[1:], strict=True):
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        assert float(score) == pytest.approx(1 - float(cosine.mean()), abs=1e-5)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_angles_are_those_of_hidden_states_around_runs(family: str, count: int) -> None:
    look = look_at(family)
    states = hidden_states(look)
    name = look.anatomy.stacks[0].name
    scores = _depth.run_angles(look, {name: count})[name]
    for start in range(3 - count + 1):
        x, y = states[start], states[start + count]
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        assert float(scores[start]) == pytest.approx(float((cosine.arccos() / torch.pi).mean()), abs=1e-5)
    assert len(scores) == 3 and torch.isinf(scores[3 - count + 1 :]).all()


@torch.no_grad()
def loss_without(look: Look, gone: dict[str, list[int]]) -> float:
    """By a model whose ModuleLists lack the blocks."""
    model = copy.deepcopy(look.model)
    for name, indices in gone.items():
        parent, _, leaf = name.rpartition(".")
        blocks = [block for i, block in enumerate(model.get_submodule(name)) if i not in indices]  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), leaf, nn.ModuleList(blocks))
    inputs = {"decoder_input_ids": look.tokens} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=look.tokens, **inputs).logits[:, :-1]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), look.tokens[:, 1:].flatten()))


@pytest.mark.parametrize(
    ("family", "blocks", "counts"), [("llama", 5, [2]), ("gpt2", 3, [2]), ("t5", 3, [1, 2])]
)
def test_greedy_is_greedy_by_the_loss_of_models_without_the_blocks(
    family: str, blocks: int, counts: list[int]
) -> None:
    look = look_at(family, blocks)
    left = {stack.name: count for stack, count in zip(look.anatomy.stacks, counts, strict=True)}
    pinned = {f"{name}.0" for name in pinned_blocks(look.anatomy)}
    expected: dict[str, list[int]] = {name: [] for name in left}
    for _ in range(sum(counts)):
        losses = {
            (name, index): loss_without(look, expected | {name: [*expected[name], index]})
            for name in left
            if len(expected[name]) < left[name]
            for index in range(blocks)
            if index not in expected[name] and f"{name}.{index}" not in pinned
        }
        name, index = min(losses, key=losses.__getitem__)
        expected[name].append(index)
    found, scores = _depth.greedy(look, left, pinned)
    assert found == {name: sorted(indices) for name, indices in expected.items()}
    first = next(iter(left))
    rise = loss_without(look, {first: [1]}) - loss_without(look, {})
    if sum(counts) == 1:
        assert float(scores[first][1]) == pytest.approx(rise, abs=1e-4)


def test_greedy_scores_are_rises_of_the_loss() -> None:
    look = look_at("llama", 4)
    found, scores = _depth.greedy(look, {LLAMA: 1}, set())
    base = loss_without(look, {})
    rises = [loss_without(look, {LLAMA: [index]}) - base for index in range(4)]
    torch.testing.assert_close(scores[LLAMA], torch.tensor(rises, dtype=torch.float64), atol=1e-4, rtol=1e-4)
    assert found == {LLAMA: [min(range(4), key=rises.__getitem__)]}


def test_random_goes_by_the_seed() -> None:
    look = look_at("llama", 8)
    chosen = []
    for seed in (0, 0, 1, 2, 3):
        look.seed = seed
        chosen.append(tuple(PruneLayers(criterion="random", ratio=0.5)._choose(look)[0][LLAMA]))
    assert chosen[0] == chosen[1] and len(set(chosen)) > 1


# --- refit --------------------------------------------------------------------------------------------------


def naive_problem(look: Look, index: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs of down, what is missing, weight) of block `index`, whose output is to be that of block `target`."""
    layers = look.model.get_submodule(LLAMA)
    down = layers[index].mlp.down_proj  # type: ignore[index]
    modules = {"down": down, "here": layers[index], "there": layers[target]}  # type: ignore[index]
    with torch.no_grad(), outputs_of(modules) as seen:
        look.model(input_ids=look.tokens)
    wanted = seen["there"][1].flatten(0, 1).double()
    scale = 1 / wanted.norm(dim=-1, keepdim=True)
    missing = wanted - seen["here"][1].flatten(0, 1).double()
    return seen["down"][0].flatten(0, 1).double() * scale, missing * scale, down.weight.detach().double()


@pytest.mark.parametrize(("keep", "target"), [([0, 2], 1), ([0], 2), ([0, 1], 2)])
@pytest.mark.parametrize("damping", [1e-9, 1e-2])
def test_refit_is_least_squares_pulled_to_the_old_weights(
    keep: list[int], target: int, damping: float
) -> None:
    look = look_at("llama")
    index = max(i for i in keep if i < target)
    x, missing, weight = naive_problem(look, index, target)
    ridge = damping * float(x.square().sum(0).mean())
    rows = torch.cat([x, ridge**0.5 * torch.eye(x.shape[1], dtype=torch.float64)])
    wanted = torch.cat([missing, torch.zeros(x.shape[1], missing.shape[1], dtype=torch.float64)])
    change = torch.linalg.lstsq(rows, wanted).solution.T
    (found,) = refit_neighbours(look, {LLAMA: keep}, damping).items()
    assert found[0] == f"{LLAMA}.{index}.mlp.down_proj.weight".removesuffix(".weight")
    torch.testing.assert_close(found[1].weight.double(), weight + change, atol=2e-3, rtol=2e-3)
    assert found[1].before == pytest.approx(float(missing.square().sum(1).mean()), rel=1e-4)
    after = float((missing - x @ change.T).square().sum(1).mean())
    assert found[1].after == pytest.approx(after, rel=1e-3) and found[1].after < 0.7 * found[1].before


@pytest.mark.parametrize(
    ("family", "keep", "at"),
    [("llama", [0, 2, 4], [0, 2]), ("gpt2", [0, 3], [0, 3]), ("gpt_neox", [2, 3], [2, 3])],
)
def test_errors_told_are_those_of_the_shortened_model(family: str, keep: list[int], at: list[int]) -> None:
    """Each refit is made on what the earlier ones left, for the whole model's states behind its gap."""
    look = look_at(family, 5)
    stack = look.anatomy.stacks[0].name
    refits = refit_neighbours(look, {stack: keep}, 1e-6)
    short = copy.deepcopy(look.model)
    for name, refit in refits.items():
        weight = short.get_submodule(name).weight
        weight.data = (refit.weight.T if family == "gpt2" else refit.weight).contiguous()  # type: ignore[union-attr]
    DropBlocks(stack=stack, keep=tuple(keep)).apply(short)
    gaps = {index: next((i for i in keep if i > index), 5) - 1 for index in at}
    states = []
    for model, numbers in (
        (short, {index: keep.index(index) for index in at}),
        (look.model, gaps),
    ):
        blocks = model.get_submodule(stack)
        with torch.no_grad(), outputs_of({str(i): blocks[n] for i, n in numbers.items()}) as seen:  # type: ignore[index]
            model(input_ids=look.tokens)
        states.append({index: seen[str(index)][1] for index in at})
    assert len(refits) == len(at)
    for index, refit in zip(at, refits.values(), strict=True):
        got, wanted = states[0][index], states[1][index]
        error = ((got - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
        assert refit.after == pytest.approx(float(error), rel=1e-3) and refit.after < refit.before


@pytest.mark.parametrize("family", ["bert", "gemma2", "mixtral", "qwen3_moe"])
def test_what_cannot_be_refitted_is_noted_and_stays(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    report = compress(str(folders[family]), [PruneLayers(drop=(1,))], tmp_path / "out", **QUICK).report
    assert ["not refitted" in note["what"] for note in report["notes"]] == [True]
    plain = compress(str(folders[family]), [PruneLayers(drop=(1,), refit=False)], tmp_path / "no", **QUICK)
    assert not plain.report["notes"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "no/model.safetensors"
    ).read_bytes()


# --- the whole road -----------------------------------------------------------------------------------------

EXTRA: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "gemma2-first": ("gemma2", {}, (0,)),
    "qwen3_moe-first": ("qwen3_moe", {}, (0,)),
    "qwen3_moe-period": (
        "qwen3_moe",
        {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": []},
        (0, 3),
    ),
    "qwen3-mixed": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        },
        (0,),
    ),
    "t5-decoder": ("t5", {}, (4, 5)),
    "modernbert-one-kind": ("modernbert", {}, (1,)),
}
CASES = {family: (family, {}, (1, 5) if family == "t5" else (1,)) for family in FAMILIES} | EXTRA


def skipping(model: PreTrainedModel, numbers: tuple[int, ...]) -> PreTrainedModel:
    """The model with blocks that hand on their input; T5's, which hand on a bias too, are taken out of the list."""
    for number in sorted(numbers, reverse=True):
        block = Anatomy(model).blocks[number]
        if model.config.model_type == "t5":
            del model.get_submodule(block.name.rpartition(".")[0])[block.index]  # type: ignore[attr-defined]
        else:
            block.module.forward = lambda hidden_states, *args, **kwargs: hidden_states
    return model


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each case without some of its blocks, and without refit."""
    root = tmp_path_factory.mktemp("dropped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify_in_fresh_process", verify)
        for name, (family, config, numbers) in CASES.items():
            source = save_tiny(family, root / f"{name}-source", **config)
            compress(str(source), [PruneLayers(drop=numbers, refit=False)], root / name, **QUICK)
    return {name: root / name for name in CASES}


def test_plain_transformers_gives_what_skipping_the_blocks_gives(
    dropped: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load_elsewhere("transformers", dropped, tmp_path)
    for name, (family, config, numbers) in CASES.items():
        model = skipping(tiny_model(family, **config), numbers)
        with torch.no_grad():
            expected = model(**example_inputs(model))[0]
        torch.testing.assert_close(
            loaded[name], expected, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_configs_say_how_many_blocks_and_of_what_kind(dropped: dict[str, Path]) -> None:
    for name, (_, config, numbers) in CASES.items():
        made = AutoConfig.from_pretrained(dropped[name])
        assert not hasattr(made, "quantization_config")
        if name.startswith("t5"):
            assert (made.num_layers, made.num_decoder_layers) == ((2, 2) if name == "t5" else (3, 1))
        else:
            assert made.num_hidden_layers == config.get("num_hidden_layers", 3) - len(numbers)
        assert (
            len(getattr(made, "layer_types", None) or [0] * made.num_hidden_layers) == made.num_hidden_layers
        )
    kinds = {name: AutoConfig.from_pretrained(dropped[name]) for name in EXTRA}
    assert kinds["gemma2-first"].layer_types == ["full_attention", "sliding_attention"]
    assert kinds["qwen3_moe-first"].mlp_only_layers == [0]
    assert kinds["qwen3_moe-period"].mlp_only_layers == [1]
    assert set(kinds["modernbert-one-kind"].layer_types) == {"full_attention"}


@pytest.mark.parametrize("family", [*DECODERS, "t5"])
def test_generation_with_a_cache_is_generation_without(family: str, dropped: dict[str, Path]) -> None:
    model, _ = llmslim.load(dropped[family], dtype=torch.float32)
    prompt = example_inputs(model, batch=1, seq=12)["input_ids"]
    made = [model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*made)


@pytest.mark.parametrize(("family", "criterion"), [
    *((family, "influence") for family in FAMILIES), ("t5", "perplexity"), ("llama", "perplexity"),
    ("bert", "angular"), ("t5", "angular"), ("modernbert", "random"),
])  # fmt: skip
def test_every_family_loses_the_share_and_verifies(
    family: str, criterion: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    step = build_step("layers", {"criterion": criterion})
    report = compress(str(folders[family]), [step], tmp_path / "out", **QUICK).report
    assert report["verification"]["ok"] and report["verification"]["max_error"] == 0
    rows = report["linears"]
    (said,) = pruned(report)
    assert all(row["name"] in said for row in rows if not row["kept"])
    blocks = Anatomy(meta_model(family)).blocks
    assert [row["name"] for row in rows] == [block.name for block in blocks]
    assert len(rows) - sum(row["kept"] for row in rows) == len(
        step.planned_edits(Anatomy(meta_model(family)))
    )
    scored = [row for row in rows if "score" in row]
    if criterion == "influence":
        assert len(scored) == len(rows)
        for stack in {row["name"].rpartition(".")[0] for row in rows}:
            here = [row for row in rows if row["name"].startswith(stack)]
            free = here[1:] if family in ("t5", "modernbert") else here
            assert min(free, key=lambda row: row["score"])["kept"] == 0
    assert bool(report["notes"]) != any(
        row.get("error", 1) < row.get("error_without_refit", 0) for row in rows
    )


@pytest.mark.parametrize(
    ("family", "steps", "plain"),
    [
        ("llama", [("layers", {}), ("mlp", {}), ("rtn", {"group_size": 32})], False),
        ("llama", [("mlp", {}), ("layers", {}), ("layers", {"ratio": 0.5, "criterion": "angular"})], True),
        ("gpt2", [("heads", {"ratio": 0.5}), ("layers", {"drop": "0"})], False),  # heads stay edits
        ("gpt2", [("layers", {"drop": 1}), ("heads", {"ratio": 0.5})], False),
        ("llama", [("rtn", {"group_size": 32}), ("layers", {"drop": [0]})], False),
        ("llama", [("magnitude", {}), ("layers", {})], False),
        ("mixtral", [("rtn", {"group_size": 32}), ("layers", {})], False),
        ("t5", [("heads", {"ratio": 0.5}), ("layers", {}), ("wanda", {})], False),
    ],
)
def test_layers_go_with_other_steps_in_any_order(
    family: str, steps: list, plain: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Edits made before are about blocks that have other names afterwards."""
    made = [build_step(*step) for step in steps]
    result = compress(str(folders[family]), made, tmp_path / "out", **QUICK)
    assert result.report["verification"]["ok"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert ("quantization_config" not in config) == plain
    if steps[0][0] in ("rtn", "magnitude"):
        assert "compressed already" in result.report["notes"][-1]["what"] or family == "mixtral"
    assert "drop_blocks" not in json.dumps(config)
    model, _ = llmslim.load(tmp_path / "out")
    rounds = sum(kind == "layers" for kind, _ in steps)
    assert all(len(stack.blocks) == 3 - rounds for stack in Anatomy(model).stacks)


def test_edits_on_dropped_blocks_go_and_others_are_renamed() -> None:
    model = skeleton(tiny_config("llama", num_hidden_layers=6))
    narrow = [NarrowMLP(block=f"{LLAMA}.{index}", width=64 + index) for index in range(6)]
    edits = [
        *narrow,
        DropBlocks(stack=LLAMA, keep=(0, 2, 3, 5)),
        NarrowMLP(block=f"{LLAMA}.1", width=32),
        DropBlocks(stack=LLAMA, keep=(1, 3)),
    ]
    config, rest = absorb(model.config, edits, model)
    assert config.num_hidden_layers == 2 and model.config.num_hidden_layers == 6
    assert [(edit.block, edit.width) for edit in rest] == [  # type: ignore[attr-defined]
        (f"{LLAMA}.0", 66), (f"{LLAMA}.1", 69), (f"{LLAMA}.0", 32)
    ]  # fmt: skip


def test_an_interrupted_run_goes_on_with_its_survey_and_gives_the_same_bytes(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = PruneLayers(drop=(1,))
    compress(str(folders["llama"]), [step], tmp_path / "whole", **QUICK)
    write = CheckpointWriter.write_block

    def breaking(self: Any, model: Any, name: str, new_name: str | None = None) -> None:
        if name.endswith(".2"):
            raise KeyboardInterrupt
        write(self, model, name, new_name)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write_block", breaking)
        with pytest.raises(KeyboardInterrupt):
            compress(str(folders["llama"]), [step], tmp_path / "out", **QUICK)
    monkeypatch.setattr(PruneLayers, "survey", lambda self, look: pytest.fail("surveyed twice"))
    report = compress(str(folders["llama"]), [step], tmp_path / "out", **QUICK).report
    assert report["run"]["resumed"] and [row["kept"] for row in report["linears"]] == [1, 0, 1]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        (
            "llama",
            {"ratio": 0.1},
            "removes none of the 3 blocks of model.layers; ratios that work: 1/3 = 0.333",
        ),
        ("llama", {"ratio": 0.9}, "removes all of the 3 blocks"),
        ("llama", {"drop": "3"}, r"drop = 3: there is no such block; there are 0 to 2 \(model.layers\)"),
        ("llama", {"drop": "-1"}, "drop = -1: there is no such block"),
        ("llama", {"drop": "0,1,2"}, "takes out all of the blocks .*: leave at least one"),
        ("t5", {"drop": "6"}, r"0 to 2 \(encoder.block\), 3 to 5 \(decoder.block\)"),
        ("t5", {"drop": "3"}, "drop = 3: .*first block of decoder.block.* must stay"),
        ("modernbert", {"drop": "0"}, "must stay"),
        ("bert", {"criterion": "perplexity"}, "BertForMaskedLM does not predict the next token"),
    ],
)
def test_what_cannot_be_removed_is_refused_before_the_work(
    family: str, fields: dict[str, Any], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        compress(str(folders[family]), [build_step("layers", fields)], tmp_path / "out", **QUICK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"drop": "3", "ratio": 0.5}, "drop says which blocks go, and ratio chooses others"),
        ({"drop": [3], "criterion": "random"}, "and criterion chooses others"),
        ({"drop": "3;7"}, "drop = '3;7'"),
        ({"criterion": "obs"}, "criterion = 'obs': Input should be 'influence', 'angular', 'perplexity' or"),
        ({"ratio": 1}, "ratio = 1"),
    ],
)
def test_fields_that_contradict_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_step("layers", fields)


def test_the_plan_names_the_blocks_that_were_named() -> None:
    step = build_step("layers", {"drop": "0,1", "retrain": {"full": {}}})
    assert step.resolve(outlook("llama"))[1].startswith("layers with retrain: drop 0,1 and full; leaves 0.")


def test_attention_scaled_by_the_number_of_the_block_is_refused() -> None:
    model = meta_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UserError, match="scales attention by the number of the block"):
        PruneLayers().check(Anatomy(model))


def test_pinned_blocks_are_those_that_a_config_makes_unlike_the_others() -> None:
    pinned = {family for family in FAMILIES if pinned_blocks(Anatomy(meta_model(family)))}
    assert pinned == {"t5", "modernbert"} and not pinned & {*DECODERS}
    assert "bert" in ENCODERS and pinned_blocks(Anatomy(meta_model("t5"))) == {
        "encoder.block",
        "decoder.block",
    }
