"""What goes up to the Hub does not show the file system of the machine that it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llmslim.report.card import model_card
from llmslim.report.index import model_index
from llmslim.report.public import cutter, published
from tests.test_report import full_report

HOME = "/home/ann"
CONFIG = {"architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setenv("HOME", HOME)
    made = full_report()
    made["base"] = {"model": f"{HOME}/my models/été/base", "spec": "~/my models/été/base", "revision": None}
    made["recipe"]["calibration"] = {"text": f"{HOME}/notes.txt"}
    made["recipe"]["evaluation"] = {"text": "/data/ann/wikitext:raw-v1:test", "tasks_data": "../ann/data"}
    made["calibration"]["protocol"] = f"{HOME}/notes.txt: 32 windows"
    made["quality"]["perplexity"] |= {
        "text": f"{HOME}/notes.txt",
        "protocol": "/data/ann/wikitext:raw-v1:test, 2 windows",
    }
    made["notes"] = [{"where": "steps.svg", "what": f"not drawn: {HOME}/.cache/x/y.py lacks /srv/ann/font"}]
    made["details"] = {
        "tokens": [{"before": "see /opt/vendor/thing", "token": "a", "likeliest": "/", "base_likeliest": "b"}]
    }
    made["benchmark"] = {"energy": "not measured: no readable energy counter in /sys/class/powercap"}
    made["source"] = "https://huggingface.co/ann/thing and tokens/s"
    return made


def test_paths_are_cut_to_their_last_part(report: dict) -> None:
    seen = published(report)
    text = json.dumps(seen, ensure_ascii=False)
    assert "ann" not in text.replace("huggingface.co/ann/thing", "") and "my models" not in text
    assert seen["base"]["model"] == seen["base"]["spec"] == "base"
    assert seen["recipe"]["calibration"]["text"] == "notes.txt"
    assert seen["recipe"]["evaluation"] == {"text": "wikitext:raw-v1:test", "tasks_data": "data"}
    assert seen["calibration"]["protocol"] == "notes.txt: 32 windows"
    assert seen["notes"][0]["what"] == "not drawn: y.py lacks font"
    for key in (
        "details",
        "source",
        "benchmark",
        "size",
        "linears",
    ):  # text that was read, addresses, figures
        assert seen[key] == report[key]


def test_a_report_without_paths_goes_up_as_it_is() -> None:
    assert published(full_report()) == full_report()


def test_the_card_is_cut_too(report: dict) -> None:
    card = cutter(report)(model_card(report, CONFIG, {}))
    assert "/ann" not in card and "ann/" not in card and "my models" not in card and "été" not in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["model-index"][0]["results"][0]["dataset"]["name"] == "notes.txt"
    assert "Made from `base`" in card


def test_a_name_that_begins_like_a_path_stays(report: dict) -> None:
    cut = cutter(report)
    assert cut(f"{HOME}/notes.txt-2 and /data/ann/wikitext2") == "notes.txt-2 and /data/ann/wikitext2"


def test_the_owner_of_a_data_set_stays_in_the_model_index(report: dict) -> None:
    report["quality"]["perplexity"]["text"] = str(Path("/data/Salesforce/wikitext"))
    (entry,) = model_index(report, "x")
    assert entry["results"][0]["dataset"]["name"] == "Salesforce/wikitext"
