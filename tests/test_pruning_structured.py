"""Structured pruning: importance and refit against what they promise, and the whole road on tiny models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import llmslim
from llmslim.anatomy import Anatomy, Block
from llmslim.calibration.statistics import output_error
from llmslim.calibration.stream import BlockStream, Lane
from llmslim.errors import UserError
from llmslim.pipeline import compress
from llmslim.prepare import prepare
from llmslim.pruning import importance
from llmslim.pruning.heads import PruneHeads
from llmslim.pruning.mlp import PruneMLP
from llmslim.pruning.structured import Moments, Structured
from llmslim.recipe import Calibration, Recipe
from llmslim.step import build_step
from tests.tiny import example_inputs, save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("verified_here")


def problem(
    seed: int = 0, tokens: int = 400, inputs: int = 24, outputs: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs [tokens, in], a weight [out, in], and the Hessian, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return x, weight, x.T @ x


def units_of(inputs: int, width: int, pools: int = 1) -> Tensor:
    return torch.arange(inputs).view(pools, -1, width)


def rest(unit: Tensor, inputs: int = 24) -> Tensor:
    return torch.tensor([j for j in range(inputs) if j not in unit.tolist()])


def error_after_refit(x: Tensor, weight: Tensor, keep: Tensor) -> float:
    """By least squares on the inputs themselves."""
    target = x @ weight.T
    solution = torch.linalg.lstsq(x[:, keep], target).solution
    return float((target - x[:, keep] @ solution).square().sum())


@pytest.mark.parametrize("width", [1, 4])
def test_output_increase_is_the_error_when_a_unit_is_masked(width: int) -> None:
    x, weight, hessian = problem()
    units = units_of(24, width)
    scores = importance.output_increase(weight, hessian, units)
    for unit, score in zip(units[0], scores[0], strict=True):
        masked = weight.clone()
        masked[:, unit] = 0
        assert torch.isclose(score, (x @ (weight - masked).T).square().sum())


@pytest.mark.parametrize("width", [1, 4])
def test_refit_increase_is_the_error_that_refitting_leaves(width: int) -> None:
    x, weight, hessian = problem()
    units = units_of(24, width)
    scores = importance.refit_increase(weight, torch.linalg.inv(hessian), units)
    for unit, score in zip(units[0], scores[0], strict=True):
        assert float(score) == pytest.approx(error_after_refit(x, weight, rest(unit)), rel=1e-6)


def test_refit_is_least_squares_on_the_inputs() -> None:
    x, weight, hessian = problem()
    keep = torch.tensor([0, 2, 3, 7, 11, 12, 20])
    expected = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution.T
    found = importance.refit(weight, importance.damped(hessian, 1e-12), keep)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_damping_pulls_to_the_old_weights() -> None:
    """The ridge problem solved as ordinary least squares with rows of its own."""
    x, weight, hessian = problem()
    keep, damping = torch.arange(5, 24), 0.1
    ridge = damping * float(hessian.diagonal().mean())
    rows = torch.cat([x[:, keep], ridge**0.5 * torch.eye(len(keep), dtype=torch.float64)])
    target = torch.cat([x @ weight.T, ridge**0.5 * weight[:, keep].T])
    expected = torch.linalg.lstsq(rows, target).solution.T
    found = importance.refit(weight, importance.damped(hessian, damping), keep)
    torch.testing.assert_close(found, expected)


def test_a_bias_takes_the_mean() -> None:
    """Refitted on centered inputs, weights and bias are least squares with an intercept."""
    x, weight, _ = problem()
    x = x + 5 * torch.arange(24, dtype=torch.float64)
    keep = torch.arange(16)
    moments = Moments([x.float()], affine=True, damping=1e-9)
    new = torch.zeros_like(weight).float()
    new[:, keep] = importance.refit(weight.float(), moments.damped, keep)
    bias = moments.bias_shift(weight.float(), new)
    target = x @ weight.T
    design = torch.cat([x[:, keep], torch.ones(len(x), 1, dtype=torch.float64)], 1)
    best = design @ torch.linalg.lstsq(design, target).solution
    ours = x @ new.double().T + bias.double()
    error = (target - ours).square().sum() / (target - best).square().sum()
    assert error == pytest.approx(1, rel=1e-2)
    plain = error_after_refit(x, weight, keep)
    assert float((target - ours).square().sum()) < 0.99 * plain


def test_moments_of_inputs_far_from_zero_are_those_about_their_mean() -> None:
    x = 10 + 0.01 * torch.randn(4096, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centered = x - x.float().double().mean(0)
    found = Moments([x[:2048].float(), x[2048:].float()], affine=True, damping=1e-4).hessian
    torch.testing.assert_close(found.double(), centered.T @ centered, rtol=1e-2, atol=1e-4)


def test_too_little_text_is_damped_until_it_can_be_solved() -> None:
    """8 tokens for 24 inputs leave a Hessian without a factor."""
    x, weight, _ = problem(tokens=8)
    hessian = (x.T @ x).float()
    damped = importance.damped(hessian, 1e-16)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(damped.float().double() - 1e-6 * torch.eye(24))
    keep = torch.arange(16)
    found = importance.refit(weight.float(), damped - 1e-6 * torch.eye(24), keep)
    assert found.isfinite().all()
    assert importance.eliminate(weight.float(), damped - 1e-6 * torch.eye(24), units_of(24, 1), 8).sum() == 16


def test_what_is_not_finite_is_refused_and_not_damped_for_ever() -> None:
    hessian = torch.eye(4)
    hessian[0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        importance.least_squares(torch.ones(2, 4), hessian, 1e-4)


@pytest.mark.parametrize("criterion", ["obs", "magnitude"])
def test_a_nan_weight_is_named(criterion: Any, tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = torch.nan
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    folder = save_tiny("qwen2", tmp_path / "m")
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.\w+_proj.weight has NaN or infinite"):
        compress(
            str(folder),
            [PruneMLP(ratio=0.5, multiple_of=1, criterion=criterion)],
            tmp_path / "out",
            calibration=Calibration(num_samples=2, seq_len=32),
            evaluation=None,
        )


@pytest.mark.parametrize("damping", [1e-8, 1e-4, 1e-2])
def test_refit_is_never_worse_than_none(damping: float) -> None:
    for seed in range(5):
        _, weight, hessian = problem(seed)
        keep = torch.arange(0, 24, 2)
        bare, refitted = weight.clone(), torch.zeros_like(weight)
        bare[:, 1::2] = 0
        refitted[:, keep] = importance.refit(weight, importance.damped(hessian, damping), keep)
        errors = [output_error(weight, new, hessian) for new in (refitted, bare)]
        assert 0 < errors[0] < errors[1]


@pytest.mark.parametrize(("width", "pools"), [(1, 1), (3, 1), (2, 3)])
def test_eliminate_is_greedy_elimination_by_the_refitted_error(width: int, pools: int) -> None:
    """At every turn the unit goes whose loss the rest, refitted to the original outputs, makes good best."""
    x, weight, hessian = problem(3)
    units = units_of(24, width, pools)
    size, remove = units.shape[1], 3
    keep = torch.ones(pools, size, dtype=torch.bool)
    for _ in range(remove * pools):
        costs = {}
        for pool, unit in keep.nonzero().tolist():
            if int(keep[pool].sum()) > size - remove:
                keep[pool, unit] = False
                costs[pool, unit] = error_after_refit(x, weight, units[keep].reshape(-1))
                keep[pool, unit] = True
        keep[min(costs, key=costs.__getitem__)] = False
    found = importance.eliminate(weight, importance.damped(hessian, 1e-12), units, remove)
    assert torch.equal(found, keep)


def test_eliminate_comes_near_the_best_subset() -> None:
    """Exhaustive search over all subsets is the bound; choosing by single errors is far from it."""
    greedy, single = 0.0, 0.0
    for seed in range(5):
        x, weight, hessian = problem(seed, inputs=10)
        units = units_of(10, 1)
        best = min(error_after_refit(x, weight, torch.tensor(keep)) for keep in combinations(range(10), 6))
        by_greedy = importance.eliminate(weight, importance.damped(hessian, 1e-12), units, 4)
        by_single = importance.keep_best(importance.output_increase(weight, hessian, units), 4)
        greedy += error_after_refit(x, weight, by_greedy[0].nonzero()[:, 0]) / best
        single += error_after_refit(x, weight, by_single[0].nonzero()[:, 0]) / best
    assert 5 <= greedy < 6.5 and greedy < single


def test_a_silent_input_goes_first() -> None:
    x, weight, _ = problem()
    x[:, 5] = 0
    hessian = importance.damped(x.T @ x, 1e-4)
    keep = importance.eliminate(weight, hessian, units_of(24, 1), 1)
    assert keep[0].logical_not().nonzero().tolist() == [[5]]


def test_allocation_takes_what_costs_least_and_leaves_the_least() -> None:
    scores = [torch.tensor([5.0, 6.0, 7.0, 8.0]), torch.tensor([0.1, 0.2, 0.3, 9.0])]
    assert importance.allocate(scores, 4, [1, 1]) == [1, 3]
    assert importance.allocate(scores, 2, [1, 3]) == [1, 1]


@pytest.mark.parametrize("criterion", ["magnitude", "magnitude-l1"])
def test_magnitudes_are_norms_of_all_that_a_unit_takes_with_it(criterion: Any) -> None:
    model = tiny_model("llama")
    block, exponent = next(iter(Anatomy.of(model).blocks)), 1 if criterion == "magnitude-l1" else 2
    step = PruneMLP(criterion=criterion)
    power = step.power(block, step.sites(block)[0])[0]
    mlp = model.model.layers[0].mlp
    for channel in (0, 77):
        taken = [mlp.gate_proj.weight[channel], mlp.up_proj.weight[channel], mlp.down_proj.weight[:, channel]]
        expected = sum(abs(value) ** exponent for part in taken for value in part.tolist())
        assert float(power[channel]) == pytest.approx(expected, rel=1e-4)
    heads = PruneHeads(criterion=criterion, unit="group")
    power = heads.power(block, heads.sites(block)[0])[0]
    attention = model.model.layers[0].self_attn
    rows = {"q": slice(32, 64), "k": slice(16, 32), "v": slice(16, 32)}
    parts = [getattr(attention, f"{role}_proj").weight[span] for role, span in rows.items()]
    parts.append(attention.o_proj.weight[:, 32:64])
    expected = sum(float(part.detach().abs().pow(exponent).sum()) for part in parts)
    assert float(power[1]) == pytest.approx(expected, rel=1e-4)


QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=8, seq_len=32), "evaluation": None}
FEW = ("llama", "qwen2", "gpt2", "phi3", "gpt_neox", "bert", "t5", "mixtral", "qwen3_moe")
CASES = [(family, kind, {}) for family in FEW for kind in ("heads", "mlp")] + [
    ("llama", "heads", {"unit": "query", "ratio": 0.5}),
    ("gpt_neox", "heads", {"criterion": "magnitude", "refit": False}),
    ("t5", "heads", {"criterion": "random"}),
    ("llama", "mlp", {"criterion": "output", "refit": False}),
    ("gpt2", "mlp", {"criterion": "magnitude", "refit": False}),
    ("mixtral", "mlp", {"criterion": "magnitude-l1", "refit": False}),
]
PLAIN = {  # what the plain config can express: everything about MLPs, heads where their width is a field
    ("llama", "heads"), ("qwen2", "heads"), ("phi3", "heads"),
    ("mixtral", "heads"), ("qwen3_moe", "heads"), *((family, "mlp") for family in FEW),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in FEW}


@pytest.mark.parametrize(("family", "kind", "fields"), CASES)
def test_every_family_is_pruned_verified_and_loads(
    family: str, kind: str, fields: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Verification compares hidden states block by block, and the logits of the model loaded whole."""
    step = build_step(kind, {"ratio": 0.5 if kind == "heads" else 0.25, **fields})
    report = compress(str(folders[family]), [step], tmp_path / "out", **QUICK).report
    assert report["verification"]["ok"] and report["verification"]["max_error"] == 0
    rows = report["linears"]
    assert rows and all(0 < row["kept"] < row["total"] for row in rows)
    if step.needs_calibration:
        assert all(0 < row["output_error"] < 1 for row in rows if "tokens" in row)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("quantization_config" not in config) == ((family, kind) in PLAIN)


@pytest.mark.parametrize("kind", ["heads", "mlp"])
@pytest.mark.parametrize("family", FEW)
def test_narrowing_is_masking(
    family: str, kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Columns of zeros in o or down do what taking heads or channels out does."""
    step = build_step(kind, {"ratio": 0.5})
    compress(str(folders[family]), [step], tmp_path / "narrow", **QUICK)
    monkeypatch.setattr(type(step), "narrow", lambda self, block, choices, record: None)
    monkeypatch.setattr(type(step), "planned_edits", lambda self, anatomy: [])
    compress(str(folders[family]), [step], tmp_path / "masked", **QUICK)
    logits = []
    for name in ("narrow", "masked"):
        model = llmslim.load(tmp_path / name)[0]
        with torch.no_grad():
            logits.append(model(**example_inputs(tiny_model(family))).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_a_ratio_that_leaves_nothing_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind, fields, words in (
        ("heads", {"ratio": 0.9}, "none or all"),
        ("heads", {"ratio": 0.1}, "ratios that fit: 0.5"),
        ("mlp", {"ratio": 0.05}, "removes none of the 128 channels"),
    ):
        with pytest.raises(UserError, match=words):
            compress(str(folders["llama"]), [build_step(kind, fields)], tmp_path / "out", **QUICK)
    with pytest.raises(UserError, match="ratio = 1"):
        build_step("mlp", {"ratio": 1})


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("mlp", {"ratio_range": 0.3}, "ratio_range is an option of allocation sensitivity only"),
        (
            "heads",
            {"refit": False, "criterion": "output", "refit_damping": 0.1},
            "refit_damping is an option of refit and of criterion obs only",
        ),
        ("kv_groups", {"refit": False, "refit_damping": 0.1}, "refit_damping is an option of refit only"),
        ("layers", {"refit": False, "refit_damping": 0.1}, "refit_damping is an option of refit only"),
        ("width", {"refit_damping": 0.1}, "refit_damping is an option of refit only"),
        ("student", {"channels": 64, "which": "influence"}, "which influence chooses blocks, .* give layers"),
    ],
)
def test_what_would_be_ignored_is_refused(kind: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_step(kind, fields)


def test_what_is_used_is_taken() -> None:
    build_step("mlp", {"ratio_range": 0.3, "allocation": "sensitivity"})
    build_step("mlp", {"refit": False, "refit_damping": 0.1})  # obs chooses by what a refit would mend
    build_step("student", {"params": 0.5, "which": "influence"})
    build_step("student", {"layers": 2, "channels": 64, "which": "influence"})


@pytest.mark.parametrize("kind", ["heads", "mlp"])
@pytest.mark.parametrize(
    ("first", "words"),
    [
        (("rtn", {"group_size": 16}), "prune before you quantize"),
        (("magnitude", {}), "first, then single weights"),
    ],
    ids=["quantized", "sparse"],
)
def test_what_cannot_be_cut_is_refused_in_order(
    kind: str, first: tuple[str, dict[str, Any]], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """In one recipe and from a saved folder alike, before anything is written."""
    steps = [build_step(*first), build_step(kind, {"ratio": 0.5})]
    with pytest.raises(UserError, match=words):
        compress(str(folders["llama"]), steps, tmp_path / "out", **QUICK)
    compress(str(folders["llama"]), steps[:1], tmp_path / "first", **QUICK)
    with pytest.raises(UserError, match=words):
        compress(str(tmp_path / "first"), steps[1:], tmp_path / "out", **QUICK)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("fields", [{"ratio": 0.3}, {"ratio": 0.5, "allocation": "sensitivity"}])
def test_experts_keep_a_width_that_they_can_compute_with(
    fields: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    step = PruneMLP(multiple_of=1, **fields)
    with pytest.raises(UserError, match="multiple_of 1 leaves .* to each expert of model.layers.0.* of 8"):
        prepare(str(folders["mixtral"]), Recipe(steps=(step,), **QUICK))
    prepare(str(folders["llama"]), Recipe(steps=(step,), **QUICK))


@pytest.mark.parametrize(("width", "kept"), [(128, 96), (64, 32), (1536, 1152), (100, 64)])
def test_the_width_that_stays_is_a_multiple(width: int, kept: int) -> None:
    assert width - PruneMLP(ratio=0.25)._remove(width) == kept


class Look:
    """A survey of a model that is loaded whole."""

    seed = 0

    def __init__(self, family: str) -> None:
        self.model = tiny_model(family)
        self.model.config.use_cache = False
        self.anatomy = Anatomy.of(self.model)
        self.tokens = torch.randint(5, 512, (8, 32), generator=torch.Generator().manual_seed(0))

    def blocks(self) -> Iterator[tuple[Block, BlockStream]]:
        stream = BlockStream(self.model, torch.device("cpu"), torch.float32)
        stream.add(Lane.of_tokens("calibration", self.tokens, bool(self.model.config.is_encoder_decoder)))
        for stack in stream.anatomy.stacks:
            stream.enter(stack)
            for block in stack.blocks:
                yield block, stream
            stream.leave(stack)

    def loaded(self) -> PreTrainedModel:
        return self.model


@pytest.mark.parametrize("criterion", ["obs", "output", "magnitude"])
@pytest.mark.parametrize(("family", "kind"), [("llama", "heads"), ("llama", "mlp"), ("mixtral", "mlp")])
def test_sensitivity_keeps_the_budget_and_the_experts_of_a_block_together(
    family: str, kind: str, criterion: str
) -> None:
    step = build_step(
        kind,
        {"ratio": 0.5, "criterion": criterion, "allocation": "sensitivity"}
        | ({"multiple_of": 1} if kind == "mlp" else {}),
    )
    assert isinstance(step, Structured) and step.needs_survey
    look = Look(family)
    scores = step.survey(look)
    removes = step._removes(look.anatomy, scores)
    uniform = {site.name: site.remove for block in look.anatomy.blocks for site in step.sites(block)}
    assert removes.keys() == uniform.keys() and sum(removes.values()) == sum(uniform.values())
    if kind == "mlp" and criterion != "magnitude":  # norms of random weights are alike in all blocks
        assert len(set(removes.values())) > 1
    for block in look.anatomy.blocks:
        assert len({site.remove for site in step.sites(block, removes)}) == 1
