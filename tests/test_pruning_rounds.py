"""Rounds: several passes end where one does, masks are nested, ramps are their closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llmslim
from llmslim.anatomy import MLP, Anatomy
from llmslim.calibration.factor import factor
from llmslim.errors import UserError
from llmslim.outlook import Foresight
from llmslim.pipeline import compress
from llmslim.pruning.amount import ramp_up
from llmslim.pruning.sparsegpt import sparsegpt
from llmslim.recipe import Calibration, Recipe
from llmslim.sparse import SparseLinear
from llmslim.step import Step, StepRecord, build_step
from tests.checkpoints import outlook
from tests.test_quantization_gptq import problem, stats_of
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")

QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=4, seq_len=32), "evaluation": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in ("llama", "gpt2", "mixtral")}


def rounds_of(kind: str, fields: dict[str, Any], before: Foresight) -> list[Any]:
    return build_step(kind, fields).resolve(before)[0]


def shapes(outlook: Foresight) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in outlook.anatomy.model.named_parameters()}


def test_ramps_are_their_closed_form() -> None:
    assert ramp_up(4, "linear") == [0.25, 0.5, 0.75, 1]
    for rounds in (1, 2, 5):
        final, cubic = 0.6, ramp_up(rounds, "cubic")
        for number, part in enumerate(
            cubic, 1
        ):  # s_f + (s_i - s_f) (1 - t / n)^3, eq. 1 of the paper, s_i = 0
            assert final * part == pytest.approx(final + (0 - final) * (1 - number / rounds) ** 3)
        assert cubic[-1] == 1 and cubic == sorted(cubic)


@pytest.mark.parametrize("ramp", ["linear", "cubic"])
def test_single_weights_follow_the_ramp(ramp: str) -> None:
    steps = rounds_of("wanda", {"sparsity": 0.6, "rounds": 3, "ramp": ramp}, outlook("llama"))
    assert [step.sparsity for step in steps] == [0.6 * part for part in ramp_up(3, ramp)]
    assert steps[-1].sparsity == 0.6
    assert all(step.rounds == 1 and step.ramp == "linear" for step in steps)


WIDE = {"intermediate_size": 1024}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8}
BOTH, LINEAR = ("linear", "cubic"), ("linear",)


@pytest.mark.parametrize(
    ("family", "kind", "fields", "overrides", "ramps"),
    [
        ("llama", "mlp", {"ratio": 0.45}, {"intermediate_size": 352}, LINEAR),
        ("llama", "mlp", {"ratio": 0.3, "multiple_of": 1}, {"intermediate_size": 352}, BOTH),
        ("llama", "mlp", {"ratio": 0.3, "multiple_of": 8, "allocation": "sensitivity"}, WIDE, BOTH),
        ("llama", "heads", {"ratio": 0.5}, HEADS, LINEAR),
        (
            "llama",
            "heads",
            {"ratio": 0.7, "unit": "query"},
            {"num_attention_heads": 16, "head_dim": 4},
            LINEAR,
        ),
        ("gpt2", "heads", {"ratio": 0.75}, {}, LINEAR),
        ("t5", "mlp", {"ratio": 0.3, "multiple_of": 2}, {}, BOTH),
        ("mixtral", "experts", {"ratio": 0.5}, {"num_local_experts": 8}, LINEAR),
        ("qwen3_moe", "mlp", {"ratio": 0.25, "multiple_of": 8}, {"moe_intermediate_size": 96}, LINEAR),
    ],
)
@pytest.mark.parametrize("rounds", [2, 3])
def test_rounds_end_at_the_sizes_of_one(
    family: str,
    kind: str,
    fields: dict[str, Any],
    overrides: dict[str, Any],
    ramps: tuple[str, ...],
    rounds: int,
) -> None:
    before = outlook(family, **overrides)
    once = build_step(kind, fields)
    whole = before.after(once.planned_edits(before.anatomy))
    for ramp in ramps:
        now, seen = before, [before.parameters]
        for step in rounds_of(kind, {**fields, "rounds": rounds, "ramp": ramp}, before):
            step.check(now.anatomy)
            now = now.after(step.planned_edits(now.anatomy))
            seen.append(now.parameters)
        assert shapes(now) == shapes(whole)
        assert len(set(seen)) == rounds + 1 and seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("criterion", ["obs", "taylor"])
def test_a_structured_run_in_rounds(criterion: str, folders: dict[str, Path], tmp_path: Path) -> None:
    fields = {"ratio": 0.5, "multiple_of": 16, "criterion": criterion}
    result = compress(
        str(folders["llama"]), [build_step("mlp", {**fields, "rounds": 3})], tmp_path / "out", **QUICK
    )
    report = result.report
    assert report["verification"]["ok"]
    model = llmslim.load(str(result.folder))[0]
    widths = [block.mlp.width for block in Anatomy.of(model).blocks if isinstance(block.mlp, MLP)]
    assert widths == [64, 64, 64]
    assert [row["step"] for row in report["linears"]] == [0] * 3 + [1] * 3 + [2] * 3
    assert [row["total"] for row in report["linears"][::3]] == [128, 112, 80]
    assert [row["kept"] for row in report["linears"][::3]] == [112, 80, 64]
    assert len(report["recipe"]["steps"]) == 3 and report["plan"]["chosen"][0].startswith(
        "mlp with rounds 3: ratio"
    )
    Recipe.parse(report["recipe"])
    assert report["plan"]["chosen"][0] in (result.folder / "README.md").read_text()


def test_several_looks_choose_otherwise_than_one(folders: dict[str, Path], tmp_path: Path) -> None:
    kept = []
    for rounds in (1, 4):
        step = build_step("mlp", {"ratio": 0.5, "multiple_of": 1, "criterion": "output", "rounds": rounds})
        result = compress(str(folders["llama"]), [step], tmp_path / str(rounds), **QUICK)
        kept.append([row["units"] for row in result.report["linears"] if row["kept"] == 64])
    assert kept[0] != kept[1]


def masks(folder: Path) -> dict[str, Tensor]:
    model = llmslim.load(str(folder))[0]
    return {name: m.mask for name, m in model.named_modules() if isinstance(m, SparseLinear)}


@pytest.mark.parametrize(
    ("family", "kind", "fields"),
    [
        ("llama", "sparsegpt", {}),
        ("llama", "magnitude", {"threshold": "global"}),
        ("llama", "wanda", {"layer_sparsity": "owl"}),
        ("gpt2", "wanda", {"ramp": "cubic"}),
        ("mixtral", "sparsegpt", {}),
        ("mixtral", "random", {}),
    ],
)
def test_masks_are_nested(
    family: str, kind: str, fields: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Each round runs on what the last one saved, so that the rounds by hand give the same bytes."""
    asked = build_step(kind, {"sparsity": 0.6, "rounds": 3, **fields})
    result = compress(str(folders[family]), [asked], tmp_path / "out", **QUICK)
    source, before = folders[family], None
    for number, record in enumerate(result.report["recipe"]["steps"]):
        step = build_step(kind, record[kind])
        source = compress(str(source), [step], tmp_path / str(number), **QUICK).folder
        now = masks(source)
        sparsity = 1 - float(sum(int(m.sum()) for m in now.values()) / sum(m.numel() for m in now.values()))
        assert sparsity == pytest.approx(record[kind]["sparsity"], abs=0.01)
        if before is not None:
            assert all(not bool((now[name] & ~mask).any()) for name, mask in before.items())
        before = now
    files = [folder / "model.safetensors" for folder in (result.folder, source)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsegpt_leaves_zeros_zero(pattern: Any) -> None:
    """Error feedback reaches them, is passed on, and does not bring them back."""
    weight, inputs = problem(rows=16, width=160)
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3] = 0
    solved = factor((inputs.T @ inputs).double(), 0.01, act_order=False)
    pruned, mask = sparsegpt(weight.double(), solved, 0.5, pattern)
    assert not bool((mask & (weight == 0)).any()) and bool((pruned[weight == 0] == 0).all())
    if pattern == "unstructured":
        assert int(mask.sum()) == weight.numel() // 2


def test_zeros_go_first_by_every_criterion() -> None:
    weight, inputs = problem(rows=16, width=64)
    inputs[:, :8] = 0  # live weights that score nothing, too
    weight[:, 20:40] = 0
    for kind in ("magnitude", "wanda", "random", "sparsegpt"):
        step: Any = build_step(kind, {"sparsity": 0.4})
        _, sparse = step.compress_linear("x", weight, stats_of(inputs), StepRecord())
        assert not bool(sparse.mask[:, 20:40].any())
        assert sparse.nonzeros == pytest.approx(0.6 * weight.numel(), abs=16)


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["mlp", "sparsegpt"])
def test_a_stopped_run_goes_on(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    passes = 0

    def stop(what: str, done: int, total: int) -> None:
        nonlocal passes
        passes += what == kind and done == 0
        if passes == 2 and what == kind and done == 1:
            raise Stop

    fields = {"ratio": 0.5, "multiple_of": 16} if kind == "mlp" else {}
    step = build_step(kind, {"rounds": 2, **fields})
    whole = compress(str(folders["llama"]), [step], tmp_path / "whole", **QUICK)
    with pytest.raises(Stop):
        compress(str(folders["llama"]), [step], tmp_path / "out", progress=stop, **QUICK)
    resumed = compress(str(folders["llama"]), [step], tmp_path / "out", **QUICK)
    assert resumed.report["run"]["resumed"]
    files = [result.folder / "model.safetensors" for result in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_target_in_rounds_meets_it() -> None:
    before = outlook("llama")
    steps, told = build_step("mlp", {"target_params": 0.75, "multiple_of": 8, "rounds": 2}).resolve(before)
    now = before
    for step in steps:
        now = now.after(step.planned_edits(now.anatomy))
    assert len(steps) == 2 and now.share <= 0.75 < now.share + 3 * 3 * 64 * 8 / before.parameters
    assert told.startswith("mlp with target_params 0.75 and rounds 2: ratio ") and ", then " in told


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("mlp", {"rounds": 0}, "greater than or equal to 1"),
        ("mlp", {"ramp": "cubic"}, "ramp cubic is for several rounds"),
        ("wanda", {"rounds": 2, "pattern": "2:4"}, "rounds 2 needs pattern unstructured"),
    ],
)
def test_contradictions_are_refused(kind: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_step(kind, fields)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (build_step("mlp", {"rounds": 2}), "round 2 comes to ratio 0.25, which is no further unit"),
        (build_step("heads", {"ratio": 0.5, "rounds": 3}), "rounds 3 are too many for heads with ratio 0.5"),
        (build_step("mlp", {"rounds": 5, "ratio": 0.5, "ramp": "cubic"}), "use fewer rounds"),
    ],
)
def test_more_rounds_than_units_are_refused(
    step: Step, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        compress(str(folders["llama"]), [step], tmp_path / "out", **QUICK)
    assert not list(tmp_path.iterdir())
