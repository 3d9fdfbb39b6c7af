"""Which model is the uncompressed one, by what reports tell of where a model comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmslim.errors import UserError
from llmslim.lineage import uncompressed
from llmslim.loaders.models import find
from llmslim.pipeline import compress
from llmslim.pruning.weights import Magnitude
from llmslim.recipe import Calibration
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")
RTN, FULL, FINETUNE = {"rtn": {"bits": 4}}, {"full": {}}, {"finetune": {"glue": "sst2"}}


def made(folder: Path, base: Path | str, *steps: dict[str, Any]) -> Path:
    """A model that says that it was made so."""
    save_tiny("llama", folder)
    report = {"base": {"spec": str(base), "revision": None}, "recipe": {"steps": list(steps)}}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def teacher(folder: Path) -> Path:
    return uncompressed(find(str(folder))).folder


def test_the_teacher_is_the_last_model_that_nothing_has_compressed(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    assert teacher(base) == base
    pruned = made(tmp_path / "pruned", base, {"mlp": {"ratio": 0.2}})
    packed = made(tmp_path / "packed", pruned, RTN)
    recovered = made(tmp_path / "recovered", packed, {"scales": {}})
    again = made(tmp_path / "again", recovered, {"lora": {}})
    assert {teacher(model) for model in (pruned, packed, recovered, again)} == {base}
    classifier = made(tmp_path / "classifier", base, FINETUNE)
    assert teacher(classifier) == classifier
    assert teacher(made(tmp_path / "small", classifier, {"layers": {"ratio": 0.5}}, FINETUNE)) == classifier
    assert teacher(made(tmp_path / "of-packed", packed, FULL)) == base
    unknown = made(tmp_path / "unknown", base, {"method_of_another_version": {}})
    assert teacher(unknown) == base


def test_the_folder_that_one_is_in_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders have a model of the same name; the one that it was made from teaches, or none."""
    for place in ("here", "there"):
        save_tiny("llama", tmp_path / place / "out/base")
    monkeypatch.chdir(tmp_path / "here")
    packed = tmp_path / "here/out/packed"
    text = Calibration(num_samples=1, seq_len=16)
    compress("out/base", [Magnitude()], "out/packed", calibration=text, evaluation=None)
    monkeypatch.chdir(tmp_path / "there")
    assert teacher(packed) == tmp_path / "here/out/base"
    (tmp_path / "here/out/base").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="which is not here to distill from"):
        uncompressed(find(str(packed)))


def test_a_model_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    trained = made(tmp_path / "trained", gone, FULL)
    assert teacher(trained) == trained  # as far as is known
    packed = made(tmp_path / "packed", gone, RTN)
    for model in (packed, made(tmp_path / "more", packed, FULL)):
        with pytest.raises(
            UserError, match=f"{model.name} was made from .*gone.*, which is not here to distill from"
        ):
            uncompressed(find(str(model)))


def test_a_model_that_was_written_over_itself_ends_the_line(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    made(folder, folder, RTN)
    with pytest.raises(UserError, match="not here to distill from: name it with --teacher"):
        uncompressed(find(str(folder)))
    made(folder, folder, FULL)
    assert teacher(folder) == folder


@pytest.mark.parametrize("report", ["", "[]", "{}", '{"base": {"spec": "x"}, "recipe": {"steps": [[]]}}'])
def test_a_damaged_report_tells_nothing(report: str, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    (base / "report.json").write_text(report)
    assert teacher(base) == base
