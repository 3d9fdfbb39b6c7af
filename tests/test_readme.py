"""What the README and CONTRIBUTING say is so: commands and snippets run, paths exist, tables are complete.

Commands and snippets on `demo` run on a tiny model instead, with short texts; `compress` stops at its plan:
tests/test_configs.py runs every recipe. Commands on models of the Hub stop at the plan of the tiny model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import llmslim
from llmslim import cli
from llmslim.anatomy.family import TESTED
from llmslim.calibration.statistics import InputStats, output_error
from llmslim.checkpoint.formats import formats
from llmslim.quantization.rtn import RTN
from llmslim.step import STEPS, StepRecord, load_steps
from tests.glue_data import write_glue
from tests.lm_data import write_lm_data
from tests.tiny import save_tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
load_steps()


def fenced(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The shell commands of the fenced blocks as words, without comments."""
    lines = "".join(fenced(text, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


LLMSLIM = [words[3:] for words in commands(README) if words[:3] == ["python", "-m", "llmslim"]]
SNIPPETS = fenced(README, "python")
METHOD = next(snippet for snippet in SNIPPETS if "(Quantizer)" in snippet)
FAMILY = next(snippet for snippet in SNIPPETS if "Family(" in snippet)
SHORT = {
    "quantize": "--num-samples 2 --seq-len 32 --eval-windows 2 --eval-seq-len 32 --no-speed",
    "prune": "--num-samples 2 --seq-len 32 --eval-windows 2 --eval-seq-len 32 --no-speed",
    "factorize": "--num-samples 2 --seq-len 32 --eval-windows 2 --eval-seq-len 32 --no-speed",
    "share": "--num-samples 2 --seq-len 32 --eval-windows 2 --eval-seq-len 32 --no-speed --unique-blocks 2",
    "distill": "--num-samples 4 --seq-len 32 --eval-windows 2 --eval-seq-len 32 --no-speed",
    "finetune": "--data glue --max-steps 2 --no-evaluate",
    "recover": "--num-samples 4 --seq-len 32 --eval-windows 2 --eval-seq-len 32 --no-speed",
    "compress": "--num-samples 2 --seq-len 32 --eval-windows 2 --eval-seq-len 32 --no-speed --plan",
    "evaluate": "--seq-len 32 --windows 2",
    "evaluate --tasks": "--data tasks --limit 3 --batch-size 3",
    "benchmark": "--lengths 8 --new-tokens 2 --rounds 1 --repeats 1",
    "generate": "--max-new-tokens 4",
    "inspect": "",
    "push": "",
    "compare": "",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to be in, where README's paths lead where they should; outputs stay from test to test."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "configs").symlink_to(ROOT / "configs")
    write_glue(folder / "glue", ["sst2"], train=32)
    write_lm_data(folder / "tasks")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


# --- the shell ----------------------------------------------------------------------------------------------


def on_tiny(words: list[str], model: str) -> list[str]:
    """The command on the tiny model, short; the texts of the Hub are replaced as well."""
    verb, named = words[0], words[1]
    words = [model if word == "demo" else word for word in words]
    if named != "demo" and not named.startswith("out/"):
        assert verb == "inspect" or "--plan" in words, f"{words} would load a model of the Hub"
        words[1] = model
        if "--calibration" in words:
            words[words.index("--calibration") + 1] = "builtin"
    sized = (
        ["mlp.ratio=0.5"] if "configs/prune-4bit.yaml" in words else []
    )  # 128 channels, in multiples of 64
    verb = f"{verb} --tasks" if "--tasks" in words else verb
    return [*words, *sized, *SHORT[verb].split()]


@pytest.mark.usefixtures("verified_here")
@pytest.mark.parametrize("words", LLMSLIM, ids=" ".join)
def test_command(words: list[str], model: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.verbs()[words[0]].parser(f"llmslim {words[0]}").parse(words[1:])  # as it stands there
    assert cli.main(on_tiny(words, model)) == 0
    assert capsys.readouterr().out.strip()
    if words[0] == "quantize" and "--plan" not in words:
        assert json.loads((place / "out/smol-4bit/report.json").read_text())["verification"]["ok"]


def test_the_readme_shows_every_verb() -> None:
    assert {words[0] for words in LLMSLIM} == set(cli.verbs())


def test_every_option_named_in_the_text_exists() -> None:
    known = {"--help"}
    for name, verb in cli.verbs().items():
        known |= set(verb.parser(f"llmslim {name}").options())
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(
        "<!-- results:begin -->.*<!-- results:end -->", "", prose, flags=re.DOTALL
    )  # other scripts
    foreign = {"--power", "--method"}  # of the example below
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", prose)) - foreign
    assert len(named) > 5 and named <= known


@pytest.mark.parametrize("name", ["demo", "test"])
def test_the_two_first_commands(name: str) -> None:
    assert commands(README)[:2] == [["scripts/demo"], ["scripts/test"]]
    script = ROOT / "scripts" / name
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    text = script.read_text().replace("\\\n", " ")
    for line in re.findall(r"^python -m llmslim (.*)$", text, re.MULTILINE):
        words = [word for word in shlex.split(line) if word != "$@"]
        options = cli.verbs()[words[0]].parser(f"llmslim {words[0]}").parse(words[1:])
        assert "out/demo" in (options["model"], options.get("output"))


@pytest.mark.parametrize("words", [w for w in commands(CONTRIBUTING) if "/" in w[0]], ids=" ".join)
def test_the_scripts_that_contributing_names(words: list[str]) -> None:
    assert os.access(ROOT / words[0], os.X_OK)
    for word in words[1:]:
        assert not word.startswith("tests/") or (ROOT / word).exists()


# --- Python -------------------------------------------------------------------------------------------------


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compress` with short texts, whatever the snippet asks for; its arguments are checked as they are."""
    real = llmslim.compress

    def compress(model: str, steps: list[Any], **options: Any) -> Any:
        assert isinstance(options.get("calibration", llmslim.Calibration()), llmslim.Calibration)
        options["calibration"] = llmslim.Calibration(num_samples=2, seq_len=32)
        options["evaluation"] = llmslim.Evaluation(windows=2, seq_len=32, speed=False)
        return real(model, steps, **options)

    monkeypatch.setattr(llmslim, "compress", compress, raising=False)


def test_snippets_on_the_demo_and_on_what_it_left(
    model: str, place: Path, short_runs: None, capfd: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    for snippet in [snippet for snippet in SNIPPETS if snippet not in (METHOD, FAMILY)]:
        exec(compile(snippet.replace('"demo"', repr(model)), "README.md", "exec"), names)
    assert names["result"].folder == Path("out/from-python")
    assert "The capital of France is" in capfd.readouterr().out
    assert names["model"].config.model_type == "llama"  # loaded by plain transformers, last of all


@pytest.fixture
def example(tmp_path: Path) -> Iterator[Any]:
    """The README's method, in a module."""
    path = tmp_path / "weighted.py"
    path.write_text(METHOD)
    spec = importlib.util.spec_from_file_location("llmslim.quantization.weighted", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before = dict(STEPS)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    STEPS.clear()
    STEPS.update(before)


def test_add_a_method_by_one_file(example: Any, model: str, tmp_path: Path) -> None:
    """Flags, recipe, public name, run, verification and report follow from the file alone."""
    assert llmslim.WeightedRTN is example.WeightedRTN and STEPS["weighted"] is example.WeightedRTN
    entry = next(text for text in re.findall(r"`(weighted: [^`]*)`", README))
    step = llmslim.Recipe.parse({"steps": [yaml.safe_load(entry)]}).steps[0]
    assert step == llmslim.WeightedRTN(power=0.5)

    flags = next(text for text in re.findall(r"`quantize (--method weighted[^`]*)`", README)).split()
    words = ["quantize", model, *flags, "--output", str(tmp_path / "out"), *SHORT["quantize"].split()]
    assert cli.main(words) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["verification"]["ok"] and report["calibration"]["samples"] == 2
    assert all(row["output_error"] > 0 for row in report["linears"]) and len(report["linears"]) == 21


def test_the_example_does_what_it_says(example: Any) -> None:
    """Where inputs differ in size, it beats rounding without looking at them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 64, generator=generator) * torch.logspace(-1, 1, 64)
    weight = torch.randn(32, 64, generator=generator)
    stats = InputStats(64, torch.device("cpu"))
    stats.add(inputs, None)
    stats = stats.finish()
    errors = []
    for step in (example.WeightedRTN(bits=3), RTN(bits=3)):
        quantized = step.quantize("w", weight, step.scheme("w"), stats, StepRecord())
        errors.append(output_error(weight, quantized.dequantize(), stats.hessian))
    assert errors[0] < 0.9 * errors[1]


def test_add_a_family_by_one_file() -> None:
    names: dict[str, Any] = {}
    exec(compile(FAMILY, "README.md", "exec"), names)
    from llmslim.anatomy.families.gpt2 import FAMILY as shipped

    assert names["FAMILY"] == shipped


# --- tables, trees and paths --------------------------------------------------------------------------------


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    table = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_methods_table_is_the_registry() -> None:
    table = {cells[0].strip("`"): cells for cells in rows("Methods")}
    assert set(table) == set(STEPS)
    for kind, cls in STEPS.items():
        assert table[kind][3] == ("yes" if cls().needs_calibration else "no")
        papers = set(re.findall(r"arXiv:([\d.]+\d)", cls.__doc__ or ""))
        assert papers <= set(re.findall(r"arxiv.org/abs/([\d.]+\d)", table[kind][2]))


def test_formats_table_is_the_registry() -> None:
    from llmslim.checkpoint import compressed_tensors, gptq

    table = {cells[0].strip("`"): cells[1] for cells in rows("Which format loads where")}
    assert set(table) == set(formats())
    for name, bits in (("compressed-tensors", compressed_tensors.BITS), ("gptq", gptq.BITS)):
        assert tuple(map(int, re.findall(r"\d+", table[name].split("bits")[0]))) == bits


def test_the_tree_is_the_tree() -> None:
    """Every path of the tree exists, and every room and module of the package is in it."""
    tree = next(block for block in fenced(README, "") if block.startswith("llmslim/"))
    inside, outside = set(), set()
    for line in tree.splitlines()[1:]:
        path = line.split()[0]
        assert len(line.split()) > 2, f"{path} has no sentence"
        (inside if line.startswith("  ") else outside).add(path)
    package = ROOT / "llmslim"
    there = {f"{path.name}/" if path.is_dir() else path.name for path in package.iterdir()}
    assert inside == {name for name in there if name.endswith((".py", "/")) and name != "__pycache__/"}
    assert all((ROOT / path).is_dir() for path in outside)


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_paths_in_the_text_exist(text: str) -> None:
    own = ("llmslim/", "configs/", "evals/", "scripts/", "tests/")
    named = {word for word in re.findall(r"[`(]([\w./-]+)[`)]", text) if word.startswith(own)}
    named -= {"llmslim/quantization/weighted.py"}  # the example's
    assert len(named) > 3
    assert not [path for path in named if not (ROOT / path).exists()]


def test_families_are_those_tested() -> None:
    listed = re.search(r"Tested now: ([^.]*)\.", README)
    assert listed is not None
    names = [re.sub(r"[\s-]", "", name).lower() for name in listed[1].split(",")]
    tested = [name.replace("_text", "").replace("_", "") for name in TESTED]
    assert sorted(names) == sorted(tested)


def test_results_have_their_place() -> None:
    begin, end = (README.index(f"<!-- results:{word} -->") for word in ("begin", "end"))
    assert begin < end and README[begin:end].strip()
