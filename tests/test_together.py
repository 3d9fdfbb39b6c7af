"""Training in several processes: as in one with the batches joined, killed or not; errors reach the user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pydantic import ValidationError

from llmslim.distillation.features import Features
from llmslim.distillation.response import Response
from llmslim.errors import UserError
from llmslim.finetuning.finetune import Finetune
from llmslim.loaders.models import find
from llmslim.pipeline import compress
from llmslim.prepare import prepare
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Calibration, Recipe
from llmslim.recovery.full import Full
from llmslim.recovery.lora import LoRA
from llmslim.report.schema import read_report
from llmslim.sharing.share import ShareBlocks
from llmslim.together import check_processes
from tests.glue_data import write_glue
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")
QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=16, seq_len=32), "evaluation": None}
PLAIN: dict[str, Any] = {"objective": "next_token", "max_steps": 6, "lr": 1e-3, "save_steps": 2, "ema": 0.5}
TWO = Full(**PLAIN, batch_size=2, processes=2)
SHARED = TWO.model_copy(update={"shard": True})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("models") / "llama"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def both(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained in two processes; its name means something in a URL."""
    torch.set_num_threads(1)
    return compress(llama, [TWO], tmp_path_factory.mktemp("runs") / "two#?", **QUICK).folder


def test_two_processes_train_as_one_with_the_batches_joined(llama: str, both: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    compress(llama, [Full(**PLAIN, batch_size=4)], tmp_path / "one", **QUICK)
    start, one, two = (weights(folder) for folder in (find(llama).folder, tmp_path / "one", both))
    for name, value in one.items():
        moved = (value - start[name]).norm()
        assert (two[name] - value).norm() < 0.02 * moved, name
    report = read_report(both)
    (note,) = (note for note in report["notes"] if note["where"] == "full")
    assert note["what"].startswith("2 processes trained together")
    assert report["run"]["peak_memory_mb"] == note["held_mb"] < report["plan"]["peak_memory"] / 1e6


def test_a_killed_run_goes_on_to_the_same_bytes(llama: str, both: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)

    def kill(what: str, done: int, total: int, note: str = "") -> None:
        if (what, done) == ("full", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(llama, [TWO], tmp_path / "killed", progress=kill, **QUICK)
    assert not psutil.Process().children()
    report = compress(llama, [TWO], tmp_path / "killed", **QUICK).report
    assert report["run"]["resumed"]
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (both / "model.safetensors").read_bytes()


def test_classifiers_learn_from_a_teacher_with_validation_and_by_time(tmp_path: Path) -> None:
    """The teacher's words are written once, scores are of all that is held out, and all stop at the same step."""
    torch.set_num_threads(1)
    data = str(write_glue(tmp_path, ["sst2"], validation=33))
    bert = str(save_tiny("bert", tmp_path / "bert"))
    fields: dict[str, Any] = {"glue": "sst2", "data": data, "lr": 2e-3, "max_length": 32, "batch_size": 8}
    compress(bert, [Finetune(**fields, max_steps=2)], tmp_path / "teacher", evaluation=None)
    step = Finetune(
        **fields,
        teacher=str(tmp_path / "teacher"),
        hidden=0,
        attention=0,
        choose_on_validation=True,
        processes=2,
        epochs=1e6,
        max_minutes=0.08,
        save_steps=5,
    )
    result = compress(bert, [step], tmp_path / "student")
    history = [json.loads(line) for line in (result.folder / "training.jsonl").read_text().splitlines()]
    scores = [line["eval_score"] for line in history if "eval_score" in line]
    assert len(scores) > 2 and all(abs(33 * score - round(33 * score)) < 1e-6 for score in scores)
    found = result.report["glue"]["tasks"]["sst2"]["score"]
    assert found == pytest.approx(max(scores)) and len(set(scores)) > 1


def test_what_one_process_refuses_reaches_the_user(llama: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    step = Full(**{**PLAIN, "lr": 1e30}, batch_size=2, processes=2)
    with pytest.raises(UserError, match="of training step . is not finite, so training stopped"):
        compress(llama, [step], tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_more_processes_than_there_is_room_for_are_refused(llama: str) -> None:
    recipe = Recipe(steps=(LoRA(processes=4096),), calibration=QUICK["calibration"])
    with pytest.raises(UserError, match="processes 4096 is more than the .* CPU cores of this machine"):
        prepare(llama, recipe, device="cpu")
    with pytest.raises(UserError, match="take the first GPUs there are, not cuda:2"):
        check_processes([LoRA(processes=2)], torch.device("cuda", 2))
    with pytest.raises(UserError, match="work on CUDA GPUs or a CPU, not on mps"):
        check_processes([LoRA(processes=2)], torch.device("mps"))
    check_processes([LoRA()], torch.device("mps"))


def test_a_text_must_have_something_for_each_process() -> None:
    Full(batch_size=4, processes=3).check_text(9)
    with pytest.raises(UserError, match="full needs 9 windows or more to train on, and the text gives 8"):
        Full(batch_size=4, processes=3).check_text(8)


def test_plans_count_what_each_process_holds(llama: str) -> None:
    one, two = (
        prepare(llama, Recipe(steps=(step,), **QUICK), device="cpu").plan for step in (Full(**PLAIN), TWO)
    )
    assert two.peak_memory > one.peak_memory + 2 * 500e6


def alike_in_shares(model: str, before: list[Any], step: Any, place: Path) -> list[Path]:
    """What one process makes, and two that share with half of its batch each, which must be the same."""
    folders = [place / "one", place / "shares"]
    halved = {"batch_size": step.batch_size // 2, "processes": 2, "shard": True}
    for each, folder in zip((step, step.model_copy(update=halved)), folders, strict=True):
        compress(model, [*before, each], folder, **QUICK)
    one, shared = (weights(folder) for folder in folders)
    for name, value in one.items():
        assert (shared[name] - value).norm() < 1e-5 * value.norm() + 1e-6, name
    return folders


def test_shares_train_as_the_whole(llama: str, both: Path, tmp_path: Path) -> None:
    """Killed, one process's share of the last checkpoint lost, and gone on with, at that."""
    torch.set_num_threads(1)
    kept: list[str] = []

    def kill(what: str, done: int, total: int, note: str = "") -> None:
        if (what, done) == ("full", 5):
            kept.extend(sorted(f"{p.parent.name}/{p.name}" for p in tmp_path.rglob("trainer/*/checkpoint-*")))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(llama, [SHARED], tmp_path / "shared", progress=kill, **QUICK)
    assert kept == [f"{rank}/checkpoint-{step}" for rank in (0, 1) for step in (2, 4)]
    (lost,) = tmp_path.rglob("trainer/1/checkpoint-4/optimizer.pt")
    lost.unlink()
    report = compress(llama, [SHARED], tmp_path / "shared", **QUICK).report
    assert report["run"]["resumed"]
    start, whole, shared = (weights(folder) for folder in (find(llama).folder, both, tmp_path / "shared"))
    for name, value in whole.items():  # sums come in another order
        assert (shared[name] - value).norm() < 1e-3 * (value - start[name]).norm(), name


def test_shares_of_common_weights_and_of_what_is_trained_beside(llama: str, tmp_path: Path) -> None:
    """Blocks that share weights, projections to the teacher's width, and the best mean by validation."""
    torch.set_num_threads(1)
    step = Features(teacher=llama, max_steps=6, lr=1e-3, save_steps=2, validation=0.25, ema=0.3, batch_size=4)
    for folder in alike_in_shares(llama, [ShareBlocks(group_size=2)], step, tmp_path):
        notes = read_report(folder)["notes"]
        assert not any("changed nothing" in note["what"] for note in notes)


def test_shares_are_of_several(llama: str) -> None:
    with pytest.raises(ValidationError, match="shares a model among several processes, and there is 1"):
        Full(shard=True)
    plans = [prepare(llama, Recipe(steps=(s,), **QUICK), device="cpu").plan for s in (TWO, SHARED)]
    assert plans[1].peak_memory < plans[0].peak_memory


def test_shares_where_the_loss_looks_at_the_last_block_alone(tmp_path: Path) -> None:
    """MiniLM's: its output gets no gradient."""
    torch.set_num_threads(1)
    models = [str(save_tiny("llama", tmp_path / str(n), num_hidden_layers=n)) for n in (2, 3)]
    step = Response(teacher=models[1], response=0, attention=1, max_steps=2, lr=1e-3, batch_size=4)
    alike_in_shares(models[0], [], step, tmp_path)


def test_shares_of_experts_that_each_process_uses_others_of_are_refused(tmp_path: Path) -> None:
    mixtral = str(save_tiny("mixtral", tmp_path / "mixtral"))
    recipe = Recipe(steps=(RTN(bits=4, group_size=16), LoRA(processes=2, shard=True)), **QUICK)
    with pytest.raises(UserError, match="of model.layers.0's experts, which lie in Linears of their own"):
        prepare(mixtral, recipe, device="cpu")
