"""What the plan counts: experts, a model that has to be loaded whole, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmslim import plan as planning
from llmslim.anatomy import Anatomy
from llmslim.checkpoint.reader import CheckpointReader
from llmslim.edit import replay
from llmslim.factorization.factorizer import _columns
from llmslim.factorization.svd import SVD
from llmslim.loaders.models import find
from llmslim.prepare import prepare
from llmslim.pruning.experts import PruneExperts
from llmslim.quantization.gptq import GPTQ
from llmslim.quantization.grid import Scheme, round_to_nearest
from llmslim.quantization.quantizer import round_table
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Calibration, Recipe
from llmslim.step import Step
from tests.tiny import meta_model, save_tiny

QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=4, seq_len=32), "evaluation": None}


@pytest.fixture(autouse=True)
def _same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "resident_bytes", lambda: 0)
    monkeypatch.setattr(planning, "_flops_per_second", lambda device, dtype: 1e9)


def planned(folder: Path, step: Step) -> planning.Plan:
    return prepare(str(folder), Recipe(steps=(step,), **QUICK)).plan


@pytest.mark.parametrize("step", [RTN(group_size=32), GPTQ(group_size=32), PruneExperts(ratio=0.5)])
def test_the_plan_counts_experts(tmp_path: Path, step: Step) -> None:
    """Their files need conversion, so the whole model is in memory: each expert as often as it is stored."""
    few, many = (save_tiny("mixtral", tmp_path / str(n), num_local_experts=n) for n in (4, 16))
    small, large = planned(few, step), planned(many, step)
    more = 3 * 12 * 3 * 64 * 64  # blocks, experts, gate and up and down
    assert not large.streams
    assert large.peak_memory - small.peak_memory >= 4 * more
    assert large.seconds > 2 * small.seconds - 1e-3


def test_a_token_passes_top_k_experts_of_a_mixture() -> None:
    model = meta_model("mixtral", num_local_experts=8, num_experts_per_tok=2)
    fused = Anatomy(model).blocks[0].matrices()
    assert sum(m.weights for m in fused) - 64 * (2 * 64 + 2 * 32) == 8 * 3 * 64 * 64
    assert sum(m.passed for m in fused) - 64 * (2 * 64 + 2 * 32) == 2 * 3 * 64 * 64
    replay(
        model,
        [edit for edit in RTN(group_size=32).planned_edits(Anatomy(model)) if edit.kind == "unfuse_experts"],
    )
    apart = Anatomy(model).blocks[0].matrices()
    assert len(apart) > len(fused)
    for total in ("weights", "passed"):
        assert sum(getattr(m, total) for m in apart) == sum(getattr(m, total) for m in fused)


@pytest.mark.parametrize("step", [RTN(group_size="tensor", embeddings_bits=4), SVD(embeddings_rank=16)])
def test_the_plan_counts_tables(tmp_path: Path, step: Step) -> None:
    wide = save_tiny("llama", tmp_path / "wide", vocab_size=40_000)
    plain = type(step)(**({"group_size": "tensor"} if isinstance(step, RTN) else {}))
    more = planned(wide, step).peak_memory - planned(wide, plain).peak_memory
    assert more > 40_000 * 16  # the codes and the packed table, or the columns


@pytest.mark.parametrize("group_size", ["tensor", "channel", 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_table_in_slices_is_rounded_as_the_whole(group_size: Any, symmetric: bool) -> None:
    weight = torch.randn(70, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    scheme = Scheme(bits=4, group_size=group_size, symmetric=symmetric)
    whole, slices = round_to_nearest(weight.float(), scheme), round_table(weight, scheme, rows=16)
    for name in ("codes", "scale", "zero_point"):
        a, b = getattr(whole, name), getattr(slices, name)
        assert (a is None and b is None) or torch.equal(a, b)


def test_what_the_columns_of_a_table_lose_is_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmslim.factorization.factorizer.TABLE_ROWS", 16)
    weight = torch.randn(70, 32, generator=torch.Generator().manual_seed(0))
    columns, projection, lost = _columns(weight, 8)
    best = torch.linalg.svdvals(weight.double()).square()
    told = float((weight - columns @ projection.T).square().sum() / weight.square().sum())
    assert lost == pytest.approx(told, rel=1e-4) == float(best[8:].sum() / best.sum())


def test_a_model_loaded_whole_lets_go_of_its_files(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    reader = CheckpointReader(find(str(save_tiny("mixtral", tmp_path / "mixtral"))))
    reader.fill([reader.model_skeleton()], None, torch.float32)
    assert not reader.streams
    assert str(tmp_path) not in maps.read_text()
