"""GPTQ and its parts against naive versions, closed forms, and the properties that make it worth its time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmslim.anatomy import Anatomy
from llmslim.calibration.factor import factor
from llmslim.calibration.statistics import InputStats
from llmslim.errors import UserError
from llmslim.pruning.weights import SparseGPT
from llmslim.quantization.gptq import GPTQ, descend, gptq, refit_scales
from llmslim.quantization.grid import Scheme, min_max_grid, round_to_grid, search_grid
from llmslim.quantization.rtn import RTN
from llmslim.step import StepRecord, build_step
from tests import reference
from tests.tiny import tiny_model

SCHEMES = [
    Scheme(bits=bits, group_size=group, symmetric=symmetric, scale_dtype="float32")
    for bits, group in ((2, 16), (3, 32), (4, 16), (4, "channel"), (4, "tensor"), (8, 32))
    for symmetric in (True, False)
]


def problem(
    rows: int = 24, width: int = 64, tokens: int = 400, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs, some channels far louder than others, as in a transformer."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    inputs = torch.randn(tokens, width, generator=generator) @ (mix + torch.eye(width))
    return weight, inputs * torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]


def stats_of(inputs: torch.Tensor, reference_inputs: torch.Tensor | None = None) -> InputStats:
    stats = InputStats(inputs.shape[-1], inputs.device)
    for index, chunk in enumerate(inputs.split(150)):
        stats.add(chunk, None if reference_inputs is None else reference_inputs.split(150)[index])
    return stats.finish()


def output_loss(weight: torch.Tensor, quantized: torch.Tensor, inputs: torch.Tensor) -> float:
    return float(((weight - quantized) @ inputs.T).double().square().sum())


def test_statistics_are_the_sums_they_claim() -> None:
    _, inputs = problem(width=800)
    other = inputs + 0.1
    stats = stats_of(inputs, other)
    assert stats.tokens == len(inputs)
    torch.testing.assert_close(stats.hessian, inputs.T @ inputs, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(stats.hessian, stats.hessian.T)
    assert stats.cross is not None
    torch.testing.assert_close(stats.cross, inputs.T @ (other - inputs), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gptq_equals_the_naive_algorithm(scheme: Scheme) -> None:
    """The naive one removes a quantized column from the inverse Hessian by Gaussian elimination, column by column."""
    weight, inputs = problem()
    hessian = (inputs.T @ inputs).double()
    solved = factor(hessian.float(), damp_percent=0.01, act_order=True)
    scale, zero = search_grid(weight, scheme)
    fast = gptq(weight, solved, scale, zero, scheme)
    naive = reference.gptq(weight, hessian, scale, zero, scheme, damp=0.01)
    same = (fast.codes == naive).float().mean()
    assert same > 0.995  # float32 against float64: a value on the edge between two levels may fall either way


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_each_stage_lowers_the_output_error(scheme: Scheme) -> None:
    weight, inputs = problem()
    hessian = inputs.T @ inputs
    solved = factor(hessian, 0.01, act_order=True)
    scale, zero = search_grid(weight, scheme, solved.importance)
    rounded = round_to_grid(weight, scale, zero, scheme)
    solution = gptq(weight, solved, scale, zero, scheme)
    swept = descend(weight, solution, hessian)
    fitted = refit_scales(weight, swept, hessian)
    losses = [output_loss(weight, q.dequantize(), inputs) for q in (rounded, solution, swept, fitted)]
    assert losses[1] < losses[0]
    assert losses[2] <= losses[1] * 1.0001
    assert losses[3] <= losses[2] * 1.0001


def test_descent_ends_where_no_single_code_can_be_bettered() -> None:
    scheme = Scheme(bits=3, group_size=16, scale_dtype="float32")
    weight, inputs = problem(rows=4, width=32)
    hessian = inputs.T @ inputs
    quantized = round_to_grid(weight, *search_grid(weight, scheme), scheme)
    for _ in range(30):
        quantized = descend(weight, quantized, hessian)
    least = output_loss(weight, quantized.dequantize(), inputs)
    for column in range(32):
        for step in (-1, 1):
            codes = quantized.codes.clone().int()
            codes[:, column] = (codes[:, column] + step).clamp(0, scheme.max_code)
            for row in range(4):
                changed = quantized.codes.clone()
                changed[row] = codes[row].to(torch.uint8)
                moved = type(quantized)(scheme, changed, quantized.scale).dequantize()
                assert output_loss(weight, moved, inputs) >= least * (1 - 1e-4)


def test_refitted_scales_are_the_least_squares_solution() -> None:
    scheme = Scheme(bits=4, group_size=16, symmetric=False, scale_dtype="float32")
    weight, inputs = problem(rows=5, width=48)
    quantized = round_to_grid(weight, *search_grid(weight, scheme), scheme)
    fitted = refit_scales(weight, quantized, inputs.T @ inputs)
    assert quantized.zero_point is not None
    centred = quantized.codes.double().reshape(5, 3, 16) - quantized.zero_point.double().unsqueeze(-1)
    for row in range(5):
        columns = torch.einsum("gi,tgi->tg", centred[row], inputs.double().reshape(-1, 3, 16))
        expected = torch.linalg.lstsq(columns, (inputs.double() @ weight[row].double())[:, None]).solution[
            :, 0
        ]
        torch.testing.assert_close(fitted.scale[row].double(), expected, rtol=1e-3, atol=1e-5)


def test_refitting_many_small_groups_takes_no_more_than_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """The systems of all rows at once would take 4 times as much."""
    scheme = Scheme(bits=4, group_size=8, scale_dtype="float32")
    weight, inputs = problem(rows=21, width=256)
    hessian = inputs.T @ inputs
    quantized = round_to_grid(weight, *search_grid(weight, scheme), scheme)
    sizes = []
    solve = torch.linalg.solve_ex

    def watched(system: torch.Tensor, right: torch.Tensor) -> Any:
        sizes.append(system.numel())
        return solve(system, right)

    monkeypatch.setattr(torch.linalg, "solve_ex", watched)
    fitted = refit_scales(weight, quantized, hessian).scale
    assert sum(sizes) == 21 * 32**2 and max(sizes) <= weight.numel() < sum(sizes)
    for row in range(21):
        alone = type(quantized)(scheme, quantized.codes[row : row + 1], quantized.scale[row : row + 1])
        one = refit_scales(weight[row : row + 1], alone, hessian).scale
        torch.testing.assert_close(fitted[row : row + 1], one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_searched_scales_beat_the_covering_range(scheme: Scheme) -> None:
    weight, inputs = problem()
    weight[0, 3] = 9.0  # an outlier that a covering range would pay for
    importance = inputs.square().sum(0)

    def loss(scale: torch.Tensor, zero: torch.Tensor) -> float:
        error = round_to_grid(weight, scale, zero, scheme).dequantize() - weight
        return float((error.square() * importance).sum())

    rows, groups = scheme.scale_shape(*weight.shape)
    covering = loss(*min_max_grid(weight.reshape(rows, groups, -1), scheme))
    found = loss(*search_grid(weight, scheme, importance))
    assert found <= covering * 1.0001
    if scheme.bits <= 4:
        assert found < 0.99 * covering


def test_the_search_reaches_a_fine_grid_search() -> None:
    """With one group, trying thousands of scales by brute force finds hardly anything better."""
    scheme = Scheme(bits=3, group_size="channel", scale_dtype="float32")
    weight, _ = problem(rows=3, width=32)
    scale, zero = search_grid(weight, scheme)
    for row in range(3):
        error = float((round_to_grid(weight[row : row + 1], scale[row : row + 1], zero[row : row + 1], scheme)
                       .dequantize() - weight[row]).square().sum())  # fmt: skip
        top = float(weight[row].abs().max())
        best = min(
            float((((weight[row] / s).round().clamp(-4, 3) * s) - weight[row]).square().sum())
            for s in torch.cat([torch.linspace(0.1, 0.5, 2000), -torch.linspace(0.1, 0.5, 2000)]) * top
        )
        assert error <= best * 1.1


def test_the_asymmetric_target_comes_closer_to_the_uncompressed_outputs() -> None:
    weight, inputs = problem()
    drift = inputs + 0.3 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1)) * inputs.std(
        0
    )
    stats = stats_of(drift, inputs)  # what the compressed model sees, and what the uncompressed one saw
    fields = {"bits": 4, "group_size": 16, "scale_dtype": "float32"}
    errors = []
    for asymmetric in (0.0, 1.0):
        step = GPTQ(input_correction=asymmetric, **fields)
        quantized = step.quantize("w", weight, step.scheme("w"), stats, StepRecord())
        errors.append(float((quantized.dequantize() @ drift.T - weight @ inputs.T).square().sum()))
    assert errors[1] < 0.9 * errors[0]


def test_damping_rises_until_the_hessian_can_be_factorized_and_is_reported() -> None:
    weight, inputs = problem(width=64)
    stats = stats_of(inputs)
    stats.hessian -= (
        0.05 * stats.hessian.diagonal().mean() * torch.eye(64)
    )  # as rounding of sums may leave it
    record = StepRecord()
    step = GPTQ(bits=4, group_size=16, damp_percent=0.001)
    step.quantize("block.w", weight, step.scheme("block.w"), stats, record)
    assert len(record.notes) == 1
    assert record.notes[0]["where"] == "block.w" and "damping raised from 0.001" in record.notes[0]["what"]


def test_a_hopeless_hessian_falls_back_to_rounding_and_says_so() -> None:
    weight, inputs = problem()
    stats = stats_of(inputs)
    stats.hessian.fill_(float("nan"))
    record = StepRecord()
    step = GPTQ(bits=4, group_size=16)
    quantized = step.quantize("w", weight, step.scheme("w"), stats, record)
    expected = RTN(bits=4, group_size=16).quantize("w", weight, step.scheme("w"), None, StepRecord())
    assert torch.equal(quantized.codes, expected.codes)
    assert "rounded to nearest" in record.notes[0]["what"]


def test_dead_inputs_do_no_harm() -> None:
    weight, inputs = problem()
    inputs[:, 5] = 0
    step = GPTQ(bits=4, group_size=16)
    quantized = step.quantize("w", weight, step.scheme("w"), stats_of(inputs), StepRecord())
    assert quantized.dequantize().isfinite().all()
    rounded = RTN(bits=4, group_size=16).quantize("w", weight, step.scheme("w"), None, StepRecord())
    assert output_loss(weight, quantized.dequantize(), inputs) < output_loss(
        weight, rounded.dequantize(), inputs
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_that_the_text_left_silent_keeps_its_grid(symmetric: bool) -> None:
    """Its scale is not 1, so that inputs which come later find the weight about as it was."""
    weight, inputs = problem()
    weight, silent = weight / 100, inputs.clone()
    silent[:, 16:32] = 0
    step = GPTQ(bits=4, group_size=16, symmetric=symmetric)
    quantized = step.quantize("w", weight, step.scheme("w"), stats_of(silent), StepRecord()).dequantize()
    apart = (quantized - weight)[:, 16:32].norm() / weight[:, 16:32].norm()
    assert apart < 0.15
    hessian = silent.T @ silent
    rounded = RTN(bits=4, group_size=16).quantize("w", weight, step.scheme("w"), None, StepRecord())
    fitted = refit_scales(weight, rounded, hessian).scale
    assert torch.equal(fitted[:, 1], rounded.scale[:, 1]) and not torch.equal(fitted, rounded.scale)


def test_few_loud_tokens_do_not_spoil_all_others() -> None:
    """Massive activations: refining is worth its time on the tokens that are not among them, too."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(32, 64, generator=generator), torch.randn(2048, 64, generator=generator)
    loud = inputs.clone()
    loud[:8, 3] = 1e4
    errors = []
    for refine in (0, 1):
        step = GPTQ(bits=4, group_size=32, refine=refine)
        found = step.quantize("w", weight, step.scheme("w"), stats_of(loud), StepRecord()).dequantize()
        errors.append(output_loss(weight, found, inputs[8:]))
    assert errors[1] < 1.05 * errors[0]


# pruned in the same pass


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("width", "sparsity", "pattern"),
    [(64, 0.5, "unstructured"), (160, 0.7, "unstructured"), (64, 0.0, "2:4"), (144, 0.5, "4:8")],
)
def test_pruning_in_the_pass_equals_the_naive_algorithm(
    width: int, sparsity: float, pattern: Any, symmetric: bool
) -> None:
    weight, inputs = problem(rows=8, width=width)
    hessian = (inputs.T @ inputs).double()
    scheme = Scheme(bits=4, group_size=16, symmetric=symmetric, scale_dtype="float32")
    scale, zero = search_grid(weight, scheme)
    expected, mask = reference.sparse_gptq(weight, hessian, sparsity, pattern, scale, zero, scheme, 0.01)
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    solved = factor(hessian, 0.01, act_order=False)  # in float64, so that no near tie falls the other way
    grid = scale.double(), zero.double()
    quantized = gptq(weight.double(), solved, *grid, scheme, pruned, sparsity, pattern).dequantize()
    assert torch.equal(pruned, ~mask)
    torch.testing.assert_close(quantized.double(), expected, rtol=1e-6, atol=1e-6)
    blocks = [min(128, width - start) * 8 for start in range(0, width, 128)]
    share = sparsity if pattern == "unstructured" else 0.5
    assert int(pruned.sum()) == sum(round(block * share) for block in blocks)
    assert bool((quantized[pruned] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_one_pass_beats_pruning_and_then_rounding(pattern: Any, symmetric: bool) -> None:
    weight, inputs = problem(rows=32, width=128)
    fields: dict[str, Any] = {"bits": 4, "group_size": 32, "symmetric": symmetric}
    record = StepRecord()
    step = GPTQ(sparsity=0.5, pattern=pattern, **fields)
    _, packed = step.compress_linear("x", weight, stats_of(inputs), record)
    joint = packed.dequantize().float()  # type: ignore[operator]
    _, sparse = SparseGPT(pattern=pattern).compress_linear("x", weight, stats_of(inputs), StepRecord())
    assert isinstance(sparse.weight, torch.Tensor)
    rtn = RTN(**fields)
    rounded = rtn.quantize("x", sparse.weight.detach(), rtn.scheme("x"), None, StepRecord()).dequantize()
    assert output_loss(weight, joint, inputs) < 0.95 * output_loss(weight, rounded, inputs)
    assert record.linears[-1]["sparsity"] == float((joint == 0).float().mean()) >= 0.5
    if pattern != "unstructured":
        kept, group = (int(part) for part in pattern.split(":"))
        assert bool(((joint != 0).reshape(32, -1, group).sum(-1) <= kept).all())


def test_without_a_sparsity_nothing_changes() -> None:
    weight, inputs = problem(width=160)
    solved = factor(inputs.T @ inputs, 0.01, act_order=True)
    scheme = Scheme(bits=4, group_size=32)
    grid = search_grid(weight, scheme)
    none = torch.zeros_like(weight, dtype=torch.bool)
    plain, same = gptq(weight, solved, *grid, scheme), gptq(weight, solved, *grid, scheme, none, 0.0)
    assert torch.equal(plain.codes, same.codes) and not bool(none.any())


def test_weights_that_are_zero_already_count() -> None:
    weight, inputs = problem(width=128)
    zeros = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    step = GPTQ(bits=4, group_size=32, sparsity=0.5)
    pruned = weight.masked_fill(zeros, 0)
    quantized = step.quantize("x", pruned, step.scheme("x"), stats_of(inputs), StepRecord()).dequantize()
    assert bool((quantized[zeros] == 0).all())
    assert 0.5 <= float((quantized == 0).float().mean()) < 0.55


def test_a_hopeless_hessian_still_prunes() -> None:
    weight, inputs = problem()
    stats = stats_of(inputs)
    stats.hessian.fill_(float("nan"))
    step = GPTQ(bits=4, group_size=16, pattern="2:4")
    quantized = step.quantize("w", weight, step.scheme("w"), stats, StepRecord()).dequantize()
    assert bool(((quantized != 0).reshape(len(weight), -1, 4).sum(-1) <= 2).all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "2:4", "sparsity": 0.6}, "keeps half"),
        ({"pattern": "2:4", "act_order": True}, "natural order"),
        ({"sparsity": 1.0}, "less than 1"),
    ],
)
def test_impossible_pruning_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_step("gptq", fields)


def test_a_pattern_that_does_not_fit_is_refused() -> None:
    model = tiny_model("llama", intermediate_size=130)
    with pytest.raises(UserError, match=r"4:8 does not fit the 130 inputs of .*down_proj"):
        GPTQ(pattern="4:8", group_size="channel").check(Anatomy.of(model))


# the tables outside the blocks


def test_overrides_reach_embeddings_and_heads() -> None:
    untied = Anatomy.of(tiny_model("llama", tie_word_embeddings=False))
    overrides = {"lm_head": {"bits": 6, "group_size": 16}, "model.embed_tokens": {"symmetric": False}}
    step = RTN(bits=4, group_size=32, embeddings_bits=8, overrides=overrides)
    found = {edit.module: edit.scheme for edit in step._outer_edits(untied)}
    head, table = found["lm_head"], found["model.embed_tokens"]
    assert (head.bits, head.group_size) == (6, 16)
    assert (table.bits, table.group_size, table.symmetric) == (8, 32, False)
    both = RTN(bits=4, embeddings_bits=8, overrides={"lm_*": {"bits": 6}, "lm_head": {"group_size": 16}})
    assert (both.embedding_scheme("lm_head").bits, both.embedding_scheme("lm_head").group_size) == (6, 16)
    (edit,) = step._outer_edits(Anatomy.of(tiny_model("qwen2")))
    assert edit.module == "model.embed_tokens" and edit.scheme.bits == 6  # one weight: what is said of either


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_half_of_a_tied_pair_cannot_be_left_out(name: str) -> None:
    step = RTN(bits=4, group_size=32, embeddings_bits=8, exclude=(name,))
    with pytest.raises(UserError, match="are one weight.*exclude both or none"):
        step.check(Anatomy.of(tiny_model("qwen2")))
    RTN(bits=4, group_size=32, embeddings_bits=8, exclude=("lm_head", "model.embed_tokens")).check(
        Anatomy.of(tiny_model("qwen2"))
    )
