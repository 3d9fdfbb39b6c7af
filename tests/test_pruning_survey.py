"""Pruning that looks at the whole model first: gradients, sensitivity, outliers, one threshold for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmslim import compress
from llmslim.step import build_step
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")

QUICK = {"calibration": {"text": "builtin", "num_samples": 4, "seq_len": 32}, "evaluation": None, "seed": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {}
    for family in ("llama", "bert", "mixtral", "t5"):
        save_tiny(family, root / family)
        made[family] = root / family
    return made


@pytest.mark.parametrize("family", ["llama", "bert", "mixtral", "t5"])
@pytest.mark.parametrize(
    "kind, fields",
    [
        ("mlp", {"ratio": 0.25, "criterion": "taylor"}),
        ("heads", {"ratio": 0.5, "criterion": "taylor"}),
        ("mlp", {"ratio": 0.5, "allocation": "sensitivity", "multiple_of": 8}),
        ("magnitude", {"sparsity": 0.5, "threshold": "global"}),
        ("wanda", {"sparsity": 0.5, "layer_sparsity": "owl"}),
        ("sparsegpt", {"sparsity": 0.5, "layer_sparsity": "error"}),
        ("taylor", {"sparsity": 0.5, "threshold": "global"}),
        ("snip", {"sparsity": 0.5, "layer_sparsity": "owl"}),
        ("grasp", {"sparsity": 0.5, "threshold": "global"}),
    ],
    ids=["taylor-mlp", "taylor-heads", "sensitivity", "global", "owl", "error", "taylor", "snip", "grasp"],
)
def test_a_step_that_surveys_runs_and_verifies(
    kind: str, fields: dict, family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    report = compress(str(folders[family]), [build_step(kind, fields)], tmp_path / "out", **QUICK).report
    assert report["verification"]["ok"] and report["linears"]
    kept = sum(row["kept"] for row in report["linears"]) if kind in ("mlp", "heads") else 0
    if kept:
        assert kept < sum(row["total"] for row in report["linears"])
    else:
        assert (
            "of the weights" in (tmp_path / "out/README.md").read_text()
        )  # the card says what zeros do not gain
        shares = [row["sparsity"] for row in report["linears"]]
        assert 0.3 < sum(shares) / len(shares) < 0.7 and len({round(share, 3) for share in shares}) > 1


@pytest.mark.parametrize("criterion", ["obs", "output", "magnitude", "taylor"])
def test_sensitivity_removes_as_much_as_uniform(
    criterion: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """What a block loses is settled on the model as it was, not on what the blocks before it have become."""
    fields = {"ratio": 0.5, "criterion": criterion, "allocation": "sensitivity", "multiple_of": 1}
    report = compress(str(folders["llama"]), [build_step("mlp", fields)], tmp_path / "out", **QUICK).report
    kept = [row["kept"] for row in report["linears"]]
    assert sum(kept) == 3 * 128 // 2 and len(set(kept)) > 1
