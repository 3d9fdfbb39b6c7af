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
FORMATS = {"gptq-4bit": "compressed-tensors", "long-context": "compressed-tensors"}
"""Those that are not in the llmslim format."""
FARTHEST = {  # distance of the logits from the base's; sqrt(2) is unrelated
    "encoder": 1.2,
    "gptq-3bit": 1.0,
    "gptq-4bit": 0.5,
    "long-context": 0.5,
    "low-rank-4bit": 1.2,
    "prune-4bit": 1.3,
    "qat-2bit": 1.3,
    "quality-5bit": 0.3,
    "rtn-8bit": 0.08,
    "shallow-4bit": 1.4,
    "share-8bit": 1.4,
    "tiny-edge": 1.3,
}
SIZED = {  # what the tiny model, hidden 64 and 3 blocks, is too small for
    "prune-4bit": ["mlp.ratio=0.5"],
    "tiny-edge": ["mlp.ratio=0.5"],
    "shallow-4bit": ["layers.ratio=0.34"],
    "low-rank-4bit": ["svd_llm.multiple_of=32", "gptq.group_size=32", "svd_llm.ratio=0.3"],
    "share-8bit": ["share.delta_rank=4"],
    "encoder": ["evaluation.seq_len=32"],
}
TINY_RUN = ["evaluation.windows=2", "evaluation.seq_len=32", "evaluation.speed=false"]
TINY_TEXT = ["calibration.num_samples=64", "calibration.seq_len=32"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decoder with tied embeddings, as the demo has, and an encoder."""
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in ("qwen2", "bert")}


@pytest.fixture
def model(path: Path, models: dict[str, Path]) -> Path:
    return models["bert" if path.stem == "encoder" else "qwen2"]


def needs_text(path: Path) -> bool:
    return any(step.needs_calibration for step in Recipe.read(path).steps)


def test_each_is_run_below() -> None:
    assert [path.stem for path in CONFIGS] == sorted(FARTHEST)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_first_line_is_the_command_that_runs_it(path: Path) -> None:
    words = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))
    assert words[:4] == ["python", "-m", "llmslim", "compress"]
    options = cli.verbs()["compress"].parser("llmslim compress").parse(words[4:])
    named = "sentence-transformers/all-MiniLM-L6-v2" if path.stem == "encoder" else "demo"
    assert options["model"] == named and options["output"] == f"out/{path.stem}"
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
@pytest.mark.usefixtures("verified_here")
def test_it_runs(path: Path, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    overrides = [*TINY_RUN, *(TINY_TEXT if needs_text(path) else []), *SIZED.get(path.stem, [])]
    assert cli.main(["compress", str(model), str(path), *overrides, "--output", str(output)]) == 0

    report = json.loads((output / "report.json").read_text())
    assert report["format"] == FORMATS.get(path.stem, "llmslim") and report["verification"]["ok"]
    assert report["size"]["result"]["bytes_on_disk"] < report["size"]["base"]["bytes_on_disk"]
    done = {kind for step in report["recipe"]["steps"] for kind in step}
    assert done == {step.kind for step in Recipe.read(path).steps}
    last = [step for step in Recipe.read(path).steps if hasattr(step, "bits")][-1]
    packed = {
        row["name"]: row["bits"] for row in report["linears"] if "layer" in row["name"] and "bits" in row
    }
    assert {bits for name, bits in packed.items() if "down_proj" not in name} == {last.bits}

    base, _ = llmslim.load(str(model), dtype=torch.float32)
    loaded, tokenizer = llmslim.load(str(output), dtype=torch.float32)
    assert all(type(loaded.get_submodule(name)).__name__ == "PackedLinear" for name in packed)
    assert tokenizer.chat_template
    inputs = example_inputs(base)
    with torch.no_grad():
        expected, logits = base(**inputs).logits, loaded(**inputs).logits
    distance = (logits - expected).norm() / expected.norm()
    assert 0 < distance < FARTHEST[path.stem]
