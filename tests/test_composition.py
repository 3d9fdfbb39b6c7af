"""Recipes of several steps: what may follow what, one recipe against the steps by hand, and what each step left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llmslim
from llmslim import measure
from llmslim.checkpoint.reader import CheckpointReader
from llmslim.errors import UserError
from llmslim.pipeline import compress
from llmslim.prepare import prepare
from llmslim.recipe import Evaluation, Recipe
from tests.tiny import example_inputs, save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")

PRUNE: dict[str, Any] = {"mlp": {"ratio": 0.25, "multiple_of": 32}}
FOUR_BIT: dict[str, Any] = {"gptq": {"bits": 4, "group_size": 32}}
EIGHT_BIT: dict[str, Any] = {"rtn": {"bits": 8, "group_size": 32}}
QUICK: dict[str, Any] = {"calibration": {"num_samples": 4, "seq_len": 32}, "evaluation": None}
MEASURED: dict[str, Any] = {
    **QUICK,
    "evaluation": {"windows": 2, "seq_len": 32, "speed": False, "steps": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in ("llama", "bert")}


def recipe(*steps: dict[str, Any], **fields: Any) -> Recipe:
    return Recipe.parse({"steps": list(steps), **QUICK, **fields})


def stored(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("model.safetensors", "config.json")]


# --- what cannot follow what --------------------------------------------------------------------------------

AFTER_PACKING: dict[str, dict[str, Any]] = {
    "mlp": {"ratio": 0.25},
    "heads": {"ratio": 0.5, "unit": "group"},
    "width": {"ratio": 0.25},
    "sparsegpt": {},
    "wanda": {},
    "magnitude": {},
    "gptq": {"group_size": 32},
    "rtn": {"group_size": 32},
}


@pytest.mark.parametrize("packing", [FOUR_BIT, EIGHT_BIT], ids=lambda step: next(iter(step)))
@pytest.mark.parametrize("kind", AFTER_PACKING)
def test_what_needs_dense_weights_is_refused_after_quantizing(
    kind: str,
    packing: dict[str, Any],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fill(*args: Any, **options: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(CheckpointReader, "fill", fill)
    with pytest.raises(UserError) as refused:
        compress(str(folders["llama"]), recipe(packing, {kind: AFTER_PACKING[kind]}), tmp_path / "out")
    assert "quantized" in str(refused.value)
    assert str(refused.value).count("\n") == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([PRUNE, {"gtpq": {}}], "Unknown step 'gtpq' (did you mean 'gptq'?"),
        ([PRUNE, {"gptq": {"bit": 4}}], "Unknown option 'bit' for gptq (did you mean 'bits'?"),
        ([PRUNE, {"gptq": {"bits": 9}}], "gptq: bits = 9"),
        ([PRUNE, {**FOUR_BIT, **EIGHT_BIT}], "A step of a recipe is one name"),
        ([PRUNE, 4], "A step of a recipe is one name"),
    ],
)
def test_a_recipe_that_is_none_is_refused_when_read(steps: list[Any], said: str) -> None:
    with pytest.raises(UserError) as refused:
        recipe(*steps)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_later_step_is_checked_on_what_the_earlier_ones_leave(folders: dict[str, Path]) -> None:
    """96 channels are left of 128: groups of 64 fit before, and not behind; nothing is read to see it."""
    groups = {"gptq": {"bits": 4, "group_size": 64}}
    prepare(str(folders["llama"]), recipe(groups))
    with pytest.raises(UserError, match="group_size 64 does not divide the 96 inputs"):
        prepare(str(folders["llama"]), recipe(PRUNE, groups))


# --- one recipe, the steps by hand --------------------------------------------------------------------------


def test_one_recipe_equals_its_steps_run_by_hand(folders: dict[str, Path], tmp_path: Path) -> None:
    """Prune 20% of the channels, then 4 bits; what the first run leaves is an input of the second like any."""
    fifth = {"mlp": {"ratio": 0.2, "multiple_of": 8}}
    quantize = {"gptq": {"bits": 4, "group_size": 8, "symmetric": False}}
    both = compress(str(folders["llama"]), recipe(fifth, quantize), tmp_path / "both")
    pruned = compress(str(folders["llama"]), recipe(fifth), tmp_path / "pruned")
    by_hand = compress(str(pruned.folder), recipe(quantize), tmp_path / "by-hand")
    assert pruned.report["format"] == "plain"
    assert stored(both.folder) == stored(by_hand.folder)
    model, _ = llmslim.load(str(by_hand.folder), dtype=torch.float32)
    again, _ = llmslim.load(str(both.folder), dtype=torch.float32)
    assert model.config.intermediate_size == 104
    with torch.no_grad():
        assert torch.equal(*(one(**example_inputs(one)).logits for one in (model, again)))


def test_a_packed_folder_says_that_it_cannot_be_pruned(folders: dict[str, Path], tmp_path: Path) -> None:
    packed = compress(str(folders["llama"]), recipe(EIGHT_BIT), tmp_path / "packed")
    for step in (PRUNE, {"magnitude": {}}, {"width": {"ratio": 0.25}}):
        with pytest.raises(UserError, match=r"quantized.*prune before"):
            prepare(str(packed.folder), recipe(step))


# --- what each step left ------------------------------------------------------------------------------------


def test_each_step_is_measured_as_a_run_of_its_own_would_be(folders: dict[str, Path], tmp_path: Path) -> None:
    both = compress(str(folders["llama"]), recipe(PRUNE, FOUR_BIT, **MEASURED), tmp_path / "both")
    pruned = compress(str(folders["llama"]), recipe(PRUNE, **MEASURED), tmp_path / "pruned")
    steps, (alone,) = both.report["steps"], pruned.report["steps"]
    assert [row["step"] for row in steps] == ["mlp", "gptq"]
    assert steps[0] == alone == {"step": "mlp", **_of_result(pruned.report)}
    assert steps[1] == {"step": "gptq", **_of_result(both.report)}
    assert steps[0]["size"]["bytes_on_disk"] > steps[1]["size"]["bytes_on_disk"]
    assert steps[0]["quality"]["kl"]["value"] > 0 and steps[0]["quality"]["perplexity"]["stderr"] > 0
    assert "| 1. mlp |" in (both.folder / "README.md").read_text()
    assert (both.folder / "steps.svg").read_text().startswith("<?xml")


def _of_result(report: dict[str, Any]) -> dict[str, Any]:
    return {"size": report["size"]["result"], "quality": report["quality"]}


def test_rounds_are_steps(folders: dict[str, Path], tmp_path: Path) -> None:
    rounds = {"magnitude": {"sparsity": 0.5, "rounds": 2}}
    made = compress(str(folders["llama"]), recipe(rounds, **MEASURED), tmp_path / "out")
    first, second = made.report["steps"]
    assert first["step"] == second["step"] == "magnitude"
    assert first["quality"]["kl"]["value"] < second["quality"]["kl"]["value"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("stopped_at", [1, 2, 3])
def test_a_run_stopped_while_it_measures_goes_on_to_the_same_report(
    stopped_at: int, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(files: Any, *args: Any, **options: Any) -> Any:
        calls.append(files.folder.name)
        return original(files, *args, **options)

    original = measure.streamed_windows
    monkeypatch.setattr(measure, "streamed_windows", counted)
    asked = recipe(PRUNE, {"magnitude": {"sparsity": 0.3}}, EIGHT_BIT, **MEASURED)
    whole = compress(str(folders["llama"]), asked, tmp_path / "whole")
    assert calls == [".step-0", ".step-1", "whole.partial"]
    calls.clear()

    def progress(what: str, done: int, total: int) -> None:
        if what == "evaluate" and len(calls) == stopped_at:
            raise Stop

    with pytest.raises(Stop):
        compress(str(folders["llama"]), asked, tmp_path / "out", progress=progress)
    resumed = compress(str(folders["llama"]), asked, tmp_path / "out")
    assert resumed.report["run"]["resumed"]
    assert len(calls) == 4  # only what was stopped is measured anew
    for key in ("steps", "quality", "size", "notes", "linears"):
        assert resumed.report[key] == whole.report[key]
    assert json.loads((resumed.folder / "report.json").read_text())["steps"] == whole.report["steps"]
    assert (resumed.folder / "steps.svg").read_text() == (whole.folder / "steps.svg").read_text()


def test_steps_of_an_encoder_have_sizes_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    made = compress(str(folders["bert"]), recipe(PRUNE, EIGHT_BIT, **MEASURED), tmp_path / "out")
    for row in made.report["steps"]:
        assert "is an encoder" in row["quality"]["skipped"] and row["size"]["bytes_on_disk"] > 0
    assert "perplexity" not in (made.folder / "steps.svg").read_text()


def test_steps_are_measured_only_when_asked(folders: dict[str, Path], tmp_path: Path) -> None:
    quiet = Evaluation(windows=2, seq_len=32, speed=False)
    made = compress(str(folders["llama"]), recipe(PRUNE, EIGHT_BIT, evaluation=quiet), tmp_path / "out")
    assert made.report["steps"] is None and not (made.folder / "steps.svg").exists()
