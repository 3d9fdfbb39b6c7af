"""The documents in docs/ say what the code does: generated pages, commands, examples, error sentences, the notebook."""

from __future__ import annotations

import ast
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
from llmslim.edit import EDITS
from llmslim.step import STEPS, StepRecord, load_steps
from tests import fake_hub
from tests.tiny import example_inputs, save_tiny, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import generate  # noqa: E402

load_steps()
METHODS = sorted(STEPS)
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("methods/*.md")])
SHORT_CALIBRATION = llmslim.Calibration(num_samples=2, seq_len=32)


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


# --- generated pages ----------------------------------------------------------------------------------------


def test_pages_are_what_classes_recipes_and_results_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def test_a_page_that_differs_or_is_left_over_is_told_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods/gone.md").touch()
    (tmp_path / "choosing.md").write_text(page("choosing.md"))
    assert generate.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert "methods/gptq.md" in said and "methods/gone.md" in said and "choosing.md" not in said
    assert generate.main([]) == 0 and generate.main(["--check"]) == 0
    assert {path.name for path in tmp_path.glob("methods/*")} == {f"{m}.md" for m in METHODS} | {"README.md"}


def test_no_method_lacks_a_page() -> None:
    assert {path.stem for path in DOCS.glob("methods/*.md")} == {*METHODS, "README"}


@pytest.mark.parametrize("kind", METHODS)
def test_command_recipe_and_python_of_a_page_are_one_step(kind: str) -> None:
    text = page(f"methods/{kind}.md")
    (command,), (recipe,), (python,) = (fenced(text, language) for language in ("sh", "yaml", "python"))
    words = shlex.split(command)[3:]
    options = cli.verbs()[words[0]].parser(f"llmslim {words[0]}").parse(words[1:])
    fields = {key.removeprefix("step."): v for key, v in options.items() if key.startswith("step.")}
    (step,) = llmslim.Recipe.parse(yaml.safe_load(recipe)).steps
    assert STEPS[options.get("method", kind)](**fields) == step
    call = re.search(r"\[llmslim\.(\w+)\((.*)\)\]", python)
    assert call is not None
    assert eval(f"llmslim.{call[1]}({call[2]})") == step
    assert all(f"| `{name}` |" in text for name in STEPS[kind].model_fields)


# --- every page ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_commands_parse_and_links_lead_somewhere(path: Path) -> None:
    text = path.read_text("utf-8")
    lines = "".join(fenced(text, "sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(python -m llmslim [^`]*)`", text)
    for words in (shlex.split(line, comments=True) for line in lines):
        if words[:3] == ["python", "-m", "llmslim"]:
            cli.verbs()[words[3]].parser(f"llmslim {words[3]}").parse(words[4:])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#")):
            name, _, anchor = target.partition("#")
            linked = (path.parent / name).resolve()
            assert linked.exists(), f"{target} leads nowhere"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]


def test_the_index_names_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w./-]+)\)", page("README.md")))
    own = {path.name for path in [*DOCS.glob("*.md"), *DOCS.glob("*.ipynb")]} - {"README.md"}
    assert own | {"methods/README.md"} <= linked


# --- adding a method, adding a family -----------------------------------------------------------------------


@pytest.fixture
def defined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Puts a snippet of a page into the package as a module, for the time of a test."""
    steps, edits = dict(STEPS), dict(EDITS)

    def define(snippet: str, name: str) -> Any:
        path = tmp_path / f"{name.rpartition('.')[2]}.py"
        path.write_text(snippet)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    yield define
    for registry, before in ((STEPS, steps), (EDITS, edits)):
        registry.clear()
        registry.update(before)


def run(model: Path, step: Any, output: Path) -> dict[str, Any]:
    done = llmslim.compress(
        str(model), [step], output=str(output), calibration=SHORT_CALIBRATION, evaluation=None
    )
    return done.report


def distance(base: Path, result: Path) -> float:
    models = [llmslim.load(str(folder), dtype=torch.float32)[0] for folder in (base, result)]
    inputs = example_inputs(models[0])
    with torch.no_grad():
        expected, logits = (model(**inputs).logits for model in models)
    return float((logits - expected).norm() / expected.norm())


@pytest.mark.usefixtures("verified_here")
def test_the_quantizer_of_the_page(defined: Any, tmp_path: Path) -> None:
    module = defined(fenced(page("adding-a-method.md"), "python")[0], "llmslim.quantization.clipped")
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    assert llmslim.Clipped is module.Clipped
    step = llmslim.Clipped(bits=8, quantile=0.99)
    report = run(model, step, tmp_path / "out")
    assert report["verification"]["ok"] and report["size"]["result"]["bits_per_block_weight"] < 10
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 100.0
    quantized = step.quantize("w", weight, step.scheme("w"), None, StepRecord()).dequantize()
    assert quantized[0, 0] < 50 and torch.allclose(quantized[1:], weight[1:], atol=0.3)
    rounded = llmslim.RTN(bits=8).quantize("w", weight, step.scheme("w"), None, StepRecord()).dequantize()
    assert rounded[0, 0] > 99


@pytest.mark.usefixtures("verified_here")
def test_the_edit_of_the_page(defined: Any, tmp_path: Path) -> None:
    module = defined(fenced(page("adding-a-method.md"), "python")[1], "llmslim.pruning.biases")
    model = save_tiny("opt", tmp_path / "model", num_hidden_layers=1)
    report = run(model, module.DropBiases(exclude=("fc1",)), tmp_path / "out")
    assert report["verification"]["ok"]
    loaded, _ = llmslim.load(str(tmp_path / "out"))
    biases = {name for name, _ in loaded.named_parameters() if name.endswith("bias") and "norm" not in name}
    assert biases and all(".fc1." in name for name in biases)
    assert distance(model, tmp_path / "out") > 0
    with pytest.raises(llmslim.UserError, match="has a bias to remove"):
        run(save_tiny("llama", tmp_path / "llama"), module.DropBiases(), tmp_path / "none")


@pytest.mark.usefixtures("verified_here")
def test_the_family_of_the_page(defined: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = AutoConfig.for_model("starcoder2", **sizes, **heads, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(llmslim.UserError, match="llmslim/anatomy/families/starcoder2.py"):
        llmslim.Anatomy.of(model)
    defined(fenced(page("adding-a-family.md"), "python")[0], "llmslim.anatomy.families.starcoder2")
    assert {block.mlp.width for block in llmslim.Anatomy.of(model).blocks} == {128}
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert run(tmp_path / "model", llmslim.RTN(bits=8), tmp_path / "out")["verification"]["ok"]
    assert distance(tmp_path / "model", tmp_path / "out") < 0.05


# --- troubleshooting ----------------------------------------------------------------------------------------


def sentences_of_the_code() -> list[list[str]]:
    """Every text of the package that has words of its own, in the parts between its values."""
    found = []
    for path in (ROOT / "llmslim").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = ["", *(str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            else:
                continue
            text = "".join(parts)
            if len(text) - text.count("\0") >= 25:
                found.append(text.split("\0"))
    return found


def says(parts: list[str], text: str) -> bool:
    """Whether a text is made of these parts in order, with anything in between."""
    return all(part in text for part in parts) and (
        re.fullmatch(".*".join(map(re.escape, parts)), text) is not None
    )


def test_the_error_sentences_are_the_programs_own() -> None:
    told = re.findall(r"^> (.*)$", page("troubleshooting.md"), re.MULTILINE)
    known = sentences_of_the_code()
    assert len(told) > 30
    assert not [text for text in told if not any(says(parts, text) for parts in known)]


# --- the notebook -------------------------------------------------------------------------------------------


PUSHED = """
import json, sys
from unittest.mock import patch
from llmslim import pipeline
from llmslim.checkpoint.verify import verify
cells, changed, names = json.loads(sys.argv[1]), json.loads(sys.argv[2]), {}
exec(cells[0], names)
assert changed.keys() <= names.keys() and names["PUSH"] is False
names.update(changed)
with patch.object(pipeline, "verify_in_fresh_process", verify):
    for number, cell in enumerate(cells[1:], 1):
        exec(compile(cell, f"cell {number}", "exec"), names)
assert names["upload"].commit is None  # that one was dry
"""


def test_the_notebook_runs_and_pushes(tmp_path: Path) -> None:
    """Cell by cell on a tiny model with short texts, to a small Hub on this machine and back."""
    notebook = json.loads(page("from-model-to-hub.ipynb"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and not any(cell["outputs"] for cell in code)
    model = save_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    changed = {
        "MODEL": str(model),
        "NUM_SAMPLES": 2,
        "SEQ_LEN": 32,
        "WINDOWS": 2,
        "SPEED": False,
        "PUSH": True,
    }
    cells = json.dumps(["".join(cell["source"]) for cell in code])
    with fake_hub.running() as hub:
        asked = {**os.environ, "PYTHONPATH": str(ROOT), **hub.environment("hf_annwrites", tmp_path / "home")}
        command = [sys.executable, "-c", PUSHED, cells, json.dumps(changed)]
        ran = subprocess.run(command, capture_output=True, text=True, env=asked, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr[-2000:]
        (repository,) = hub.repos.values()
    assert {"config.json", "README.md", "report.html", "model.safetensors"} <= repository.files.keys()
    assert repository.private and f"pushed to {hub.url}/ann/smollm2-4bit" in ran.stdout
    assert (tmp_path / "out/notebook-8bit/report.html").is_file()
