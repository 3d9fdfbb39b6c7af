"""Single weights by gradients, against loops over windows; how much each Linear loses, against brute force."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmslim import plan
from llmslim.anatomy import Anatomy
from llmslim.anatomy.parts import dense_weight, is_conv1d
from llmslim.calibration.gradients import hessian_gradient
from llmslim.calibration.objectives import objective_of
from llmslim.calibration.statistics import output_error
from llmslim.errors import UserError
from llmslim.masks import choose, per_layer, per_row
from llmslim.prepare import prepare
from llmslim.pruning.allocation import Histogram, least_error, within
from llmslim.pruning.gradients import SNIP, GradientPruner, GraSP, Taylor
from llmslim.pruning.layer_sparsity import error_curves
from llmslim.pruning.mlp import PruneMLP
from llmslim.pruning.weights import Magnitude, Wanda
from llmslim.recipe import Calibration, Recipe
from llmslim.sparse import unpack_mask
from llmslim.step import StepRecord, build_step
from tests import reference
from tests.test_pruning_weights import FakeLook
from tests.tiny import meta_model, save_tiny


class Look(FakeLook):
    """A look that gives the model whole."""

    seed = 3
    mask_token = 4

    def __init__(self, family: str) -> None:
        super().__init__(family)
        self.anatomy = Anatomy.of(self.model)
        self.tokens = torch.randint(5, 512, (3, 16), generator=torch.Generator().manual_seed(1))

    def loaded(self) -> Any:
        return self.model

    def progressed(self, done: int, total: int) -> None:
        assert 0 < done <= total


def weight_of(look: Look, name: str) -> tuple[str, Any]:
    """The parameter that a Linear's weight is in, and what takes it out of there."""
    modules = dict(look.model.named_modules())
    if name in modules:
        conv = is_conv1d(modules[name])
        return f"{name}.weight", lambda tensor: tensor.T if conv else tensor
    experts, index, part = name.rsplit(".", 2)
    return f"{experts}.{part}_proj", lambda tensor: tensor[int(index)]


def window_gradients(look: Look, names: set[str]) -> list[dict[str, Tensor]]:
    """The gradient of each window's loss, by parameter."""
    model, found = look.model, []
    objective = objective_of(model, look.mask_token)
    parameters = [model.get_parameter(name) for name in sorted(names)]
    for index, window in enumerate(look.tokens):
        loss = objective(window[None], torch.Generator().manual_seed(look.seed + index))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        found.append(dict(zip(sorted(names), gradients, strict=True)))
    return found


def naive_scores(look: Look, step: GradientPruner) -> dict[str, Tensor]:
    names = [name for block in look.anatomy.blocks for name in step.targets(block)]
    places = {name: weight_of(look, name) for name in names}
    windows = window_gradients(look, {parameter for parameter, _ in places.values()})
    scores = {}
    for name, (parameter, part) in places.items():
        weight = part(look.model.get_parameter(parameter).detach())
        gradients = [part(window[parameter]) for window in windows]
        if step.kind == "taylor":
            scores[name] = torch.stack([(weight * gradient).abs() for gradient in gradients]).sum(0)
        else:
            scores[name] = (weight * torch.stack(gradients).mean(0)).abs()
    return scores


def differing(masks: dict[str, Tensor], scores: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The share of weights about which masks disagree with expected ones."""
    wrong = sum(
        int((unpack_mask(masks[name], score.shape[1]) != expected[name]).sum())
        for name, score in scores.items()
    )
    return wrong / sum(score.numel() for score in scores.values())


@pytest.mark.parametrize("threshold", ["row", "layer", "global"])
@pytest.mark.parametrize("kind", [Taylor, SNIP])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5", "bert"])
def test_masks_keep_the_highest_scores(family: str, kind: Any, threshold: Any) -> None:
    look, step = Look(family), kind(sparsity=0.6, threshold=threshold)
    assert step.needs_survey and step.needs_calibration and step.survey_copies
    scores = naive_scores(look, step)
    masks = step.survey(look)
    assert set(masks) == set(scores)
    if threshold == "global":
        level = torch.cat([score.flatten() for score in scores.values()])
        limit = level.kthvalue(round(0.6 * level.numel())).values
        expected = {name: score > limit for name, score in scores.items()}
        assert differing(masks, scores, expected) < 2e-3  # within the bin of the histogram
    else:
        rule = per_row if threshold == "row" else per_layer
        expected = {name: rule(score, 0.6) for name, score in scores.items()}
        assert differing(masks, scores, expected) < 1e-3  # near ties of float32 sums


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_grasp_takes_the_highest_and_zeros_first(pattern: Any) -> None:
    look = Look("llama")
    name = "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        look.model.get_parameter(f"{name}.weight")[:, ::8] = 0
    masks = GraSP(pattern=pattern, threshold="layer").survey(look)
    names = [f"{name}.weight" for name in masks]
    products = hessian_gradient(look.model, look.tokens, names, look.seed)
    for linear, bitmap in masks.items():
        weight = look.model.get_parameter(f"{linear}.weight").detach()
        worth = weight * products[f"{linear}.weight"]  # the negative of the paper's score, whose highest go
        mask = unpack_mask(bitmap, weight.shape[1])
        expected = choose(worth.masked_fill(weight == 0, -torch.inf), 0.5, pattern, "layer")
        assert torch.equal(mask, expected)
        if pattern == "unstructured" and linear != name:
            assert worth[~mask].max() <= worth[mask].min()
    assert not bool(unpack_mask(masks[name], 128)[:, ::8].any())


def test_the_threshold_is_global_where_nothing_else_says_how_much_goes() -> None:
    assert Taylor().among == "global" and Taylor(threshold="row").among == "row"
    assert Taylor(pattern="2:4").among == Taylor(layer_sparsity="owl").among == Magnitude().among == "layer"
    with pytest.raises(UserError, match="the same from every weight"):
        build_step("snip", {"pattern": "2:4", "threshold": "global"})


@pytest.mark.parametrize("kind", ["taylor", "wanda", "sparsegpt", "gptq"])
def test_a_step_is_read_back_from_what_a_report_tells(kind: str) -> None:
    for fields in ({}, {"pattern": "2:4"}, {"sparsity": 0.6}):
        step = build_step(kind, fields)
        assert build_step(kind, step.model_dump(mode="json")) == step


def test_an_expert_without_tokens_is_pruned_by_magnitude() -> None:
    look = Look("mixtral")
    router = look.model.model.layers[0].mlp.gate
    with torch.no_grad():  # of equal probabilities the first two are the highest
        router.weight.zero_()
    masks, record = SNIP().survey(look), StepRecord()
    empty = [name for name, mask in masks.items() if not mask.numel()]
    assert empty and all(".layers.0.mlp.experts." in name for name in empty)
    record.survey = masks
    weight = torch.randn(8, 16)
    _, mask = SNIP().prune(empty[0], weight, 0.5, None, record)
    assert torch.equal(mask, per_layer(weight.abs(), 0.5))
    assert "pruned by magnitude" in record.notes[0]["what"]


def test_scores_that_are_nan_are_named() -> None:
    look = Look("llama")
    with torch.no_grad():
        look.model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj has weights, or gradients"):
        SNIP().survey(look)


def test_a_text_that_is_not_there_is_refused_before_the_start(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    recipe = Recipe(steps=(SNIP(),), calibration=Calibration(text=str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match=r"none\.txt"):
        prepare(str(folder), recipe)


def test_the_plan_counts_the_models_that_a_survey_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "resident_bytes", lambda: 0)
    anatomy = Anatomy.of(meta_model("llama", num_hidden_layers=60))
    options = SimpleNamespace(tokens=torch.zeros(4, 32), dtype=torch.float32, device=torch.device("cpu"))
    shape = plan._Shape(anatomy, options, torch.float32)  # type: ignore[arg-type]

    def peak(step: Any) -> int:
        return plan._peak_memory(shape, Recipe(steps=(step,), evaluation=None), anatomy, 0, 0, ())

    assert peak(GraSP()) - peak(SNIP()) == 3 * 4 * shape.total
    assert peak(Taylor()) - peak(PruneMLP(criterion="taylor")) == 4 * shape.total
    assert peak(PruneMLP(criterion="taylor")) > 4 * shape.total > peak(PruneMLP())


# how much each Linear loses


def test_a_histogram_orders_negative_scores() -> None:
    histogram = Histogram()
    low, high = -torch.logspace(0, 3, 100), torch.logspace(-3, 0, 100)
    histogram.add("mixed", torch.cat([low, high]))
    histogram.add("high", torch.cat([high, high + 1]))
    shares = histogram.sparsities(0.25)
    assert shares["mixed"] == pytest.approx(0.5, abs=0.01) and shares["high"] == pytest.approx(0, abs=0.01)


def test_least_error_is_what_brute_force_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = within(0.5, 0.2, 5)
    assert grid.tolist() == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    for sizes in ([10, 10, 10, 10], [10, 20, 10, 30]):
        steep = torch.rand(4, 4, generator=generator, dtype=torch.float64).sort(dim=1).values
        curves = torch.cat([torch.zeros(4, 1), steep.cumsum(1)], 1)  # convex
        shares = least_error(list(curves), sizes, grid, 0.5)
        assert sum(s * n for s, n in zip(shares, sizes, strict=True)) == pytest.approx(0.5 * sum(sizes))
        found = sum(straight(grid, curve, share) for curve, share in zip(curves, shares, strict=True))
        best = min(
            sum(float(curve[point]) for curve, point in zip(curves, points, strict=True))
            for points in itertools.product(range(5), repeat=4)
            if sum(float(grid[p]) * n for p, n in zip(points, sizes, strict=True)) >= 0.5 * sum(sizes) - 1e-9
        )
        assert found <= best + 1e-9
        if len(set(sizes)) == 1:  # all end on points of the grid
            assert found == pytest.approx(best)


def straight(grid: Tensor, curve: Tensor, share: float) -> float:
    """A curve between its points."""
    at = min(int(torch.searchsorted(grid, share, right=True)) - 1, len(grid) - 2)
    part = (share - float(grid[at])) / float(grid[at + 1] - grid[at])
    return float(curve[at]) * (1 - part) + float(curve[at + 1]) * part


def test_a_bump_in_a_curve_is_passed_over() -> None:
    grid = within(0.5, 0.1, 3)
    bumped, straight_ = torch.tensor([0.0, 5.0, 1.0]), torch.tensor([0.0, 2.0, 4.0])
    assert least_error([bumped, straight_], [1, 1], grid, 0.5) == pytest.approx([0.6, 0.4])
    assert within(0.9, 0.5, 3).tolist() == pytest.approx([0.825, 0.9, 0.975])  # narrowed


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_error_curves_are_measured_and_keep_the_budget(family: str) -> None:
    look = Look(family)
    step = Magnitude(sparsity=0.6, layer_sparsity="error", sparsity_range=0.2)
    assert step.needs_survey and step.needs_calibration
    survey = step.survey(look)
    total = lost = 0.0
    for name, share in survey.items():
        size = dense_weight(look.model.get_submodule(name)).numel()
        total, lost = total + size, lost + size * float(share)
        assert 0.4 - 1e-9 <= float(share) <= 0.8 + 1e-9
    assert lost / total == pytest.approx(0.6) and len(set(map(float, survey.values()))) > 2


def test_an_error_curve_is_wandas_output_error() -> None:
    look, seen = Look("llama"), {}
    name = "model.layers.0.mlp.down_proj"
    linear = look.model.get_submodule(name)
    hook = linear.register_forward_hook(lambda module, args, out: seen.setdefault("x", []).append(args[0]))
    block, stream = next(iter(look.blocks()))
    curve = error_curves(block, stream, [name], torch.tensor([0.25, 0.75]))[name]
    hook.remove()
    inputs = torch.cat([x.reshape(-1, 128) for x in seen["x"]])
    weight = linear.weight.detach()
    for share, error in zip((0.25, 0.75), curve.tolist(), strict=True):
        kept = weight * reference.wanda(weight, inputs, share)
        expected = ((weight - kept) @ inputs.T).square().sum() / (weight @ inputs.T).square().sum()
        assert error == pytest.approx(float(expected), rel=1e-3)
    assert output_error(weight, weight, inputs.T @ inputs) == 0
    assert Wanda(layer_sparsity="error").needs_survey
