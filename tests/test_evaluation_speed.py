"""`llmslim benchmark`: what is noise and what is not, energy counters, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmslim.cli import main
from llmslim.commands.benchmark import benchmark_text
from llmslim.errors import UserError
from llmslim.evaluation import speed
from llmslim.evaluation.speed import (
    Settings,
    compare_speed,
    compared,
    energy,
    energy_counters,
    label,
    verdict,
)
from tests.tiny import save_tiny


def figure(*values: float) -> dict[str, Any]:
    return {"median": sorted(values)[len(values) // 2], "min": min(values), "max": max(values)}


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "noise", "better"),
    [
        ("decode_b1_p32", (10, 11, 12), (10, 11, 12), True, False),
        ("decode_b1_p32", (12, 13, 14), (9, 10, 11), True, False),  # 3 is less than both spreads together
        ("decode_b1_p32", (20, 21, 22), (9, 10, 11), False, True),
        ("load_seconds", (20, 21, 22), (9, 10, 11), False, False),
        ("first_token_ms_b1_p32", (9, 10, 11), (20, 21, 22), False, True),
        ("peak_memory_mb", (101, 101, 101), (100, 100, 100), True, False),  # 1 %
        ("bytes_on_disk", (50, 50, 50), (100, 100, 100), False, True),
    ],
)
def test_a_difference_is_real_beyond_both_spreads(
    name: str, ours: tuple[float, ...], theirs: tuple[float, ...], noise: bool, better: bool
) -> None:
    row = compared({name: figure(*ours)}, {name: figure(*theirs)}, rounds=3)[name]
    assert (row["within_noise"], row["better"]) == (noise, better)
    assert compared({name: figure(*theirs)}, {name: figure(*ours)}, rounds=3)[name]["better"] is (
        not noise and not better
    )


def test_one_round_tells_no_noise() -> None:
    rows = compared({"decode_b1_p8": figure(9)}, {"decode_b1_p8": figure(1)}, rounds=1)
    assert rows["decode_b1_p8"]["within_noise"] is None and "one round" in verdict(rows, 1)


def test_energy_is_read_and_wraps(tmp_path: Path) -> None:
    with energy(tmp_path) as nothing:
        pass
    assert nothing == [] and energy_counters(tmp_path) == []
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):  # the last is a part of the first
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("900")
        (tmp_path / name / "max_energy_range_uj").write_text("1000")
    with energy(tmp_path) as used:
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1900")
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("100")
    assert used == [pytest.approx((1000 + 200) / 1e6)]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh processes; tests/test_readme.py has them."""
    monkeypatch.setattr(
        speed, "_in_fresh_process", lambda files, settings: speed.measured(str(files.folder), settings)
    )


def test_the_command_measures_two_models_in_turns(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, small = (
        str(save_tiny("llama", tmp_path / "a")),
        str(save_tiny("llama", tmp_path / "b", num_hidden_layers=1)),
    )
    words = ["--batches", "1,2", "--lengths", "8", "--new-tokens", "2", "--rounds", "2", "--repeats", "1"]
    assert main(["benchmark", small, "--vs", model, *words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    figures = record["model"]["figures"]
    expected = {f"{what}_b{b}_p8" for what in ("prefill", "decode", "first_token_ms") for b in (1, 2)}
    assert expected | {"load_seconds", "peak_memory_mb", "bytes_on_disk"} <= figures.keys()
    assert all(len(found["values"]) == 2 and found["min"] > 0 for found in figures.values())
    assert record["comparison"]["bytes_on_disk"]["better"] and "bytes on disk 0." in record["verdict"]
    told = benchmark_text(record)
    assert "decode, batch 2, prompt 8" in told and "verdict: " in told and "energy " in told


def test_an_encoder_reads_alone(here: None, tmp_path: Path) -> None:
    record = compare_speed(
        str(save_tiny("bert", tmp_path)), settings=Settings(lengths=(8,), repeats=1), rounds=1
    )
    assert "prefill_b1_p8" in record["model"]["figures"] and "decode_b1_p8" not in record["model"]["figures"]
    assert record["base"] is None and record["verdict"] is None


def test_labels() -> None:
    assert label("first_token_ms_b4_p512") == "first token, batch 4, prompt 512"
    assert [label(name) for name in ("load_seconds", "peak_memory_mb", "bytes_on_disk")] == [
        "load",
        "peak memory",
        "bytes on disk",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "600"], "has 512 positions, and a prompt of 600 with 32 more needs 632: give at most"),
        (["--batches", "one"], "--batches takes whole numbers with commas between, such as 1,4, not 'one'."),
        (["--batches", "0"], "batches takes numbers from 1"),
        (["--rounds", "0"], "rounds 0 is too few"),
        (["--new-tokens", "0"], "new_tokens 0 is too few"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", str(save_tiny("llama", tmp_path)), *words]) == 2
    assert message in capsys.readouterr().err


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an encoder-decoder"):
        compare_speed(str(save_tiny("t5", tmp_path)))
