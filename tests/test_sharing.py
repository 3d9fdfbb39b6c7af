"""Sharing: groups and fits against brute force, what is stored once, what may follow, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmslim
import llmslim.plugin
from llmslim.anatomy import Anatomy
from llmslim.checkpoint.reader import CheckpointReader
from llmslim.edit import replay
from llmslim.errors import UserError
from llmslim.pipeline import compress
from llmslim.prepare import prepare
from llmslim.recipe import Recipe
from llmslim.sharing.edits import ShareLinear
from llmslim.sharing.groups import cheapest, cyclic, sequential
from llmslim.sharing.share import Moment, ShareBlocks, Sums
from llmslim.ties import shared_modules
from tests import reference
from tests.checkpoints import Made, compress_many, inputs_of, logits_of
from tests.tiny import FAMILIES, meta_model, save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")

TEXT = str(Path(__file__).with_name("short.txt"))  # tokenized at once
QUICK: dict[str, Any] = {"calibration": {"text": TEXT, "num_samples": 4, "seq_len": 32}, "evaluation": None}
SHARE: dict[str, Any] = {"share": {"unique_blocks": 2}}
DELTAS: dict[str, Any] = {"share": {"unique_blocks": 2, "delta_rank": 8}}


def recipe(*steps: dict[str, Any], **fields: Any) -> Recipe:
    return Recipe.parse({"steps": list(steps), **QUICK, **fields})


def stored(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("model.safetensors", "config.json")]


# --- groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("longest", [2, 3, 7])
def test_the_cheapest_groups_are_those_of_all_ways_to_cut(seed: int, longest: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks = 7
    costs = []
    for start in range(blocks):
        more = torch.rand(min(longest, blocks - start) - 1, generator=generator).cumsum(0)
        costs.append([0.0, *more.tolist()])
    for unique in range(-(-blocks // longest), blocks + 1):
        groups = cheapest(costs, unique)
        assert len(groups) == unique and [i for group in groups for i in group] == list(range(blocks))
        total = sum(costs[group[0]][len(group) - 1] for group in groups)
        assert total == pytest.approx(reference.best_groups(costs, unique))
    if longest < blocks:
        with pytest.raises(ValueError, match="cannot be 1 groups"):
            cheapest(costs, 1)


def test_groups_by_place() -> None:
    assert sequential(7, 3) == [[0, 1, 2], [3, 4], [5, 6]]
    assert sequential(4, 1) == [[0, 1, 2, 3]] and sequential(3, 3) == [[0], [1], [2]]
    assert cyclic(7, 3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert cyclic(4, 1) == [[0, 1, 2, 3]]


# --- the fit ------------------------------------------------------------------------------------------------


def moment(weight: Tensor, inputs: Tensor) -> Moment:
    power = float((inputs @ weight.T).square().sum())
    return Moment(weight, inputs.T @ inputs, 1 / power if power else 0.0)


@pytest.fixture(scope="module")
def blocks() -> tuple[list[Tensor], list[Tensor]]:
    """Weights [12, 8] of three blocks and their inputs [50, 8], of different scales."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(12, 8, generator=generator) * scale for scale in (1.0, 3.0, 0.5)]
    mixes = [torch.randn(8, 8, generator=generator) * scale for scale in (1.0, 0.1, 5.0)]
    return weights, [torch.randn(50, 8, generator=generator) @ mix for mix in mixes]


def relative_errors(shared: Tensor, weights: list[Tensor], inputs: list[Tensor]) -> float:
    errors = [
        (x @ (shared - w).T).square().sum() / (x @ w.T).square().sum()
        for w, x in zip(weights, inputs, strict=True)
    ]
    return float(sum(errors))


@pytest.mark.parametrize("damping", [1e-8, 1e-2, 1.0])
def test_the_shared_weight_is_the_least_squares_one(
    damping: float, blocks: tuple[list[Tensor], list[Tensor]]
) -> None:
    weights, inputs = blocks
    sums = Sums()
    for weight, rows in zip(weights, inputs, strict=True):
        sums.add(moment(weight, rows))
    fitted, error = sums.fit(damping)
    expected = reference.shared_weight(weights, inputs, damping).float()
    torch.testing.assert_close(fitted, expected, rtol=1e-3, atol=1e-3)
    assert error == pytest.approx(relative_errors(fitted, weights, inputs), rel=1e-3)


def test_a_fit_loses_less_than_a_mean_or_a_copy(blocks: tuple[list[Tensor], list[Tensor]]) -> None:
    weights, inputs = blocks
    sums = Sums()
    for weight, rows in zip(weights, inputs, strict=True):
        sums.add(moment(weight, rows))
    _, error = sums.fit(1e-8)
    mean = torch.stack(weights).mean(0)
    assert error < min(relative_errors(each, weights, inputs) for each in (mean, *weights))


def test_alike_blocks_cost_nothing_and_silent_ones_nothing_either() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(12, 8, generator=generator), torch.randn(50, 8, generator=generator)
    fitted, error = Sums().add(moment(weight, rows)).add(moment(weight, 2 * rows)).fit(1e-4)
    torch.testing.assert_close(fitted, weight)
    assert error == pytest.approx(0, abs=1e-5)
    silent = moment(weight + 1, torch.zeros(1, 8))  # an expert that no token chose
    fitted, error = Sums().add(moment(weight, rows)).add(silent).fit(1e-6)
    torch.testing.assert_close(fitted, weight, rtol=1e-3, atol=1e-3)
    assert error == pytest.approx(0, abs=1e-5)
    fitted, error = Sums().add(silent).add(moment(weight, torch.zeros(1, 8))).fit(1e-4)
    torch.testing.assert_close(fitted, weight + 0.5)
    assert error == 0


def test_a_fit_of_few_inputs_is_found(blocks: tuple[list[Tensor], list[Tensor]]) -> None:
    """One input of eight, a huge one: in float32 the sums are hardly positive definite."""
    weights, inputs = blocks
    sums = Sums()
    for weight, rows in zip(weights, inputs, strict=True):
        sums.add(moment(weight, 1e6 * rows[:1]))
    assert bool(sums.fit(1e-30)[0].isfinite().all())


# --- what is shared of a block ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_are_the_block(family: str) -> None:
    anatomy = Anatomy(meta_model(family))
    for block in anatomy.blocks:
        parts = {part: set(ShareBlocks(part=part).targets(block)) for part in ("block", "attention", "mlp")}
        assert parts["attention"] and parts["mlp"] and not parts["attention"] & parts["mlp"]
        assert parts["attention"] | parts["mlp"] == parts["block"]
        assert block.attention.o.name in parts["attention"] and block.attention.q.name in parts["attention"]
        if block.cross_attention is not None:
            assert block.cross_attention.o.name in parts["attention"]


# --- every family -------------------------------------------------------------------------------------------

INITS, GROUPINGS, PARTS = (
    ("fit", "mean", "first"),
    ("similarity", "sequential", "cyclic"),
    ("block", "attention", "mlp"),
)
FOLLOWERS: dict[str, list[dict[str, Any]]] = {
    "gptq": [SHARE, {"gptq": {"group_size": 32, "symmetric": False}}],
    "rtn": [DELTAS, {"rtn": {"bits": 8, "group_size": 8}}],
    "sparsegpt": [DELTAS, {"sparsegpt": {}}],
    "svd_llm": [SHARE, {"svd_llm": {"allocation": "error"}}],
}
"""What follows on a shared model, in one recipe and from the saved folder."""


def kind_of(number: int) -> dict[str, Any]:
    """Every value of init, grouping and part with and without corrections, spread over the families."""
    step = {
        "init": INITS[number % 3],
        "grouping": GROUPINGS[number // 2 % 3],
        "part": ("block", *PARTS)[number % 4],
        "delta_rank": 4 * (number % 2),
    }
    return {"share": step}


EVERY = {family: kind_of(number) for number, family in enumerate(FAMILIES)}
EVERY |= {
    "mixtral": {"share": {"delta_rank": 4}},
    "qwen3_moe": {"share": {"part": "mlp", "grouping": "cyclic"}},
}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of four blocks."""
    return save_tiny("llama", tmp_path_factory.mktemp("four") / "llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def made(four: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    models, root = (tmp_path_factory.mktemp(name) for name in ("models", "outputs"))
    overrides: dict[str, dict[str, Any]] = {"qwen3_moe": {"mlp_only_layers": []}}
    jobs = {
        family: (save_tiny(family, models / family, **overrides.get(family, {})), [step])
        for family, step in EVERY.items()
    }
    jobs |= {"share": (four, [SHARE]), "deltas": (four, [DELTAS])}
    for name, (first, then) in FOLLOWERS.items():
        jobs[name] = (four, [first, then])
        jobs[f"{name}-by-hand"] = (root / ("share" if first is SHARE else "deltas"), [then])
    return compress_many(jobs, root, **QUICK)


@pytest.mark.parametrize(
    "name", [*EVERY, "share", "deltas", *FOLLOWERS, *(f"{n}-by-hand" for n in FOLLOWERS)]
)
def test_every_family_shares_and_loads(name: str, made: dict[str, Made]) -> None:
    verification, report = made[name].verification, made[name].report
    assert verification["ok"], verification["checks"]
    assert verification["max_error"] == 0
    size = report["size"]
    assert size["result"]["unique_parameters"] < size["result"]["effective_parameters"]
    assert size["result"]["bytes_on_disk"] < size["base"]["bytes_on_disk"]
    tensors = load_file(made[name].folder / "model.safetensors")
    model, _ = llmslim.load(str(made[name].folder), dtype="auto")
    shared = shared_modules(model)
    assert shared
    for target, source in shared.items():  # stored once, once in memory
        assert not [n for n in tensors if n.startswith(f"{target}.") and not n.endswith(".bias")]
        here, there = (model.get_submodule(n) for n in (target, source))
        own = {n: p for n, p in there.named_parameters() if not n.endswith("bias")}
        assert own or list(there.buffers())
        for path, parameter in own.items():
            assert here.get_parameter(path).data_ptr() == parameter.data_ptr() != 0
    if name in EVERY or name in ("share", "deltas"):
        assert size["result"]["unique_parameters"] == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("name", FOLLOWERS)
def test_what_follows_is_the_same_by_hand(name: str, made: dict[str, Made]) -> None:
    assert stored(made[name].folder) == stored(made[f"{name}-by-hand"].folder)


def test_half_of_the_blocks_is_half_of_their_bytes(made: dict[str, Made]) -> None:
    size = made["share"].report["size"]
    assert size["result"]["block_bytes"] <= 0.55 * size["base"]["block_bytes"]
    assert size["result"]["effective_parameters"] == size["base"]["parameters"]
    assert size["result"]["bytes_on_disk"] == pytest.approx(4 * size["result"]["unique_parameters"], rel=0.05)


@pytest.mark.parametrize("name", ["deltas", "gpt2", "t5", "gptq", "sparsegpt", "mixtral"])
def test_a_loaded_model_saves_and_loads_as_it_was(name: str, made: dict[str, Made], tmp_path: Path) -> None:
    folder = made[name].folder
    model, _ = llmslim.load(str(folder), dtype="auto")
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    again = type(model).from_pretrained(tmp_path / "again", dtype="auto")
    assert shared_modules(again) == shared_modules(model)
    assert torch.equal(logits_of(again), logits_of(model))


@torch.no_grad()
def test_the_plug_in_keeps_one_weight_in_memory(made: dict[str, Made]) -> None:
    model = AutoModelForCausalLM.from_pretrained(made["deltas"].folder, dtype=torch.float32)
    shared = shared_modules(model)
    assert shared and all(
        model.get_parameter(f"{target}.weight") is model.get_parameter(f"{source}.weight")
        for target, source in shared.items()
    )
    distinct = sum(parameter.numel() for parameter in model.parameters())
    assert distinct == made["deltas"].report["size"]["result"]["unique_parameters"]
    before = logits_of(model)
    name, source = next(iter(shared.items()))
    model.get_parameter(f"{source}.weight").mul_(2)
    assert torch.equal(model.get_parameter(f"{name}.weight"), model.get_parameter(f"{source}.weight"))
    assert not torch.equal(logits_of(model), before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["share", "deltas", "gptq", "mistral", "gemma2", "gpt2", "mixtral"])
def test_each_block_has_its_own_cache(name: str, made: dict[str, Made]) -> None:
    model, _ = llmslim.load(str(made[name].folder), dtype=torch.float32)
    tokens = inputs_of(model)["input_ids"][:1]
    settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    cached = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    for _ in range(12):
        scores = model(tokens, use_cache=False).logits[:, -1]
        scores[:, model.generation_config.eos_token_id] = -torch.inf
        tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, tokens)


def test_corrections_of_full_rank_give_the_base_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShareBlocks, "_check_rank", lambda *args: None)  # they save nothing
    base = save_tiny("gpt2", tmp_path / "base")
    for init in ("fit", "first"):
        step = {"share": {"unique_blocks": 1, "init": init, "delta_rank": 64}}
        shared = compress(str(base), recipe(step), tmp_path / init).folder
        before, after = (logits_of(llmslim.load(str(f), dtype=torch.float32)[0]) for f in (base, shared))
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_corrections_bring_the_outputs_closer(four: Path, tmp_path: Path) -> None:
    errors = []
    for rank in (0, 4, 12):
        step = {"share": {"unique_blocks": 2, "delta_rank": rank, "grouping": "sequential", "part": "mlp"}}
        linears = compress(str(four), recipe(step), tmp_path / str(rank)).report["linears"]
        errors.append(sum(row["output_error"] for row in linears))
    assert errors[0] > errors[1] > errors[2] > 0


def test_similar_blocks_are_grouped(four: Path, tmp_path: Path) -> None:
    """The last three blocks are nearly the same one, of which sharing by place would spare one."""
    folder = shutil.copytree(four, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        for block in (2, 3):
            if name.startswith("model.layers.1."):
                tensors[name.replace("layers.1.", f"layers.{block}.")] = tensors[name] * 1.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, _ = llmslim.load(
        str(
            compress(
                str(folder),
                recipe({"share": {"unique_blocks": 2, "grouping": "similarity"}}),
                tmp_path / "out",
            ).folder
        )
    )
    sources = {source.split(".")[2] for source in shared_modules(model).values()}
    targets = {target.split(".")[2] for target in shared_modules(model)}
    assert sources == {"1"} and targets == {"2", "3"}


# --- stopped runs -------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def test_a_stopped_run_goes_on_to_the_same_bytes(four: Path, made: dict[str, Made], tmp_path: Path) -> None:
    steps = FOLLOWERS["rtn"]
    seen: list[tuple[str, int]] = []

    def stopping(when: Callable[[str, int], bool]) -> Any:
        def progress(what: str, done: int, total: int) -> None:
            seen.append((what, done))
            if when(what, done):
                raise Stop

        return progress

    places = [("share", 1), ("share", 3), ("rtn", 0), ("rtn", 2), ("rtn", 3)]
    for place in places:
        with pytest.raises(Stop):
            compress(
                str(four), recipe(*steps), tmp_path / "out",
                progress=stopping(lambda what, done, place=place: (what, done) == place),
            )  # fmt: skip
    resumed = compress(str(four), recipe(*steps), tmp_path / "out")
    assert resumed.report["run"]["resumed"]
    assert stored(resumed.folder) == stored(made["rtn"].folder)
    assert resumed.report["linears"] == made["rtn"].report["linears"]


# --- what is refused ----------------------------------------------------------------------------------------

EIGHT_BIT: dict[str, Any] = {"rtn": {"bits": 8, "group_size": 32}}
CUTTING: dict[str, dict[str, Any]] = {
    "mlp": {"ratio": 0.25},
    "heads": {"ratio": 0.5, "unit": "group"},
    "layers": {"ratio": 0.25},
    "width": {"ratio": 0.25},
    "taylor": {},
    "snip": {},
    "grasp": {},
}


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*args: Any, **options: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(CheckpointReader, "fill", fill)


@pytest.mark.parametrize("first", [SHARE, DELTAS], ids=["share", "deltas"])
@pytest.mark.parametrize("kind", CUTTING)
def test_what_is_shared_cannot_be_cut(
    kind: str, first: dict[str, Any], four: Path, tmp_path: Path, unread: None
) -> None:
    with pytest.raises(
        UserError, match=f"shares the weight of .*: prune by {kind} first, then share"
    ) as refused:
        compress(str(four), recipe(first, {kind: CUTTING[kind]}), tmp_path / "out")
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_shared_experts_cannot_be_cut(made: dict[str, Made], unread: None) -> None:
    with pytest.raises(UserError, match="shares the weight of .*: prune by experts first, then share"):
        prepare(str(made["mixtral"].folder), recipe({"experts": {"ratio": 0.25}}))


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (
            [{"share": {"group_size": 5}}],
            r"group_size 5 is more than the 4 blocks of model\.layers; use at most 4\.",
        ),
        (
            [{"share": {"unique_blocks": 4}}],
            r"unique_blocks 4 of the 4 blocks .* leaves nothing to share; use 1 to 3",
        ),
        ([{"share": {"unique_blocks": 9}}], r"unique_blocks 9 of the 4 blocks .* leaves nothing to share"),
        ([{"share": {"unique_blocks": 2, "group_size": 3}}], r"group_size and unique_blocks both"),
        (
            [{"share": {"grouping": "similarity", "unique_blocks": 1, "longest": 2}}],
            r"longest 2 allows no 1 groups of 4 blocks; .* 4\.",
        ),
        (
            [{"share": {"grouping": "cyclic", "longest": 3}}],
            r"longest is an option of grouping similarity only",
        ),
        (
            [{"share": {"grouping": "cyclic", "init": "mean", "fit_damping": 0.1}}],
            r"fit_damping is an option of init fit and grouping similarity only",
        ),
        ([{"share": {"unique_blocks": 2, "delta_rank": 18}}], r"delta_rank 18 saves nothing: .* is 17\."),
        (
            [{"share": {"unique_blocks": 2, "delta_rank": 40}}],
            r"delta_rank 40 is more than .*k_proj \(32 x 64\)",
        ),
        ([{"share": {"include": ["nothing"]}}], r"Nothing to share: include=\['nothing'\]"),
        ([{"share": {"init": "last"}}], r"init = 'last'"),
        ([EIGHT_BIT, SHARE], r"q_proj is quantized, .*: share before quantizing\."),
        ([{"wanda": {}}, SHARE], r"q_proj has pruned single weights, .*: share first\."),
        ([{"svd": {}}, SHARE], r"q_proj is factored, .*: share first\."),
        ([SHARE, SHARE], r"shares weights between blocks already"),
        ([DELTAS, {"svd": {}}], r"q_proj shares its weight and has a correction already"),
        ([DELTAS, EIGHT_BIT], r"group_size 32 does not divide the 8 inputs of .*q_proj\.u; 8 do"),
    ],
)
def test_what_cannot_be_is_said_before_a_weight_is_read(
    steps: list[Any], said: str, four: Path, tmp_path: Path, unread: None
) -> None:
    with pytest.raises(UserError, match=said) as refused:
        compress(str(four), recipe(*steps), tmp_path / "out")
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_the_largest_rank_that_saves_is_let_through(four: Path) -> None:
    prepare(str(four), recipe({"share": {"unique_blocks": 2, "delta_rank": 17}}))


def test_blocks_of_different_shapes_are_refused(four: Path, tmp_path: Path) -> None:
    pruned = {"mlp": {"ratio": 0.5, "allocation": "sensitivity"}}
    with pytest.raises(UserError, match=r"cannot share mlp\..*, which is .* in the one and .* in the other"):
        compress(str(four), recipe(pruned, SHARE), tmp_path / "out")
    folder = save_tiny("qwen3_moe", tmp_path / "moe")  # its second block has no experts
    with pytest.raises(UserError, match=r"cannot share mlp\.experts.* not there in the other"):
        prepare(str(folder), recipe({"share": {}}))
    prepare(str(folder), recipe({"share": {"part": "attention"}}))


def test_formats_of_others_cannot_hold_it(four: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'gptq' cannot hold this result: .*'share_linear'"):
        compress(str(four), recipe(SHARE, {"gptq": {"group_size": 32}}, format="gptq"), tmp_path / "out")


def test_weights_and_inputs_that_are_not_finite_are_named(four: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(four, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    up = "model.layers.1.mlp.up_proj.weight"
    tensors[up][1, 2] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for number, init in enumerate(("fit", "mean")):
        step = {"share": {"init": init, "grouping": ("similarity", "cyclic")[number]}}
        with pytest.raises(UserError, match=rf"{up} has NaN or infinite values"):
            compress(str(folder), recipe(step), tmp_path / init)
    tensors[up][1, 2] = 1e30  # whose outputs, squared, are not
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    step = {"share": {"exclude": ["up_proj"], "delta_rank": 2}}
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj has NaN or infinite inputs"):
        compress(str(folder), recipe(step), tmp_path / "out")


def test_experts_that_no_token_reaches_are_shared_by_their_mean(tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path / "model", num_local_experts=8)
    fields: dict[str, Any] = {**QUICK, "calibration": {"text": TEXT, "num_samples": 1, "seq_len": 2}}
    compress(str(folder), recipe({"share": {}}, **fields), tmp_path / "out")


# --- damaged manifests --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        {"source": "layers.9.self_attn.q_proj.base"},
        {"source": "layers.0.self_attn.k_proj.base"},  # another shape
        {"source": "layers.0.self_attn.q_proj"},  # the whole, with its correction
        {"source": "layers.0.self_attn"},
        {"source": "layers.2.self_attn.q_proj"},  # itself
        {"source": 7},
        {"rank": 5},
        {"rank": -1},
        {"rank": 65},
        {"rank": 10**9},
        {"rank": 10**30},
        {"module": "layers.0.self_attn"},
        {"module": "nowhere"},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_damaged_manifest_is_no_traceback(
    damage: dict[str, Any], four: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    if not folder.exists():
        step = {
            "share": {
                "unique_blocks": 2,
                "delta_rank": 4,
                "grouping": "cyclic",
                "include": ["q_proj", "k_proj"],
            }
        }
        compress(str(four), recipe(step), folder)
        shutil.copy(folder / "config.json", folder / "whole.json")
    config = json.loads((folder / "whole.json").read_text())
    edits = config["quantization_config"]["edits"]
    (edit,) = [edit for edit in edits if edit["module"] == "layers.2.self_attn.q_proj"]
    edit |= damage
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as refused:
        llmslim.load(str(folder))
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError):
        prepare(str(folder), recipe(EIGHT_BIT))


def test_edits_that_leave_sharers_unlike_are_refused() -> None:
    from llmslim.quantization.edits import PackLinear
    from llmslim.quantization.grid import Scheme

    q = "model.layers.{}.self_attn.q_proj".format
    edits = [ShareLinear(module=q(0)), ShareLinear(module=q(1), source=q(0))]
    packed = [PackLinear(module=q(0), scheme=Scheme(group_size=32))]
    replay(meta_model("llama"), [*edits, *packed, PackLinear(module=q(1), scheme=Scheme(group_size=32))])
    unlike = (*packed, PackLinear(module=q(1), scheme=Scheme(bits=8, group_size=32)))
    for wrong in (packed, unlike):
        with pytest.raises(UserError, match="leave blocks that share weights unlike"):
            replay(meta_model("llama"), [*edits, *wrong])
    for wrong in ([*edits, ShareLinear(module=q(2), source=q(1))], [ShareLinear(module=q(1), source=q(1))]):
        with pytest.raises(UserError, match="has no weight of its own"):
            replay(meta_model("llama"), wrong)
