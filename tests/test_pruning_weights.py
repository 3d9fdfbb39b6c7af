"""Single-weight pruning: masks and SparseGPT against naive versions, and sparse checkpoints from end to end."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmslim
from llmslim.anatomy import Anatomy
from llmslim.calibration.factor import factor
from llmslim.calibration.statistics import InputStats, output_error
from llmslim.calibration.stream import BlockStream, Lane
from llmslim.edit import EDITS, parse_edit
from llmslim.errors import UserError
from llmslim.masks import choose, kept_count, n_of_m, per_layer, per_row
from llmslim.pipeline import compress
from llmslim.pruning.allocation import Histogram, outlier_ratio, outlier_weighed
from llmslim.pruning.sparsegpt import sparsegpt
from llmslim.pruning.weights import Magnitude, Random, SparseGPT, Wanda, WeightPruner
from llmslim.quantization.gptq import GPTQ
from llmslim.quantization.packed import PackedLinear
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Calibration
from llmslim.sparse import SparseLinear, SparseWeight, SparsifyLinear, pack_mask, unpack_mask
from llmslim.step import StepRecord, build_step
from tests import reference
from tests.test_quantization_gptq import problem, stats_of
from tests.tiny import example_inputs, save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("verified_here")

QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=4, seq_len=32), "evaluation": None}
METHODS: list[WeightPruner] = [Magnitude(), Wanda(), SparseGPT(), Random()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in ("llama", "gpt2", "mixtral", "t5", "bert")}


def sparse_modules(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}


# masks


def test_masks_keep_the_highest_scores() -> None:
    score = torch.rand(6, 20, generator=torch.Generator().manual_seed(0))
    rows = per_row(score, 0.3)
    assert rows.sum(1).tolist() == [14] * 6
    whole = per_layer(score, 0.3)
    assert int(whole.sum()) == kept_count(120, 0.3) == 84
    assert score[whole].min() > score[~whole].max()
    for row in range(6):
        assert score[row][rows[row]].min() > score[row][~rows[row]].max()
    groups = n_of_m(score, 2, 4).reshape(6, 5, 4)
    assert bool((groups.sum(-1) == 2).all())
    for kept, values in zip(groups.reshape(-1, 4), score.reshape(-1, 4), strict=True):
        assert set(values[kept].tolist()) == set(sorted(values.tolist())[2:])


def test_ties_are_broken_by_place_in_every_rule() -> None:
    equal = torch.ones(2, 8)
    assert per_row(equal, 0.5).tolist() == [[True] * 4 + [False] * 4] * 2
    assert per_layer(equal, 0.5).tolist() == [[True] * 8, [False] * 8]
    assert choose(equal, 0.5, "2:4", "row").tolist() == [[True, True, False, False] * 2] * 2
    assert choose(equal, 0.5, "4:8", "row").tolist() == [[True] * 4 + [False] * 4] * 2


def test_n_of_m_refuses_a_width_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="10 inputs"):
        n_of_m(torch.rand(2, 10), 2, 4)


# SparseGPT


@pytest.mark.parametrize(
    ("width", "sparsity", "pattern"),
    [(64, 0.5, "unstructured"), (150, 0.7, "unstructured"), (64, 0.5, "2:4"), (136, 0.5, "4:8")],
)
def test_sparsegpt_equals_the_naive_algorithm(width: int, sparsity: float, pattern: Any) -> None:
    weight, inputs = problem(rows=8, width=width)
    hessian = (inputs.T @ inputs).double()
    expected, mask = reference.sparsegpt(weight, hessian, sparsity, pattern, 0.01)
    solved = factor(hessian, 0.01, act_order=False)  # in float64, so that no near tie falls the other way
    pruned, kept = sparsegpt(weight.double(), solved, sparsity, pattern)
    assert torch.equal(kept, mask)
    torch.testing.assert_close(pruned, expected, rtol=1e-7, atol=1e-9)
    assert bool((pruned[~kept] == 0).all())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_more_knowledge_of_the_inputs_costs_less_output(pattern: Any) -> None:
    weight, inputs = problem(rows=32, width=128)
    stats = stats_of(inputs)
    errors, record = {}, StepRecord()
    for kind in (SparseGPT, Wanda, Magnitude, Random):
        kind(pattern=pattern).compress_linear("x", weight, stats, record)
        row = record.linears[-1]
        assert row["sparsity"] == 0.5 and row["shape"] == [32, 128] and row["tokens"] == len(inputs)
        errors[kind.kind] = row["output_error"]
    assert 0 < errors["sparsegpt"] < 0.9 * errors["wanda"]
    assert errors["wanda"] < 0.7 * errors["magnitude"]
    assert errors["magnitude"] < errors["random"]
    assert record.notes == []


def test_wanda_is_the_formula_per_row() -> None:
    weight, inputs = problem(rows=5, width=16)
    mask = reference.wanda(weight, inputs, 0.75)
    _, sparse = Wanda(sparsity=0.75).compress_linear("x", weight, stats_of(inputs), StepRecord())
    assert torch.equal(sparse.mask, mask)
    assert torch.equal(sparse.weight, weight * mask)


def test_sparsegpt_without_a_usable_hessian_says_that_it_fell_back() -> None:
    weight, inputs = problem()
    stats = InputStats(64, torch.device("cpu"))
    stats.add(torch.full_like(inputs, float("nan")))
    record = StepRecord()
    _, mask = SparseGPT().prune("x", weight, 0.5, stats.finish(), record)
    assert "by magnitude" in record.notes[0]["what"]
    assert torch.equal(mask, per_layer(weight.abs(), 0.5))


def test_random_draws_differ_by_linear_and_by_field_only() -> None:
    weight = torch.randn(16, 32)

    def mask(name: str, draw: int) -> Tensor:
        return Random(draw=draw).compress_linear(name, weight, None, StepRecord())[1].mask  # type: ignore[union-attr,return-value]

    assert torch.equal(mask("a", 0), mask("a", 0))
    assert not torch.equal(mask("a", 0), mask("b", 0)) and not torch.equal(mask("a", 0), mask("a", 1))


# allocation


class FakeLook:
    """A survey as the passes give it: blocks in order, the lane in front of each."""

    def __init__(self, family: str) -> None:
        self.model = tiny_model(family)
        self.model.config.use_cache = False
        self.stream = BlockStream(self.model, torch.device("cpu"), torch.float32)
        tokens = torch.randint(5, 512, (4, 32), generator=torch.Generator().manual_seed(0))
        self.stream.add(Lane.of_tokens("calibration", tokens, bool(self.model.config.is_encoder_decoder)))

    def blocks(self) -> Iterator[Any]:
        with torch.no_grad():
            for stack in self.stream.anatomy.stacks:
                self.stream.enter(stack)
                for block in stack.blocks:
                    yield block, self.stream
                self.stream.leave(stack)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_a_global_threshold_is_one_magnitude_for_all(family: str) -> None:
    look = FakeLook(family)
    step = Magnitude(sparsity=0.6, threshold="global")
    assert step.needs_survey and not step.needs_calibration
    record = StepRecord()
    record.survey = step.survey(look)  # type: ignore[attr-defined]
    model = look.model
    dense = torch.cat([_dense(model, name).flatten() for name in record.survey])  # type: ignore[attr-defined]
    threshold = float(dense.abs().kthvalue(round(0.6 * dense.numel())).values)
    assert len(set(map(float, record.survey.values()))) > 1  # type: ignore[attr-defined]
    kept = 0
    for name in record.survey:  # type: ignore[attr-defined]
        weight = _dense(model, name)
        _, sparse = step.compress_linear(name, weight, None, record)
        kept += int(sparse.mask.sum())
        wrong = sparse.mask != (weight.abs() > threshold)
        assert bool(((weight.abs()[wrong] / threshold - 1).abs() < 2e-3).all())  # within the bin
    assert kept == pytest.approx(0.4 * dense.numel(), abs=len(record.survey))  # type: ignore[attr-defined]


def _dense(model: nn.Module, name: str) -> Tensor:
    from llmslim.anatomy.parts import dense_weight

    return dense_weight(model.get_submodule(name)).detach()


def test_magnitudes_of_unequal_weights_share_one_threshold() -> None:
    magnitudes = Histogram()
    magnitudes.add("small", torch.linspace(0.001, 0.1, 100))
    magnitudes.add("large", torch.linspace(1, 2, 300))
    shares = magnitudes.sparsities(0.25)
    assert shares["small"] == pytest.approx(1.0, abs=0.01) and shares["large"] == pytest.approx(0, abs=0.01)
    shares = magnitudes.sparsities(0.625)
    assert shares["small"] == 1.0 and shares["large"] == pytest.approx(0.5, abs=0.01)


def test_owl_spares_the_blocks_with_outliers_and_keeps_the_mean() -> None:
    shares = outlier_weighed([0.01, 0.05, 0.03], [100, 100, 200], 0.7, 0.08)
    assert shares[1] < shares[2] < shares[0]
    assert shares[0] - shares[1] == pytest.approx(0.16)
    assert (shares[0] * 100 + shares[1] * 100 + shares[2] * 200) / 400 == pytest.approx(0.7)
    assert outlier_weighed([0.02, 0.02], [1, 1], 0.7, 0.08) == [0.7, 0.7]
    assert all(0 < share < 1 for share in outlier_weighed([0, 1, 0], [1, 1, 1], 0.99, 0.4))


def test_the_outlier_ratio_counts_over_the_whole_block() -> None:
    scores = {"a": torch.tensor([[1.0, 1.0, 1.0]]), "b": torch.tensor([[1.0, 46.0]])}
    assert outlier_ratio(scores, 4.0) == 1 / 5  # the mean is 10
    assert outlier_ratio(scores, 5.0) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5"])
def test_owl_surveys_every_selected_weight(family: str) -> None:
    look = FakeLook(family)
    step = Magnitude(sparsity=0.6, layer_sparsity="owl", owl_outlier=2.0)
    assert step.needs_survey and step.needs_calibration
    survey = step.survey(look)
    blocks: dict[str, set[float]] = {}
    total = lost = 0.0
    for name, share in survey.items():
        block = re.match(r".*?\.\d+", name).group()  # type: ignore[union-attr]
        blocks.setdefault(block, set()).add(float(share))
        size = _dense(look.model, name).numel()
        total, lost = total + size, lost + size * float(share)
    assert all(len(shares) == 1 for shares in blocks.values()) and len(set.union(*blocks.values())) > 1
    assert lost / total == pytest.approx(0.6)


# the module


def test_the_bitmap_is_the_mask_low_bits_first() -> None:
    mask = torch.rand(5, 21, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(pack_mask(mask), reference.pack_bits(mask.long(), 1))
    assert torch.equal(unpack_mask(pack_mask(mask), 21), mask)


def test_a_sparse_linear_stores_and_restores_bit_for_bit() -> None:
    weight = torch.randn(9, 21).bfloat16()
    sparse = SparseLinear.from_dense(weight, torch.rand(9, 21) > 0.6)
    stored = sparse.stored()
    other = SparseLinear(21, 9, sparse.nonzeros, False, torch.bfloat16)
    other.store(SparseWeight(*stored.values()))
    assert torch.equal(other.weight, sparse.weight) and torch.equal(other.mask, sparse.mask)
    again = SparseLinear(21, 9, sparse.nonzeros, False, torch.bfloat16)
    again.load_state_dict(stored)  # as on disk
    assert torch.equal(again.weight, sparse.weight) and torch.equal(again.mask, sparse.mask)
    again.load_state_dict(other.state_dict())  # as in memory
    empty = SparseLinear(21, 9, sparse.nonzeros, False, torch.bfloat16, "meta")
    assert {n: (t.shape, t.dtype) for n, t in empty.stored().items()} == {
        n: (t.shape, t.dtype) for n, t in stored.items()
    }


def test_a_bitmap_that_says_something_else_is_refused() -> None:
    sparse = SparseLinear.from_dense(torch.randn(4, 12), torch.rand(4, 12) > 0.5)
    bitmap, values = sparse.stored().values()
    flipped = bitmap.clone()
    flipped[0, 0] ^= 1
    padding = bitmap.clone()
    padding[0, 1] |= 128
    for bad in (flipped, padding, bitmap[:, :1]):
        with pytest.raises(ValueError, match="bitmap"):
            sparse.store(SparseWeight(bad, values))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize("training", [True, False])
def test_the_mask_survives_training(optimizer: Any, training: bool) -> None:
    torch.manual_seed(0)
    first = SparseLinear.from_dense(torch.randn(16, 24), torch.rand(16, 24) > 0.7)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(16, 3)).train(training)
    first.weight.requires_grad_()
    before, mask, steps = first.weight.detach().clone(), first.mask, optimizer(model.parameters())
    for _ in range(20):
        steps.zero_grad()
        model(torch.randn(32, 24)).square().mean().backward()
        steps.step()
    assert bool((first.weight[~mask] == 0).all()) and bool((first.weight[mask] != before[mask]).all())
    model.eval()
    x = torch.randn(4, 24)
    with torch.no_grad():
        quick = model(x)
    torch.testing.assert_close(quick, model(x))


def test_the_edit_is_plain_json_and_checked() -> None:
    assert EDITS["sparsify_linear"] is SparsifyLinear
    edit = SparsifyLinear(module="a", nonzeros=5)
    assert parse_edit(json.loads(json.dumps(edit.to_json()))) == edit
    model = nn.Module()
    model.a = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="fewer than 5"):
        edit.apply(model)
    with pytest.raises(UserError, match="damaged"):
        parse_edit({"edit": "sparsify_linear", "module": "a", "nonzeros": 0})


# the whole road


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5", "bert"])
@pytest.mark.parametrize("step", METHODS, ids=lambda step: step.kind)
def test_saved_is_loaded_bit_for_bit_and_smaller(
    family: str, step: WeightPruner, folders: dict[str, Path], tmp_path: Path
) -> None:
    result = compress(str(folders[family]), [step], tmp_path / "out", **QUICK)
    assert result.report["verification"]["max_error"] == 0
    assert result.report["format"] == "llmslim"
    rows = {row["name"]: row for row in result.report["linears"]}
    assert all(row["sparsity"] == pytest.approx(0.5, abs=0.01) for row in rows.values())
    if step.needs_calibration:
        assert sum("output_error" in row for row in rows.values()) > 0.7 * len(rows)
    assert result.report["plan"]["output_bytes"] == pytest.approx(size(result.folder), rel=0.03)
    assert size(result.folder) < 0.8 * size(folders[family])
    model, _ = llmslim.load(str(result.folder), dtype="float32")
    sparse = sparse_modules(model)
    assert set(sparse) == set(rows)
    stored = load_file(result.folder / "model.safetensors")
    for name, module in sparse.items():
        key = next(key for key in stored if name.endswith(key.removesuffix(".weight_bitmap")))
        assert torch.equal(stored[key], module.weight_bitmap)
        assert torch.equal(stored[key.replace("bitmap", "values")], module.weight[module.mask])
        assert bool((module.weight[~module.mask] == 0).all())
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(again[key], stored[key]) for key in stored)


def size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("kind", ["magnitude", "wanda", "sparsegpt", "random"])
def test_patterns_hold_in_the_checkpoint(
    kind: str, pattern: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    step = build_step(kind, {"pattern": pattern})
    result = compress(str(folders["gpt2"]), [step], tmp_path / "out", **QUICK)
    model, _ = llmslim.load(str(result.folder))
    group = int(pattern[-1])
    assert sparse_modules(model)
    for module in sparse_modules(model).values():
        assert bool((module.mask.reshape(-1, group).sum(-1) == group // 2).all())


def test_a_16_bit_checkpoint_holds_what_sparsegpt_computed(tmp_path: Path) -> None:
    """The probe is of the weights as rounded for the file."""
    folder = tmp_path / "base"
    save_tiny("llama", folder)
    result = compress(str(folder), [SparseGPT()], tmp_path / "out", dtype="bfloat16", **QUICK)
    assert result.report["verification"]["max_error"] == 0


def test_plain_transformers_loads_it_and_fine_tuning_keeps_it_sparse(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    import llmslim.plugin  # noqa: F401

    result = compress(str(folders["llama"]), [Wanda()], tmp_path / "out", **QUICK)
    model = AutoModelForCausalLM.from_pretrained(result.folder).train()
    masks = {name: module.mask for name, module in sparse_modules(model).items()}
    trained = [parameter.requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    inputs = example_inputs(model)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "tuned")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert masks
    for name, module in sparse_modules(tuned).items():
        assert torch.equal(module.mask, masks[name])
        assert torch.equal(module.weight, model.get_submodule(name).weight)
        assert bool((module.weight[~masks[name]] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quantizer", [GPTQ, RTN])
def test_quantizing_keeps_zeros(
    quantizer: Any, family: str, symmetric: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    pruned = compress(str(folders[family]), [SparseGPT()], tmp_path / "pruned", **QUICK)
    sparse, _ = llmslim.load(str(pruned.folder))
    step = quantizer(bits=4, group_size=32, symmetric=symmetric)
    both = compress(str(pruned.folder), [step], tmp_path / "both", **QUICK)
    assert both.report["verification"]["max_error"] == 0
    packed, _ = llmslim.load(str(both.folder))
    for name, module in sparse_modules(sparse).items():
        other = packed.get_submodule(name)
        assert isinstance(other, PackedLinear)
        assert bool((other.dequantize()[~module.mask] == 0).all())


def test_pruning_and_quantizing_in_one_run_is_the_same_as_in_two(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    first, second = Wanda(), RTN(bits=4, group_size=32)
    pruned = compress(str(folders["llama"]), [first], tmp_path / "pruned", **QUICK)
    both = compress(str(pruned.folder), [second], tmp_path / "both", **QUICK)
    once = compress(str(folders["llama"]), [first, second], tmp_path / "once", **QUICK)
    files = [result.folder / "model.safetensors" for result in (both, once)]
    assert files[0].read_bytes() == files[1].read_bytes()


class Stop(Exception):
    pass


@pytest.mark.parametrize("family", ["llama", "t5", "mixtral"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "sparsegpt" and done == 2:
            raise Stop

    whole = compress(str(folders[family]), [SparseGPT()], tmp_path / "whole", **QUICK)
    with pytest.raises(Stop):
        compress(str(folders[family]), [SparseGPT()], tmp_path / "out", progress=stop, **QUICK)
    resumed = compress(str(folders[family]), [SparseGPT()], tmp_path / "out", **QUICK)
    assert resumed.report["run"]["resumed"]
    files = [result.folder / "model.safetensors" for result in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_pruning_again_prunes_further(folders: dict[str, Path], tmp_path: Path) -> None:
    first = compress(str(folders["llama"]), [Magnitude()], tmp_path / "first", **QUICK)
    second = compress(str(first.folder), [Magnitude(sparsity=0.75)], tmp_path / "second", **QUICK)
    before, after = (sparse_modules(llmslim.load(str(r.folder))[0]) for r in (first, second))
    for name, module in after.items():
        assert module.nonzeros == module.mask.numel() // 4
        assert not bool((module.mask & ~before[name].mask).any())


def test_a_damaged_bitmap_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    result = compress(str(folders["llama"]), [Magnitude()], tmp_path / "out", **QUICK)
    tensors = load_file(result.folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith("q_proj.weight_bitmap"))
    tensors[key] ^= 1
    save_file(tensors, result.folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"q_proj is damaged"):
        llmslim.load(str(result.folder))


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_other_formats_refuse(form: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sparsify_linear"):
        compress(str(folders["llama"]), [Magnitude()], tmp_path / "out", format=form, **QUICK)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("magnitude", {"sparsity": 1.0}, "less than 1"),
        ("wanda", {"pattern": "3:4"}, "pattern = '3:4'"),
        ("wanda", {"pattern": "2:4", "sparsity": 0.6}, "keeps half"),
        ("wanda", {"pattern": "2:4", "layer_sparsity": "owl"}, "the same from every weight"),
        ("magnitude", {"threshold": "global", "pattern": "4:8"}, "the same from every weight"),
        ("magnitude", {"threshold": "global", "layer_sparsity": "owl"}, "use one"),
        ("sparsegpt", {"sparsity_range": 0.1}, "owl and error only"),
        ("random", {"threshold": "row"}, "Unknown option"),
    ],
)
def test_impossible_options_are_refused(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_step(kind, fields)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Wanda(sparsity=0.999), r"sparsity 0.999 leaves nothing of model\.layers\.0"),
        (Magnitude(include=("nothing",)), "Nothing to prune"),
    ],
)
def test_requests_that_cannot_work_are_refused(step: WeightPruner, message: str) -> None:
    with pytest.raises(UserError, match=message):
        step.check(Anatomy.of(tiny_model("llama")))


def test_a_width_that_m_does_not_divide_is_refused() -> None:
    model = tiny_model("llama", intermediate_size=130)
    with pytest.raises(UserError, match=r"4:8 does not fit the 130 inputs of .*down_proj"):
        Magnitude(pattern="4:8").check(Anatomy.of(model))
    Magnitude(pattern="4:8", exclude=("down_proj",)).check(Anatomy.of(model))


def test_packed_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    packed = compress(str(folders["llama"]), [RTN(group_size=32)], tmp_path / "packed", **QUICK)
    with pytest.raises(UserError, match="prune before quantizing"):
        compress(str(packed.folder), [Wanda()], tmp_path / "out", **QUICK)


def test_deep_copies_and_casts_keep_the_mask() -> None:
    sparse = SparseLinear.from_dense(torch.randn(4, 12), torch.rand(4, 12) > 0.5)
    half = copy.deepcopy(sparse).to(torch.bfloat16)
    assert torch.equal(half.mask, sparse.mask) and half.weight.dtype == torch.bfloat16
    assert output_error(sparse.weight.detach(), half.weight.detach().float(), torch.eye(12)) < 1e-4
