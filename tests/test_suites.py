"""The standard suites and lm.py of evals/: what they ask for exists, and what they tell is rendered."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evals"))

import lm
import suite
import tables

from llmslim import cli
from llmslim.recipe import Recipe

FOUND = {"value": 0.412, "base": 0.431, "stderr": 0.02, "difference": -0.019, "difference_stderr": 0.008}
TASK = {"questions": 500, "main": "acc", "metrics": {"acc": FOUND}}


@pytest.mark.parametrize("name", ["quick", "standard", "full"])
def test_a_suite_asks_for_what_there_is(name: str) -> None:
    assert name in suite.SUITES
    for words in suite.commands(suite.suite(name), "out/demo", "demo", "data").values():
        options = cli.verbs()[words[0]].parser(f"llmslim {words[0]}").parse(words[1:])
        assert options["model"] == "out/demo" and options["base"] == "demo" and options["json"]
    tasks = pytest.importorskip("llmslim.evaluation.tasks")
    pytest.importorskip("lm_eval")
    assert set(suite.suite(name)["tasks"]["names"]) <= tasks.definitions().keys()


def test_a_suite_is_rendered() -> None:
    figure = {"median": 9e6}
    row: dict[str, Any] = {
        "name": "quick/demo",
        "perplexity": {"perplexity": 39.0, "base_perplexity": 36.0},
        "tasks": {"tasks": {"piqa": TASK}},
        "benchmark": {
            "model": {"figures": dict.fromkeys(("decode_b1_p32", "peak_memory_mb", "bytes_on_disk"), figure)},
            "verdict": "within noise",
        },
    }
    told = tables.suite({"rows": [row]})
    assert "| quick/demo | 39.00 (base 36.00) | piqa 41.2 (-1.9 ± 0.8) |" in told and "within noise" in told


def test_the_questions_are_rendered() -> None:
    quality = {"perplexity": 36.1}
    base = {
        "name": "base",
        "quality": quality,
        "lm": {"tasks": {"piqa": {**TASK, "metrics": {"acc": {"value": 0.5, "stderr": 0.02}}}}},
    }
    row = {
        **base,
        "name": "configs/x",
        "size": {"bytes_on_disk": 5e6},
        "lm": {"tasks": {"piqa": TASK}, "average": FOUND},
    }
    told = tables.lm({"rows": [base, row]})
    assert "| base |  | 36.10 | 50.0 ± 2.0 |  |" in told
    assert (
        "| configs/x | 5.0 | 36.10 | 41.2 (-1.9 ± 0.8) | -1.9 ± 0.8 |" in told
        and "piqa, 500 questions" in told
    )


def test_the_variants_are_recipes() -> None:
    steps = lm.chosen()
    assert {"base", "configs/gptq-4bit", "configs/prune-4bit"} <= steps.keys()
    for one in steps.values():
        assert not one or Recipe.parse({"steps": one}).steps
