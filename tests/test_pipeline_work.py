"""The folder that a run works in: one run at a time, kills that spoil nothing, and what is never replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmslim import cli, pipeline
from llmslim.errors import UserError
from llmslim.pipeline import compress
from llmslim.prepare import prepare
from llmslim.quantization.gptq import GPTQ
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Calibration, Evaluation, Recipe
from llmslim.recovery.full import Full
from llmslim.work import WorkFolder, check_apart, check_output
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")

STEP = RTN(bits=4, group_size=32)
HOLDER = """
import sys
from pathlib import Path
from llmslim.work import WorkFolder
work = WorkFolder(Path(sys.argv[1]), {"steps": "theirs"})
work.save()
(work.path / "part-0.safetensors").write_text("theirs")
print("at work", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


def test_two_runs_do_not_work_in_one_folder(model: Path, tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdout.readline() == "at work\n"
    try:
        for overwrite in (False, True):
            with pytest.raises(UserError, match="Another llmslim is at work in .*out.partial"):
                compress(str(model), [STEP], tmp_path / "out", evaluation=None, overwrite=overwrite)
        assert (tmp_path / "out.partial/part-0.safetensors").read_text() == "theirs"
    finally:
        other.kill()
        other.communicate()
    compress(str(model), [STEP], tmp_path / "out", evaluation=None, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("at", ["clean", "moved"])
@pytest.mark.parametrize("replaces", [False, True])
def test_a_run_killed_while_it_publishes_has_only_that_to_do(
    at: str, replaces: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"evaluation": None, "overwrite": replaces}
    whole = compress(str(model), [STEP], tmp_path / "whole", **options)
    if replaces:
        compress(str(model), [RTN(bits=8, group_size=32)], tmp_path / "out", **options)
    replace = os.replace

    def dying(source: Any, target: Any) -> None:
        if Path(target) == tmp_path / "out":
            if at == "moved":
                replace(source, target)
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("llmslim.work.os.replace", dying)
        compress(str(model), [STEP], tmp_path / "out", **options)
    monkeypatch.setattr(pipeline, "run_steps", lambda *given: pytest.fail("ran again"))
    if at == "clean":
        result = compress(str(model), [STEP], tmp_path / "out", **options)
        assert result.report["verification"]["ok"]
    elif not replaces:
        with pytest.raises(UserError, match="exists"):
            compress(str(model), [STEP], tmp_path / "out", **options)
    else:
        check_output(tmp_path / "out", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in whole.folder.iterdir()
    }
    made = (tmp_path / "out/model.safetensors").read_bytes()
    assert made == (whole.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("output", ["model", "."])
def test_the_model_that_is_read_is_never_replaced(output: str, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    model = save_tiny("llama", tmp_path / "all/model")
    (tmp_path / "all/config.json").write_text("{}")
    before = (model / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="would replace .*model, which the run reads from"):
        compress(str(model), [STEP], tmp_path / "all" / output, evaluation=None, overwrite=True)
    assert (model / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.rglob("*.partial"))


def test_nor_is_a_teacher(model: Path, tmp_path: Path) -> None:
    teacher = save_tiny("llama", tmp_path / "teacher")
    step = Full(max_steps=1, teacher=str(teacher))
    with pytest.raises(UserError, match="would replace .*teacher, which the run reads from"):
        compress(
            str(model), [step], teacher, calibration=Calibration(num_samples=2, seq_len=32), overwrite=True
        )
    assert (teacher / "model.safetensors").exists()


def test_nor_are_texts(model: Path, tmp_path: Path) -> None:
    output = save_tiny("llama", tmp_path / "out")
    for name, fields in (
        ("judge.txt", {"evaluation": Evaluation(text=str(output / "judge.txt"), windows=1, seq_len=32)}),
        (
            "learn.txt",
            {"calibration": Calibration(text=str(output / "learn.txt"), num_samples=1, seq_len=32)},
        ),
    ):
        (output / name).write_text("Words for a model to be compressed on, and some more of them. " * 40)
        with pytest.raises(UserError, match=f"would replace .*{name}, which the run reads from"):
            step = GPTQ(bits=4, group_size=32)
            compress(str(model), [step], output, **{"evaluation": None, **fields}, overwrite=True)  # type: ignore[arg-type]
        assert (output / name).exists()


def test_what_lies_beside_is_no_reason_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    check_apart(tmp_path / "model/out", [tmp_path / "model", tmp_path / "model/output/adapter.safetensors"])
    check_apart(tmp_path / "mod", [tmp_path / "model"])
    with pytest.raises(UserError, match="would replace"):
        check_apart(tmp_path / "model", [tmp_path / "model.partial/step-0"])


def test_a_state_without_work_is_discarded_unasked(tmp_path: Path) -> None:
    """A run that ended before its first pass stands in nobody's way; one that has done something does."""
    WorkFolder(tmp_path / "out", {"steps": 1}).save()
    work = WorkFolder(tmp_path / "out", {"steps": 2})
    assert not work.resumed and not work.path.exists()
    work.save()
    (work.scratch("pass-0") / "state.safetensors").write_bytes(b"work")
    with pytest.raises(UserError, match="unfinished run with another steps"):
        WorkFolder(tmp_path / "out", {"steps": 3})
    assert WorkFolder(tmp_path / "out", {"steps": 2}).resumed


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        (Evaluation(text="nosuch.txt"), "there is no file 'nosuch.txt'"),
        (Evaluation(windows=100_000, seq_len=32), "100000 were asked for"),
        (Evaluation(seq_len=10_000), r"eval_seq_len 10000 is more than the \d+ positions"),
    ],
)
def test_a_text_that_cannot_be_measured_on_is_refused_before_the_run(
    evaluation: Evaluation, words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        compress(str(model), [STEP], tmp_path / "out", evaluation=evaluation)
    assert not list(tmp_path.iterdir())


def test_an_encoder_is_not_asked_for_positions_of_a_measurement_that_it_does_not_get(tmp_path: Path) -> None:
    model = save_tiny("bert", tmp_path / "bert")
    prepare(str(model), Recipe(steps=(STEP,), evaluation=Evaluation(seq_len=10_000)))


def test_positions_are_counted_as_roberta_counts_them(tmp_path: Path) -> None:
    model = save_tiny("roberta", tmp_path / "roberta")
    stored = json.loads((model / "config.json").read_text())
    usable = stored["max_position_embeddings"] - stored["pad_token_id"] - 1
    step = Full(max_steps=1, objective="masked_token")
    for length, fits in ((usable, True), (usable + 1, False)):
        recipe = Recipe(
            steps=(step,), calibration=Calibration(num_samples=2, seq_len=length), evaluation=None
        )
        if fits:
            prepare(str(model), recipe)
            continue
        with pytest.raises(UserError, match=f"more than the {usable} positions"):
            prepare(str(model), recipe)


def test_other_measurements_are_no_other_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ran out of memory in its measurements goes on without them, at its steps' end."""
    first = Evaluation(windows=2, seq_len=32, speed=False)

    def fails(*given: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("llmslim.measure._quality", fails)
        compress(str(model), [STEP], tmp_path / "out", evaluation=first)
    monkeypatch.setattr(pipeline, "run_step", lambda *given: pytest.fail("ran again"))
    again = Evaluation(windows=3, seq_len=32, speed=False)
    result = compress(str(model), [STEP], tmp_path / "out", evaluation=again)
    assert result.report["run"]["resumed"] and result.report["quality"]["perplexity"]["windows"] == 3


def test_figures_of_other_measurements_are_not_taken_for_these(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*given: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("llmslim.measure._speed", stops)
        compress(str(model), [STEP], tmp_path / "out", evaluation=Evaluation(windows=2, seq_len=32))
    asked = Evaluation(windows=3, seq_len=32, speed=False)
    result = compress(str(model), [STEP], tmp_path / "out", evaluation=asked)
    assert result.report["quality"]["perplexity"]["windows"] == 3


def test_a_run_goes_on_in_the_type_that_it_began_in(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is chosen by a measurement, and half a run in each would be neither."""
    tensors = load_file(model / "model.safetensors")
    half = save_tiny("llama", tmp_path / "half")
    save_file({name: one.bfloat16() for name, one in tensors.items()}, half / "model.safetensors")
    stored = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**stored, "dtype": "bfloat16"}))

    text = Calibration(num_samples=4, seq_len=32)

    def run(fast: bool, name: str = "out") -> Any:
        monkeypatch.setattr("llmslim.loaders.models.fast_bfloat16", lambda: fast)
        step = GPTQ(bits=4, group_size=32)
        return compress(str(half), [step], tmp_path / name, calibration=text, evaluation=None)

    def stops(*given: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pipeline.CheckpointWriter, "finish", stops)
        run(fast=True)
    result = run(fast=False)
    assert result.report["run"]["resumed"] and result.report["environment"]["compute_dtype"] == "bfloat16"
    whole = run(fast=True, name="whole")
    found = [(one.folder / "model.safetensors").read_bytes() for one in (result, whole)]
    assert found[0] == found[1]


def test_metadata_is_what_the_model_needs_and_no_secret_of_the_folder(model: Path, tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "model")
    for name in ("client_secret.json", "notes.txt", "corpus.txt", "trainer_state.json"):
        (source / name).write_text("{}")
    (source / "LICENSE").write_text("free")
    made = compress(str(source), [STEP], tmp_path / "out", evaluation=None).folder
    names = {path.name for path in made.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "LICENSE"} <= names
    assert not names & {"client_secret.json", "notes.txt", "corpus.txt", "trainer_state.json"}
    assert set(json.loads((made / "report.json").read_text())["files"]) <= names


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("steps: [{4: {bits: 4}}]", []),
        ("steps: [rtn]\n1: 2", []),
        ("steps: [{rtn: {1: 2}}]", []),
        ("steps: [rtn]", ["steps=null", "rtn.bits=3"]),
        (b"steps: [rtn] # \xff", []),
    ],
)
def test_recipes_that_are_none_end_in_a_sentence(
    recipe: str | bytes, overrides: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    assert cli.main(["compress", str(model), str(path), *overrides, "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "Traceback" not in told and len(told.splitlines()) == 1


@pytest.mark.parametrize("named", ["pipeline", "AutoModel"])
def test_a_config_that_names_no_model_class_is_read_by_its_type(named: Any, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    stored = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**stored, "architectures": [named]}))
    made = compress(str(model), [STEP], tmp_path / "out", evaluation=None)
    assert torch.isfinite(load_file(made.folder / "model.safetensors")["lm_head.weight"]).all()


def test_a_name_that_is_too_long_is_no_output(tmp_path: Path) -> None:
    """Beside it stands the folder that it is made in, whose name is longer."""
    check_output(tmp_path / ("a" * 200), overwrite=False)
    with pytest.raises(UserError, match="aaa cannot be made: File name too long; name another one"):
        check_output(tmp_path / ("a" * 250), overwrite=False)


def test_a_link_is_no_output(tmp_path: Path) -> None:
    """What is renamed to its name would take its place, not that of the folder it leads to."""
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(UserError, match="is a link: name the folder .*folder itself"):
        check_output(tmp_path / "link", overwrite=True)
