"""Factorization: the mathematics against the papers' formulas, every family, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmslim
from llmslim.calibration.statistics import InputStats, output_error
from llmslim.checkpoint.reader import CheckpointReader
from llmslim.errors import UserError
from llmslim.factorization.asvd import ASVD
from llmslim.factorization.edits import LowRankEmbedding
from llmslim.factorization.factorizer import Factorizer
from llmslim.factorization.ranks import spend
from llmslim.factorization.svd import SVD
from llmslim.factorization.svd_llm import SVDLLM
from llmslim.lowrank import LowRankLinear, decompose, refit_second, worthwhile
from llmslim.pipeline import compress
from llmslim.prepare import prepare
from llmslim.recipe import Recipe
from tests import reference
from tests.checkpoints import Made, compress_many, logits_of
from tests.tiny import FAMILIES, save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")

TEXT = str(Path(__file__).with_name("short.txt"))  # tokenized at once
QUICK: dict[str, Any] = {"calibration": {"text": TEXT, "num_samples": 4, "seq_len": 32}, "evaluation": None}
MEASURED: dict[str, Any] = {**QUICK, "evaluation": {"windows": 4, "seq_len": 32, "speed": False}}
FULL: dict[str, Any] = {"allocation": "error", "embeddings_rank": 16}


def recipe(*steps: dict[str, Any], **fields: Any) -> Recipe:
    return Recipe.parse({"steps": list(steps), **QUICK, **fields})


def stored(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("model.safetensors", "config.json")]


# --- the mathematics ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor]:
    """A weight [24, 16] and inputs [200, 16], correlated and of different sizes."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=generator) * torch.logspace(-1, 1, 16)
    return torch.randn(24, 16, generator=generator), torch.randn(200, 16, generator=generator) @ mix


def factored(step: Factorizer, weight: Tensor, inputs: Tensor, rank: int) -> Tensor:
    found = decompose(weight, step.root(InputStats.of([inputs])))
    u, v = found.factors(weight, rank)
    assert u.shape == (len(weight), rank) and v.shape == (rank, weight.shape[1])
    torch.testing.assert_close(u.norm(dim=0), v.norm(dim=1))  # balanced
    return u @ v


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_whitened_svd_is_the_papers_formula(rank: int, layer: tuple[Tensor, Tensor]) -> None:
    weight, inputs = layer
    expected = reference.svd_llm(weight, inputs, rank).float()
    found = factored(SVDLLM(damp_percent=1e-9), weight, inputs, rank)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_activation_scaled_svd_is_the_papers_formula(layer: tuple[Tensor, Tensor]) -> None:
    weight, inputs = layer
    for alpha in (0.5, 1.0):
        expected = reference.asvd(weight, inputs, 5, alpha).float()
        found = factored(ASVD(alpha=alpha), weight, inputs, 5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [3, 8, 15])
def test_what_is_cut_off_is_the_error_of_the_outputs(rank: int, layer: tuple[Tensor, Tensor]) -> None:
    weight, inputs = layer
    stats = InputStats.of([inputs])
    powers = decompose(weight, SVDLLM(damp_percent=1e-9).root(stats)).powers
    lost = (inputs @ (weight - factored(SVDLLM(damp_percent=1e-9), weight, inputs, rank)).T).square().sum()
    torch.testing.assert_close(powers[rank:].sum(), lost, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(powers.sum(), (inputs @ weight.T).square().sum(), rtol=1e-3, atol=0)


def test_a_closer_look_at_the_inputs_costs_less(layer: tuple[Tensor, Tensor]) -> None:
    weight, inputs = layer
    hessian = inputs.T @ inputs
    for rank in (2, 6, 12):
        plain, scaled, whitened = (
            output_error(weight, factored(step, weight, inputs, rank), hessian)
            for step in (SVD(), ASVD(), SVDLLM())
        )
        assert whitened < scaled < plain


def test_the_second_factor_is_the_least_squares_one(layer: tuple[Tensor, Tensor]) -> None:
    weight, inputs = layer
    v = decompose(weight).factors(weight, 5).v
    u, kept = refit_second(weight, v, inputs.T @ inputs, damping=1e-12)
    expected = torch.linalg.lstsq(
        inputs.double() @ v.double().T, inputs.double() @ weight.double().T
    ).solution
    torch.testing.assert_close((u @ kept).double(), expected.T @ v.double(), rtol=1e-4, atol=1e-4)


def test_the_second_factor_is_found_from_few_inputs(layer: tuple[Tensor, Tensor]) -> None:
    """Three inputs for rank 8, one of them huge: in float32 their sums are hardly positive definite."""
    weight, inputs = layer
    few = inputs[:3] * torch.tensor([[1.0], [1.0], [1e4]])
    v = decompose(weight).factors(weight, 8).v
    u, kept = refit_second(weight, v, few.T @ few, damping=1e-30)
    assert bool(u.isfinite().all()) and output_error(weight, u @ kept, few.T @ few) < 0.1


def gains_and_shapes(seed: int) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """Components of three Linears that fall off at different speeds."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (16, 16), "b": (24, 16), "c": (16, 32)}
    gains = {}
    for name in shapes:
        speed = 0.3 + 1.5 * float(torch.rand((), generator=generator))
        powers = (-speed * torch.arange(16.0)).exp()
        gains[name] = powers / powers.sum()
    return gains, shapes


def kept(gains: dict[str, Tensor], ranks: dict[str, int]) -> float:
    return sum(float(gains[name][: rank or None].sum()) for name, rank in ranks.items())


def size(shapes: dict[str, tuple[int, int]], ranks: dict[str, int]) -> int:
    return sum(rank * sum(shapes[n]) if rank else shapes[n][0] * shapes[n][1] for n, rank in ranks.items())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_a_budget_is_spent_where_it_keeps_most(seed: int, multiple: int) -> None:
    """No other ranks of as few weights keep more; a budget is kept to, and a larger one keeps as much or more."""
    gains, shapes = gains_and_shapes(seed)
    whole, before = sum(rows * width for rows, width in shapes.values()), 0.0
    least = size(shapes, dict.fromkeys(shapes, multiple))
    for share in (0.3, 0.4, 0.5, 0.6, 0.8):
        ranks = spend(gains, shapes, share, multiple)
        used = size(shapes, ranks)
        assert used <= max(share * whole, least)
        assert all(rank % multiple == 0 and rank <= worthwhile(*shapes[n]) for n, rank in ranks.items())
        best = reference.best_ranks(gains, shapes, used, multiple)
        assert kept(gains, ranks) == pytest.approx(kept(gains, best), abs=1e-6)
        assert kept(gains, ranks) >= before
        before = kept(gains, ranks)


def test_ranks_are_multiples_that_make_a_linear_smaller() -> None:
    assert [worthwhile(*shape) for shape in ((64, 64), (128, 64), (2, 2), (1, 5))] == [31, 42, 0, 0]
    step = SVD(ratio=0.2, multiple_of=8)
    assert step.rank_of(64, 64) == 24 and step.rank_of(8, 8) == 0  # 25.6 to the nearest; 8 x 8 stays
    assert SVD(ratio=0.9).rank_of(64, 64) == 8  # at least one multiple
    assert SVD(ratio=0.01).rank_of(64, 64) == 24  # 32 would save nothing
    assert SVD(rank=31).rank_of(64, 64) == 31 and SVD(rank=32).rank_of(64, 64) == 0


# --- every family -------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "svd": {"svd": {"ratio": 0.3}},
    "asvd": {"asvd": {"ratio": 0.3, "update": True}},
    "svd_llm": {"svd_llm": {"ratio": 0.3}},
    "energy": {"svd_llm": {"energy": 0.8, "exclude": ["k", "SelfAttention.o"]}},
    "full": {"svd_llm": {"ratio": 0.3, **FULL}},
}
EVERY = [(family, "full") for family in FAMILIES]
EVERY += [("llama", "svd"), ("gpt2", "asvd"), ("mixtral", "svd_llm"), ("t5", "energy")]
AGAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("llama-full", {"gptq": {"group_size": 8}}),
    "rtn": ("qwen3_moe-full", {"rtn": {"bits": 8, "group_size": "channel"}}),
    "wanda": ("gpt2-full", {"wanda": {}}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    root = tmp_path_factory.mktemp("outputs")
    jobs = {f"{family}-{kind}": (folders[family], [KINDS[kind]]) for family, kind in EVERY}
    jobs |= {name: (root / source, [step]) for name, (source, step) in AGAIN.items()}
    return compress_many(jobs, root, **QUICK)


@pytest.mark.parametrize("name", [*(f"{family}-{kind}" for family, kind in EVERY), *AGAIN])
def test_every_family_is_factorized_and_loads(name: str, made: dict[str, Made]) -> None:
    verification, report = made[name].verification, made[name].report
    assert verification["ok"], verification["checks"]
    assert verification["max_error"] == 0
    result = report["size"]["result"]
    assert result["block_bytes"] < report["size"]["base"]["block_bytes"]
    assert result["unique_parameters"] == result["effective_parameters"] < result["parameters"]
    if name not in AGAIN:
        ranks = [row["rank"] for row in report["linears"]]
        assert all(rank % 8 == 0 for rank in ranks) and any(ranks)


def test_factors_are_where_the_edits_say(made: dict[str, Made]) -> None:
    model, _ = llmslim.load(str(made["qwen2-full"].folder), dtype=torch.float32)
    found = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    edits = json.loads((made["qwen2-full"].folder / "config.json").read_text())["quantization_config"][
        "edits"
    ]
    assert len(found) == sum(edit["edit"] == "factorize_linear" for edit in edits) > 0
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, LowRankEmbedding) and head.table is table.table
    assert head.projection is table.projection
    names = load_file(made["qwen2-full"].folder / "model.safetensors")
    assert [name for name in names if "projection" in name] == ["model.embed_tokens.projection"]


def test_biases_stay_with_the_factor_that_gives_the_outputs(
    made: dict[str, Made], folders: dict[str, Path]
) -> None:
    model, _ = llmslim.load(str(made["gpt2-asvd"].folder), dtype=torch.float32)
    base, _ = llmslim.load(str(folders["gpt2"]), dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            assert torch.equal(module.u.bias, base.get_submodule(name).bias) and module.v.bias is None


def test_a_loaded_model_saves_as_it_was(made: dict[str, Made], tmp_path: Path) -> None:
    for name in ("qwen2-full", "t5-full", "wanda"):
        model, _ = llmslim.load(str(made[name].folder), dtype="auto")
        model.save_pretrained(tmp_path / name)
        again, _ = llmslim.load(str(tmp_path / name), dtype="auto")
        before, after = (load_file(f / "model.safetensors") for f in (made[name].folder, tmp_path / name))
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
        assert torch.equal(logits_of(model), logits_of(again))


# --- what a user would notice -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path]) -> str:
    return str(folders["llama"])


def test_a_larger_ratio_makes_a_smaller_file_and_a_larger_divergence(llama: str, tmp_path: Path) -> None:
    sizes, divergences = [], []
    for ratio in (0.1, 0.3, 0.6):
        step = {"svd_llm": {"ratio": ratio, "multiple_of": 1}}
        report = compress(llama, recipe(step, **MEASURED), tmp_path / str(ratio)).report
        size = report["size"]
        assert size["result"]["block_bytes"] / size["base"]["block_bytes"] == pytest.approx(
            1 - ratio, abs=0.02
        )
        sizes.append(size["result"]["bytes_on_disk"])
        divergences.append(report["quality"]["kl"]["value"])
    assert sizes[0] > sizes[1] > sizes[2] and 0 < divergences[0] < divergences[1] < divergences[2]


def test_allocation_keeps_the_budget_and_loses_less(llama: str, tmp_path: Path) -> None:
    errors, sizes = {}, {}
    for allocation in ("uniform", "error"):
        step = {"svd_llm": {"ratio": 0.4, "multiple_of": 4, "allocation": allocation}}
        report = compress(llama, recipe(step), tmp_path / allocation).report
        errors[allocation] = sum(row["output_error"] for row in report["linears"] if "output_error" in row)
        sizes[allocation] = report["size"]["result"]["unique_parameters"]
    assert errors["error"] < errors["uniform"] and sizes["error"] <= sizes["uniform"] * 1.02


def test_energy_is_kept_where_it_is_asked_for(llama: str, tmp_path: Path) -> None:
    step = {"svd_llm": {"energy": 0.9, "multiple_of": 1}}
    report = compress(llama, recipe(step), tmp_path / "out").report
    factored = [row for row in report["linears"] if "output_error" in row]
    assert factored and all(row["output_error"] <= 0.1 + 1e-3 for row in factored)
    left = [note["where"] for note in report["notes"] if "left as it is" in note["what"]]
    assert len(factored) + len(left) == 21


def test_include_and_exclude_choose(llama: str, tmp_path: Path) -> None:
    step = {"svd": {"include": ["mlp.*"], "exclude": ["down_proj"]}}
    report = compress(llama, recipe(step), tmp_path / "out").report
    assert {row["name"].rpartition(".")[2] for row in report["linears"]} == {"gate_proj", "up_proj"}


def test_the_update_brings_the_outputs_closer(llama: str, tmp_path: Path) -> None:
    """Scaled SVD with one factor refitted by the inputs as they arrive."""
    errors = []
    for update in (False, True):
        step = {"asvd": {"ratio": 0.5, "update": update}}
        linears = compress(llama, recipe(step), tmp_path / str(update)).report["linears"]
        errors.append(sum(row["output_error"] for row in linears))
    assert errors[1] < errors[0]


# --- what is refused ----------------------------------------------------------------------------------------

EIGHT_BIT: dict[str, Any] = {"rtn": {"bits": 8, "group_size": 32}}


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"svd": {"rank": 60}}], r"rank 60 saves nothing: .*gate_proj \(128 x 64\).* is 40\."),
        ([{"svd": {"ratio": 0.3, "rank": 8}}], r"ratio and rank both say how much"),
        ([{"svd": {"energy": 0.9, "rank": 8}}], r"rank and energy both say how much"),
        ([{"svd": {"rank": 8, "allocation": "error"}}], r"rank settles every rank by itself"),
        ([{"svd": {"energy": 0.9, "multiple_of": 64}}], r"energy 0\.9: no multiple of 64 "),
        ([{"svd": {"ratio": 1.0}}], r"ratio = 1\.0"),
        ([{"svd": {"include": ["nothing"]}}], r"Nothing to factorize: include=\['nothing'\]"),
        ([{"svd": {"embeddings_rank": 60}}], r"embeddings_rank 60 saves nothing: .*embed_tokens.* is 56\."),
        ([EIGHT_BIT, {"svd": {}}], r"q_proj is quantized, .*: factorize before quantizing\."),
        ([{"wanda": {}}, {"svd": {}}], r"q_proj has pruned single weights, .*: factorize first\."),
        ([{"svd": {}}, {"asvd": {}}], r"q_proj is factored already"),
        (
            [{"svd": {"embeddings_rank": 8}}, {"svd": {"embeddings_rank": 8, "exclude": ["*"]}}],
            r"factored already",
        ),
        ([{"svd": {}}, EIGHT_BIT], r"group_size 32 does not divide the 24 inputs of .*q_proj\.u; 8, 24 do "),
        ([{"svd": {"rank": 4}}, EIGHT_BIT], r"does not divide the 4 inputs of .*q_proj\.u; use 'channel'\."),
        (
            [{"svd": {"embeddings_rank": 8}}, {"rtn": {"group_size": 8, "embeddings_bits": 8}}],
            r"embeddings_bits 8: model\.embed_tokens is factored",
        ),
        ([{"svd": {}}, {"mlp": {}}], r"is factored already: prune mlp first, then factorize"),
        ([{"svd": {}}, {"width": {}}], r"is factored already: prune width first, then factorize"),
        ([{"svd": {}}, {"share": {}}], r"q_proj is factored, .*: share first\."),
    ],
)
def test_what_cannot_be_is_said_before_a_weight_is_read(
    steps: list[Any], said: str, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*args: Any, **options: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(CheckpointReader, "fill", fill)
    with pytest.raises(UserError, match=said) as refused:
        compress(llama, recipe(*steps), tmp_path / "out")
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_what_is_saved_is_refused_alike(made: dict[str, Made]) -> None:
    with pytest.raises(UserError, match="group_size 32 does not divide the 24 inputs"):
        prepare(str(made["llama-svd"].folder), recipe(EIGHT_BIT))
    for name, said in (
        ("llama-svd", "is factored already"),
        ("gptq", "quantized"),
    ):
        with pytest.raises(UserError, match=said):
            prepare(str(made[name].folder), recipe({"svd": {}}))


def broken(source: str, folder: Path, tensor: str, value: float) -> str:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor][1, 2] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_weights_and_inputs_that_are_not_finite_are_named(llama: str, tmp_path: Path) -> None:
    up = "model.layers.1.mlp.up_proj.weight"
    bad = broken(llama, tmp_path / "model", up, float("nan"))
    for number, step in enumerate(({"svd": {}}, {"svd_llm": {"allocation": "error"}})):
        with pytest.raises(UserError, match=rf"{up} has NaN or infinite values"):
            compress(bad, recipe(step), tmp_path / str(number))
    without = {"svd_llm": {"exclude": ["up_proj"]}}
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj has NaN or infinite inputs"):
        compress(broken(llama, tmp_path / "large", up, 1e30), recipe(without), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, -1, 17, 43, 10**9, 10**30, "many"])
def test_a_damaged_manifest_is_no_traceback(rank: Any, made: dict[str, Made], tmp_path: Path) -> None:
    folder = shutil.copytree(made["llama-svd"].folder, tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["edits"][-1]["rank"] = rank
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="edit|damaged"):
        llmslim.load(str(folder))
    with pytest.raises(UserError, match="edit|does not divide"):
        prepare(str(folder), recipe(EIGHT_BIT))
