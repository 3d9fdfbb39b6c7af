"""Pruning that trains between its rounds, and lottery tickets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmslim.anatomy.parts import dense_weight
from llmslim.checkpoint.load import load_model
from llmslim.errors import UserError
from llmslim.evaluation.glue import evaluate_glue
from llmslim.evaluation.run import evaluate
from llmslim.loaders.models import find
from llmslim.pipeline import compress
from llmslim.pruning.rewind import Rewind
from llmslim.pruning.weights import Magnitude
from llmslim.recipe import Calibration, Recipe
from llmslim.recovery.full import Full
from llmslim.sparse import SparseLinear
from llmslim.step import build_step
from tests.checkpoints import outlook
from tests.glue_data import write_glue
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")

QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=8, seq_len=32), "evaluation": None}
TRAIN: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "lr": 1e-3, "objective": "next_token"}


def whole(folder: Path) -> Any:
    return load_model(find(str(folder)), torch.float32, "cpu")


def test_each_round_is_followed_by_its_training() -> None:
    step = build_step("magnitude", {"sparsity": 0.6, "rounds": 2, "retrain": {"full": TRAIN}, "rewind": True})
    steps, told = step.resolve(outlook("llama"))
    assert [one.kind for one in steps] == ["full"] + ["magnitude", "rewind", "full"] * 2
    assert [one.sparsity for one in steps[1::3]] == [0.3, 0.6]  # type: ignore[attr-defined]
    assert all(one.max_steps == 6 for one in steps[::3])  # type: ignore[attr-defined]
    assert "full, then sparsity 0.3 and rewind and full, then 0.6 and rewind and full" in told
    assert all(not one.retrain and not one.rewind for one in steps[1::3])  # type: ignore[attr-defined]
    once, _ = build_step("mlp", {"ratio": 0.5, "retrain": {"full": TRAIN}}).resolve(outlook("llama"))
    assert [one.kind for one in once] == ["mlp", "full"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_rewound_model_has_the_first_weights_where_it_is_not_pruned(family: str, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base")
    trained = Full(**TRAIN)
    compress(str(base), [trained, Magnitude(sparsity=0.5), Rewind()], tmp_path / "out", **QUICK)
    before, after = whole(base), whole(tmp_path / "out")
    sparse = {name: m for name, m in after.named_modules() if isinstance(m, SparseLinear)}
    assert sparse
    for name, module in sparse.items():
        first = dense_weight(before.get_submodule(name))
        assert torch.equal(module.weight, first * module.mask)
        assert 0.4 < module.mask.float().mean() < 0.6
    first_ones = before.state_dict()
    for name, parameter in after.named_parameters():
        if name.rpartition(".")[0] not in sparse:
            assert torch.equal(parameter, first_ones[name]), name


def test_its_training_reads_the_text() -> None:
    """Which may be chosen, where the pruning itself looks at none."""
    plain, trained = (Magnitude(sparsity=0.5, retrain=then) for then in ({}, {"full": TRAIN}))
    assert [Recipe(steps=(step,)).reads_text for step in (plain, trained)] == [False, True]


def test_training_between_rounds_wins_back_what_they_take(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    fields: dict[str, Any] = {"sparsity": 0.7, "rounds": 2, "ramp": "cubic"}
    train = {**TRAIN, "max_steps": 20, "objective": "distill"}
    apart: dict[str, float] = {}
    for name, more in {"plain": {}, "retrained": {"retrain": {"full": train}}}.items():
        compress(str(base), [Magnitude(**fields, **more)], tmp_path / name, **QUICK)
        apart[name] = evaluate(str(tmp_path / name), "builtin", base=str(base), seq_len=32, windows=4)["kl"]
        weights = [m.weight for m in whole(tmp_path / name).modules() if isinstance(m, SparseLinear)]
        assert sum(int((w == 0).sum()) for w in weights) >= 0.69 * sum(w.numel() for w in weights)
    assert apart["retrained"] < 0.9 * apart["plain"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"retrain": {"rtn": {}}}, "rtn does not train; take full, lora, response, finetune"),
        ({"retrain": {"merge": {}}}, "merge does not train"),
        ({"retrain": {"ful": {}}}, "did you mean 'full'"),
        ({"retrain": {"full": {"max_step": 3}}}, "did you mean 'max_steps'"),
        ({"retrain": {"full": {}, "lora": {}}}, "two trainings"),
        ({"rewind": True}, "set retrain"),
        ({"rewind": True, "retrain": {"full": {}}}, "a model learns nothing from itself: let retrain"),
    ],
)
def test_bad_input_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_step("magnitude", fields)


def test_a_ticket_is_drawn_after_training(tmp_path: Path) -> None:
    """Which weights stay is judged by the trained model, not by the one that is gone back to."""
    base = save_tiny("llama", tmp_path / "base")
    hard = {**TRAIN, "lr": 2e-2, "max_steps": 10}
    rewound = Magnitude(sparsity=0.5, rewind=True, retrain={"full": hard})
    compress(str(base), [rewound], tmp_path / "ticket", **QUICK)
    compress(str(base), [Full(**hard), Magnitude(sparsity=0.5)], tmp_path / "trained", **QUICK)
    compress(str(base), [Magnitude(sparsity=0.5)], tmp_path / "untrained", **QUICK)
    masks = {
        name: torch.cat(
            [m.mask.flatten() for m in whole(tmp_path / name).modules() if isinstance(m, SparseLinear)]
        )
        for name in ("ticket", "trained", "untrained")
    }
    assert torch.equal(masks["ticket"], masks["trained"])
    assert not torch.equal(masks["ticket"], masks["untrained"])


def test_what_cannot_be_put_back_is_refused_before_a_step_runs(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    narrowed = build_step("mlp", {"ratio": 0.5, "multiple_of": 8})
    for steps, said in (
        ([narrowed, Rewind()], "only models of the same shape"),
        ([Full(**TRAIN), Rewind(source=str(tmp_path / "bas"))], "No model at"),
        ([Rewind()], "back to itself: name the earlier model with --source"),
    ):
        with pytest.raises(UserError, match=said):
            compress(str(base), steps, tmp_path / "out", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How a classifier is trained, on a toy task."""
    data = write_glue(tmp_path_factory.mktemp("data"), ["sst2"], train=128)
    return {"glue": "sst2", "data": str(data), "lr": 5e-3, "epochs": 4, "batch_size": 16}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_learns_its_task_between_rounds(
    family: str, task: dict[str, Any], tmp_path: Path
) -> None:
    base = save_tiny(family, tmp_path / "base")  # without a head, which the retraining asks for
    step = Magnitude(sparsity=0.6, rounds=2, retrain={"finetune": task})
    asked = {**QUICK, "evaluation": {"speed": False}}
    result = compress(str(base), [step], tmp_path / "out", **asked)
    weights = [m for m in whole(tmp_path / "out").modules() if isinstance(m, SparseLinear)]
    assert weights and all(int((m.weight != 0).sum()) <= m.nonzeros for m in weights)
    assert sum(int((m.weight == 0).sum()) for m in weights) >= 0.59 * sum(m.weight.numel() for m in weights)
    found = evaluate_glue(str(tmp_path / "out"), ["sst2"], data=task["data"])["tasks"]["sst2"]
    assert found["score"] > 0.9
    told = result.report["glue"]["tasks"]["sst2"]
    assert told["score"] == found["score"] and "base" not in told["metrics"]["accuracy"]  # its head is fresh


def test_a_ticket_of_a_classifier_is_its_first_weights_trained_again(
    task: dict[str, Any], tmp_path: Path
) -> None:
    base, task = save_tiny("bert", tmp_path / "base"), {**task, "max_steps": 4}
    ticket = Magnitude(sparsity=0.5, rounds=2, rewind=True, retrain={"finetune": task})
    compress(str(base), [ticket], tmp_path / "ticket", **QUICK)
    still = {**task, "lr": 1e-12, "max_steps": 1}  # what the last training starts from
    once = [*ticket.resolve(outlook("bert"))[0][:-1], build_step("finetune", still)]
    compress(str(base), once, tmp_path / "start", **QUICK)
    before, start, after = (whole(tmp_path / name) for name in ("base", "start", "ticket"))
    sparse = {name: m for name, m in after.named_modules() if isinstance(m, SparseLinear)}
    assert sparse
    for name, module in sparse.items():
        beginning, mask = start.get_submodule(name), module.mask
        first = before.get_submodule(name).weight
        assert torch.equal(mask, beginning.mask) and 0.4 < mask.float().mean() < 0.6
        torch.testing.assert_close(beginning.weight, first * mask)
        assert not module.weight[~mask].any() and not torch.allclose(module.weight, beginning.weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"glue": "sst3"}, "Unknown GLUE task 'sst3'"),
        ({"data": "nowhere"}, "No GLUE data for sst2"),
        ({"epoch": 3}, "did you mean 'epochs'"),
    ],
)
def test_a_retraining_that_cannot_be_is_refused_before_a_step_runs(
    change: dict[str, Any], said: str, task: dict[str, Any], tmp_path: Path
) -> None:
    base = save_tiny("bert", tmp_path / "base")
    with pytest.raises(UserError, match=said):
        step = build_step("mlp", {"ratio": 0.5, "retrain": {"finetune": {**task, **change}}})
        compress(str(base), [step], tmp_path / "out", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
