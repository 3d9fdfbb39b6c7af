"""Pruning that trains between its rounds, and lottery tickets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmslim.anatomy.parts import dense_weight
from llmslim.checkpoint.load import load_model
from llmslim.errors import UserError
from llmslim.evaluation.run import evaluate
from llmslim.loaders.models import find
from llmslim.pipeline import compress
from llmslim.pruning.rewind import Rewind
from llmslim.pruning.weights import Magnitude
from llmslim.recipe import Calibration
from llmslim.recovery.full import Full
from llmslim.sparse import SparseLinear
from llmslim.step import build_step
from tests.checkpoints import outlook
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
        ({"retrain": {"rtn": {}}}, "does not train"),
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
