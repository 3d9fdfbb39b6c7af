"""Targets: how much a step removes is the least that meets them, told on shapes alone and true on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmslim.anatomy import Anatomy
from llmslim.errors import UserError
from llmslim.outlook import Foresight
from llmslim.pipeline import compress
from llmslim.prepare import prepare
from llmslim.pruning.amount import Amount, parse_bytes
from llmslim.recipe import Calibration, Recipe
from llmslim.step import Step, build_step
from tests.checkpoints import outlook
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")

QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=4, seq_len=32), "evaluation": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in ("llama", "qwen2", "mixtral", "t5")}


def resolved(
    family: str, kind: str, fields: dict[str, Any], **overrides: Any
) -> tuple[Any, Foresight, Foresight]:
    """The step that runs, and the model before and after it."""
    before = outlook(family, **overrides)
    (step,), told = build_step(kind, fields).resolve(before)
    assert told.startswith(f"{kind} with target")
    step.check(before.anatomy)
    return step, before, before.after(step.planned_edits(before.anatomy))


@pytest.mark.parametrize("multiple_of", [1, 8, 32])
@pytest.mark.parametrize("target", [0.62, 0.7, 0.75, 0.9])
def test_the_least_is_removed_that_meets_a_share_of_parameters(target: float, multiple_of: int) -> None:
    """One multiple of channels more in each block would be too many."""
    fields = {"target_params": target, "multiple_of": multiple_of}
    try:
        step, before, after = resolved("llama", "mlp", fields)
    except UserError as error:
        assert multiple_of == 32 and target == 0.62 and "out of reach" in str(error)
        return
    unit = 3 * 3 * 64 * multiple_of  # in gate, up and down of three blocks
    assert after.parameters <= target * before.parameters < after.parameters + unit
    assert step.rounds == 1 and step.target_params is None


@pytest.mark.parametrize(
    ("family", "kind", "overrides"),
    [
        ("llama", "heads", {"num_attention_heads": 8, "num_key_value_heads": 8}),
        ("llama", "heads", {"num_attention_heads": 8, "num_key_value_heads": 2}),
        ("llama", "heads", {"num_attention_heads": 16, "num_key_value_heads": 4}),
        ("t5", "heads", {}),
        ("mixtral", "experts", {"num_local_experts": 8}),
        ("qwen3_moe", "experts", {"num_experts": 6}),
        ("qwen3_moe", "mlp", {"moe_intermediate_size": 96}),
    ],
)
def test_no_allowed_ratio_comes_nearer(family: str, kind: str, overrides: dict[str, Any]) -> None:
    """Of the ratios tried, those that meet the target none leaves more parameters."""
    fields = {"multiple_of": 8} if kind == "mlp" else {}
    before = outlook(family, **overrides)
    left = {}
    for ratio in (number / 24 for number in range(1, 24)):
        step = build_step(kind, {"ratio": ratio, **fields})
        assert isinstance(step, Amount)
        if step.allowed(before.anatomy):
            left[ratio] = before.after(step.planned_edits(before.anatomy)).parameters
    assert len(set(left.values())) > 1 or family == "t5"
    for goal in set(left.values()):
        share = (goal + 0.5) / before.parameters
        _, _, after = resolved(family, kind, {"target_params": share, **fields}, **overrides)
        assert after.parameters == goal


CASES = [
    ("llama", "mlp", {"multiple_of": 4}),
    ("qwen2", "heads", {"unit": "query"}),
    ("mixtral", "experts", {}),
    ("mixtral", "mlp", {"multiple_of": 8}),
    ("llama", "sparsegpt", {}),
    ("qwen2", "magnitude", {}),
    ("t5", "wanda", {}),
    ("mixtral", "random", {}),
]


@pytest.mark.parametrize(("family", "kind", "fields"), CASES)
def test_the_file_on_disk_meets_the_size_and_just_so(
    family: str, kind: str, fields: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    source = folders[family]
    whole = (source / "model.safetensors").stat().st_size
    target = f"{(0.95 if kind == 'heads' else 0.87) * whole / 1000:.3f}KB"
    result = compress(
        str(source), [build_step(kind, {"target_size": target, **fields})], tmp_path / "out", **QUICK
    )
    size = (result.folder / "model.safetensors").stat().st_size
    assert size <= parse_bytes(target) and size == result.report["plan"]["output_bytes"]
    ((name, ran),) = result.report["recipe"]["steps"][0].items()
    assert name == kind and ran["target_size"] is None
    assert result.report["plan"]["chosen"][0].startswith(f"{kind} with target_size {target}: ")
    Recipe.parse(result.report["recipe"])  # and can be repeated

    step = build_step(kind, ran)
    assert isinstance(step, Amount)
    before = prepare(str(source), Recipe(steps=(step,), **QUICK)).plan
    assert before.output_bytes == size
    model = outlook(family)
    amounts = step.amounts(model.anatomy)
    index = amounts.index(getattr(step, step.amount))
    if index:  # one step less would exceed
        less = Recipe(steps=(step.with_amount(amounts[index - 1]),), **QUICK)
        assert prepare(str(source), less).plan.output_bytes > parse_bytes(target)


def test_a_target_is_of_the_model_that_the_run_starts_from(folders: dict[str, Path]) -> None:
    steps = (
        build_step("heads", {"ratio": 0.5}),
        build_step("mlp", {"target_params": 0.75, "multiple_of": 1}),
    )
    prepared = prepare(str(folders["llama"]), Recipe(steps=steps, **QUICK))
    (told,) = prepared.plan.chosen
    assert "leaves 0.74" in told or "leaves 0.75" in told
    alone = prepare(str(folders["llama"]), Recipe(steps=steps[1:], **QUICK))
    ratios = [one.recipe.steps[-1].ratio for one in (prepared, alone)]  # type: ignore[attr-defined]
    assert ratios[0] < ratios[1]


def test_sizes_are_read() -> None:
    assert [parse_bytes(text) for text in ("150MB", "0.5 GB", "1.5kb")] == [150_000_000, 500_000_000, 1500]
    for text in ("150", "MB", "0MB", "150MiB", "-1MB"):
        with pytest.raises(ValueError, match="such as 150MB"):
            parse_bytes(text)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("mlp", {"ratio": 0.5, "target_params": 0.5}, "ratio and target_params both"),
        ("wanda", {"sparsity": 0.5, "target_size": "1MB"}, "sparsity and target_size both"),
        ("mlp", {"target_size": "1MB", "target_params": 0.5}, "target_params and target_size both"),
        ("mlp", {"target_size": 150}, "target_size = 150.*such as 150MB"),
        ("mlp", {"target_params": 1.0}, "less than 1"),
        ("mlp", {"target_params": 0.5, "allocation": "sensitivity"}, "allocation sensitivity"),
        ("wanda", {"target_size": "1MB", "layer_sparsity": "owl"}, "layer_sparsity owl"),
        ("magnitude", {"target_size": "1MB", "threshold": "global"}, "threshold global"),
        ("wanda", {"target_size": "1MB", "pattern": "2:4"}, "takes half at once"),
        ("sparsegpt", {"target_params": 0.5}, "Unknown option 'target_params'"),
    ],
)
def test_contradictions_are_refused(kind: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_step(kind, fields)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (
            build_step("mlp", {"target_params": 0.2}),
            r"leaves at least 0\.\d+ of the parameters \(ratio 0.75\)",
        ),
        (build_step("mlp", {"target_size": "1KB"}), r"leaves at least 0\.\d+ MB"),
        (build_step("wanda", {"target_size": "1KB"}), r"leaves at least 0\.\d+ MB \(sparsity 0.99"),
        (build_step("mlp", {"target_size": "1GB"}), "is met without mlp"),
        (build_step("heads", {"target_params": 0.1}), "out of reach of heads"),
        (build_step("experts", {"target_params": 0.5}), "no experts"),
    ],
)
def test_what_cannot_be_reached_is_refused_with_the_least(
    step: Step, words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        compress(str(folders["llama"]), [step], tmp_path / "out", **QUICK)
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_is_refused_for_what_it_is(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("mlp", "heads"):
        steps = [build_step("rtn", {"group_size": 16}), build_step(kind, {"target_params": 0.8})]
        with pytest.raises(UserError, match="prune before you quantize"):
            compress(str(folders["llama"]), steps, tmp_path / "out", **QUICK)


def test_the_foreseen_model_is_the_edited_one() -> None:
    before = outlook("llama")
    step = build_step("mlp", {"ratio": 0.5})
    after = before.after(step.planned_edits(before.anatomy))
    assert before.share == 1 and after.share == after.parameters / before.parameters
    assert {block.mlp.width for block in after.anatomy.blocks if block.mlp} == {64}
    assert {block.mlp.width for block in Anatomy(before.origin).blocks if block.mlp} == {128}
