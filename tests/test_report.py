"""The report: report.json, the model card and the table at the end, for whole and for partly skipped runs."""

from __future__ import annotations

import copy
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from llmslim.report import summary_table, write_report
from llmslim.report.figures import notes, rows, steps, verdict, worst_linears, zeros
from llmslim.report.waterfall import steps_plot


def perplexity(value: float) -> dict[str, Any]:
    return {
        "value": value,
        "stderr": 1.5,
        "nll": 3.5,
        "nll_stderr": 0.04,
        "protocol": "builtin: 16 windows of 512",
    }


def full_report() -> dict[str, Any]:
    """A report as `pipeline.compress` makes it."""
    step = {"gptq": {"bits": 4, "group_size": 64, "symmetric": True, "damp_percent": 0.01}}
    return {
        "schema_version": 1,
        "llmslim": "0.1.0",
        "base": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "spec": "demo", "revision": None},
        "recipe": {"steps": [step], "seed": 0, "format": "auto"},
        "format": "compressed-tensors",
        "calibration": {"protocol": "builtin: 32 windows", "data_hash": "ab" * 32, "samples": 32},
        "plan": {"peak_memory": 800_000_000},
        "run": {
            "cpu_seconds": {"0": 100.0},
            "wall_seconds": 130.0,
            "peak_memory_mb": 812.0,
            "resumed": False,
        },
        "linears": [
            {
                "name": f"model.layers.{i}.mlp.down_proj",
                "bits": 4,
                "shape": [576, 1536],
                "output_error": 0.01 * i,
            }
            for i in range(30)
        ],
        "notes": [{"where": f"model.layers.{i}.q_proj", "what": "damping raised"} for i in range(5)],
        "verification": {"ok": True, "checks": []},
        "size": {
            "base": {
                "parameters": 134e6,
                "bytes_on_disk": 269e6,
                "bits_per_weight": 16.0,
                "bits_per_block_weight": 16.0,
            },
            "result": {
                "parameters": 134e6,
                "bytes_on_disk": 90e6,
                "bits_per_weight": 5.3,
                "bits_per_block_weight": 4.25,
            },
        },
        "quality": {
            "perplexity": perplexity(40.0),
            "base_perplexity": perplexity(32.0),
            "nll_increase": {"value": 0.2, "stderr": 0.01},
            "kl": {"value": 0.1234, "stderr": 0.01},
            "top1_agreement": {"value": 0.81, "stderr": 0.01},
        },
        "speed": {"base": speed(20.0, 400.0, 900.0), "result": speed(50.0, 396.0, 450.0)},
        "steps": None,
        "environment": {
            "python": "3.11.7",
            "platform": "Linux",
            "cpu": "AVX2",
            "threads": 1,
            "device": "cpu",
            "compute_dtype": "float32",
            "versions": {"torch": "2.13.0"},
        },
    }


def speed(decode: float, prefill: float, memory: float) -> dict[str, Any]:
    def rate(tokens: float) -> dict[str, float]:
        return {"tokens_per_second": tokens, "min": tokens, "max": tokens}

    return {"decode": rate(decode), "prefill": rate(prefill), "peak_memory_mb": memory, "load_seconds": 2.0}


def encoder_report() -> dict[str, Any]:
    """Of an encoder: no perplexity, no decoding."""
    report = full_report()
    report["quality"] = {"skipped": "BertModel is an encoder, so it has no perplexity"}
    for side in report["speed"].values():
        side["decode"] = None
    for row in report["linears"]:
        del row["output_error"]  # rtn looks at no inputs
    return report | {"notes": [], "calibration": None, "format": "llmslim"}


def bare_report() -> dict[str, Any]:
    """Of a run that measured nothing but sizes."""
    return full_report() | {"quality": None, "speed": None}


def half_report() -> dict[str, Any]:
    """The result's speed could not be measured."""
    report = full_report()
    report["speed"]["result"] = {"skipped": "the process died"}
    return report


def stepped(report: dict[str, Any]) -> dict[str, Any]:
    """The same with its steps measured: perplexity rises from 32 to 36 to 40, or there is none."""
    size, quality = report["size"]["result"], report["quality"]
    between = quality if "skipped" in quality else {**quality, "perplexity": perplexity(36.0)}
    first = {"step": "mlp", "size": {**size, "bytes_on_disk": 230e6}, "quality": between}
    return report | {"steps": [first, {"step": "gptq", "size": size, "quality": quality}]}


REPORTS = {
    "full": full_report,
    "encoder": encoder_report,
    "bare": bare_report,
    "half": half_report,
    "steps": lambda: stepped(full_report()),
}


def card_of(
    report: dict[str, Any], tmp_path: Path, base_card: str | None = None
) -> tuple[dict[str, Any], str]:
    """The front matter and the text of the card that `write_report` writes."""
    base, folder = tmp_path / "base", tmp_path / "result"
    base.mkdir(), folder.mkdir()
    (base / "config.json").write_text("{}")
    if base_card is not None:
        (base / "README.md").write_text(base_card)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    write_report(folder, report, SimpleNamespace(folder=base))  # type: ignore[arg-type]
    assert json.loads((folder / "report.json").read_text()) == report
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def printed(report: dict[str, Any], width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(summary_table(report))
    return out.getvalue()


def test_rows_compare_base_and_result() -> None:
    found = {row.label: (row.base, row.result, row.change) for row in rows(full_report())}
    assert found["size on disk"] == ("269.0 MB", "90.0 MB", "2.99x smaller")
    assert found["perplexity"] == ("32.00 ± 1.50", "40.00 ± 1.50", "+25.0 %")
    assert found["KL from the base (nats)"][1] == "0.1234 ± 0.0100"
    assert found["top-1 agreement"][1] == "81.0 ± 1.0 %"
    assert found["decode, tokens/s"] == ("20.0", "50.0", "2.50x the base's")
    assert found["memory when run"] == ("900 MB", "450 MB", "0.50x")
    assert found["bits per weight, blocks"][:2] == ("16.00", "4.25")


@pytest.mark.parametrize(
    ("result", "said"), [(21.5, "1.07x the base's"), (20.4, "no faster (1.02x)"), (10.0, "slower (0.50x)")]
)
def test_speed_is_told_as_it_is(result: float, said: str) -> None:
    report = full_report()
    report["speed"]["result"] = speed(result, 400.0, 1.0)
    assert verdict(report) == f"On this machine decode is {said} and prefill is no faster (1.00x)."
    assert said in printed(report)


def test_a_missing_kernel_is_named() -> None:
    report = full_report()
    assert "kernel" not in verdict(report)
    report["speed"]["result"]["compiled_kernel"] = False
    assert "kernel for packed weights was not built" in verdict(report)


def test_worst_linears_and_first_notes() -> None:
    report = full_report()
    assert [name for name, _ in worst_linears(report)] == [
        f"model.layers.{i}.mlp.down_proj" for i in (29, 28, 27)
    ]
    assert notes(report)[-1] == "... and 2 more in report.json"
    assert len(notes(report)) == 4
    assert "5 notes" in printed(report)
    assert "No fallbacks." in printed(report | {"notes": []})


@pytest.mark.parametrize("name", REPORTS)
def test_the_table_fits_in_100_columns(name: str) -> None:
    report = REPORTS[name]()
    report["base"]["model"] = (
        "an-organisation-with-a-long-name/a-model-with-a-very-long-name-of-many-words-Instruct-v0.3"
    )
    text = printed(report)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text, "a cell was cut"
    assert "size on disk" in text


def test_what_was_skipped_is_said_with_its_reason(tmp_path: Path) -> None:
    text = printed(encoder_report())
    assert "Quality was not measured: BertModel is an encoder" in text
    assert "perplexity |" not in text and "decode" not in text.replace("decoder", "")
    assert "prefill, tokens/s" in text
    assert "it was switched off" in printed(bare_report())
    assert "Speed of the result was not measured: the process died." in printed(half_report())
    assert "Quality was not measured" in card_of(encoder_report(), tmp_path)[1]


def test_zeros_are_told_for_what_they_gain() -> None:
    shapes = ([10, 10], [10, 30])
    dense = [
        {"name": name, "shape": shape, "sparsity": s}
        for name, shape, s in zip("ab", shapes, (0.2, 0.6), strict=True)
    ]
    packed = [row | {"bits": 4} for row in dense]
    (said,) = zeros({"linears": dense})
    assert said.startswith("50% of the weights of 2 Linears") and "the file is smaller" in said
    (said,) = zeros({"linears": packed})
    assert said.startswith("50% of the weights of 2 quantized Linears") and "as without them" in said
    both = zeros({"linears": dense + [row | {"name": f"{row['name']} packed"} for row in packed]})
    assert len(both) == 2 and zeros({"linears": dense + packed}) == [said]
    assert not zeros(full_report())


def test_steps_are_told_line_by_line_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = stepped(full_report())
    assert [line.label for line in steps(report)] == ["base", "1. mlp", "2. gptq"]
    assert [line.perplexity for line in steps(report)] == [32.0, 36.0, 40.0]
    _, text = card_of(report, tmp_path)
    for row in (
        "| base | 269.0 MB | 32.00 ± 1.50 |  |",
        "| 1. mlp | 230.0 MB | 36.00 ± 1.50 | +12.5 % |",
        "| 2. gptq | 90.0 MB | 40.00 ± 1.50 | +11.1 % |",
        "![size and perplexity after each step](steps.svg)",
    ):
        assert row in text
    assert "1. mlp" in printed(report) and "+12.5 %" in printed(report)
    drawn = (tmp_path / "result" / "steps.svg").read_text()
    for label in ("1. mlp", "36.00", "(+12 %)", "230.0", "size on disk, MB"):
        assert label in "".join(
            re.findall("<!--.*?-->", drawn)
        )  # matplotlib keeps what it draws as glyphs there


def test_steps_of_an_encoder_are_sizes(tmp_path: Path) -> None:
    report = stepped(encoder_report())
    assert [(line.cells, line.perplexity) for line in steps(report)][1] == (("230.0 MB", "-", ""), None)
    assert "| 1. mlp | 230.0 MB | - |  |" in card_of(report, tmp_path)[1]
    assert "size on disk" in (tmp_path / "result" / "steps.svg").read_text()
    assert "perplexity" not in (tmp_path / "result" / "steps.svg").read_text()


def test_a_ruined_model_is_drawn_all_the_same(tmp_path: Path) -> None:
    report = stepped(full_report())
    for value in (5e12, float("inf")):
        report["steps"][1]["quality"] = {**report["quality"], "perplexity": perplexity(value)}
        steps_plot(report, tmp_path / "steps.png")
        assert (tmp_path / "steps.png").stat().st_size > 1000


def test_without_matplotlib_all_but_the_plot_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = stepped(full_report())
    _, text = card_of(report, tmp_path)
    assert "| 1. mlp | 230.0 MB |" in text and "steps.svg)" not in text
    assert not (tmp_path / "result" / "steps.svg").exists()
    assert report["notes"][-1]["where"] == "steps.svg"
    assert "pip install 'llmslim[plots]'" in report["notes"][-1]["what"]


def test_unmeasured_steps_leave_no_trace(tmp_path: Path) -> None:
    assert steps(full_report()) == []
    assert "After each step" not in card_of(full_report(), tmp_path)[1]
    assert "after step" not in printed(full_report())
    assert not (tmp_path / "result" / "steps.svg").exists()


def test_markup_in_names_is_text() -> None:
    report = full_report()
    report["notes"] = [{"where": "block[0]", "what": "[bold]odd[/bold]"}]
    assert "block[0]: [bold]odd[/bold]" in printed(report)


def test_the_card_tells_the_hub_and_the_reader(tmp_path: Path) -> None:
    front, text = card_of(full_report(), tmp_path, "---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n")
    assert front == {
        "library_name": "transformers",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["llmslim", "gptq", "4-bit", "compressed-tensors"],
        "model-index": front["model-index"],
    }
    (index,) = front["model-index"]
    assert [metric["value"] for metric in index["results"][0]["metrics"]] == [40.0, 32.0, 0.1234, 0.81]
    assert "gptq (4 bits, groups of 64, symmetric)" in text
    assert "| perplexity | 32.00 ± 1.50 | 40.00 ± 1.50 | +25.0 % |" in text
    assert 'AutoModelForCausalLM.from_pretrained("FOLDER")' in text and "llmslim.plugin" not in text
    assert "llmslim compress demo recipe.yaml --output FOLDER" in text
    assert "ab" * 32 in text and "torch 2.13.0" in text
    assert "- model.layers.0.q_proj: damping raised" in text


def test_the_recipe_on_the_card_can_be_run(tmp_path: Path) -> None:
    from llmslim.quantization.gptq import GPTQ
    from llmslim.recipe import Recipe

    recipe = Recipe(steps=(GPTQ(bits=3, overrides={"*.o_proj": {"bits": 8}}),), seed=7)
    report = full_report() | {"recipe": json.loads(json.dumps(recipe.to_json()))}
    _, text = card_of(report, tmp_path)
    block = text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yaml").write_text(block)
    assert Recipe.read(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    "base_card", [None, "# no front matter\n", "---\nlicense: [a, b]\n---\n", "---\n: {\n---\n"]
)
def test_no_license_is_invented(base_card: str | None, tmp_path: Path) -> None:
    report = copy.deepcopy(full_report())
    report["base"]["model"] = str(tmp_path)
    front, _ = card_of(report, tmp_path, base_card)
    assert "license" not in front and "base_model" not in front


def test_the_llmslim_format_names_its_plugin(tmp_path: Path) -> None:
    assert "import llmslim.plugin" in card_of(encoder_report(), tmp_path)[1]
