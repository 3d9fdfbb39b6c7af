"""Every recipe in configs/ is what its first line says, and runs from end to end on a tiny model."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import llmslim
from llmslim import cli
from llmslim.recipe import Recipe
from tests.tiny import example_inputs, save_tiny

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
FORMATS = {"gptq-3bit": "llmslim", "gptq-4bit": "compressed-tensors", "rtn-8bit": "llmslim"}
FARTHEST = {3: 1.0, 4: 0.5, 8: 0.08}  # distance of the logits from the base's; sqrt(2) is unrelated
TINY_RUN = ["evaluation.windows=2", "evaluation.seq_len=32", "evaluation.speed=false"]
TINY_TEXT = ["calibration.num_samples=64", "calibration.seq_len=32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen2", tmp_path_factory.mktemp("models") / "qwen2")  # tied embeddings, as in the demo


def needs_text(path: Path) -> bool:
    return any(step.needs_calibration for step in Recipe.read(path).steps)


def test_each_is_run_below() -> None:
    assert [path.stem for path in CONFIGS] == sorted(FORMATS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_first_line_is_the_command_that_runs_it(path: Path) -> None:
    words = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    assert words[:4] == ["python", "-m", "llmslim", "compress"]
    options = cli.verbs()["compress"].parser("llmslim compress").parse(words[4:])
    assert options["model"] == "demo" and options["output"] == f"out/{path.stem}"
    assert ROOT / options["recipe"] == path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_says_nothing_that_is_ignored(path: Path) -> None:
    """Each key of the file is one of the recipe as read, and a text is there for steps that look at one."""
    written, read = yaml.safe_load(path.read_text()), Recipe.read(path).to_json()
    for step, parsed in zip(written.pop("steps"), read["steps"], strict=True):
        for kind, fields in step.items():
            assert fields.items() <= parsed[kind].items()
    for key, value in written.items():
        assert value.items() <= read[key].items() if isinstance(value, dict) else value == read[key]
    assert ("calibration" in written) == needs_text(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_runs(path: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    overrides = [*TINY_RUN, *(TINY_TEXT if needs_text(path) else [])]
    assert cli.main(["compress", str(model), str(path), *overrides, "--output", str(output)]) == 0

    report = json.loads((output / "report.json").read_text())
    assert report["format"] == FORMATS[path.stem] and report["verification"]["ok"]
    step = next(iter(Recipe.read(path).steps))
    decoder = {row["name"]: row["bits"] for row in report["linears"] if ".layers." in row["name"]}
    assert len(decoder) == 3 * 7
    assert {bits for name, bits in decoder.items() if "down_proj" not in name} == {step.bits}  # type: ignore[attr-defined]

    base, _ = llmslim.load(str(model), dtype=torch.float32)
    loaded, tokenizer = llmslim.load(str(output), dtype=torch.float32)
    assert type(loaded.get_submodule("model.layers.0.mlp.up_proj")).__name__ == "PackedLinear"
    assert tokenizer.chat_template
    inputs = example_inputs(base)
    with torch.no_grad():
        expected, logits = base(**inputs).logits, loaded(**inputs).logits
    distance = (logits - expected).norm() / expected.norm()
    assert 0 < distance < FARTHEST[step.bits]  # type: ignore[attr-defined]
