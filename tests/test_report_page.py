"""report.html, report.md and compare: what they say, that nothing in them is read as code, and older reports."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from llmslim import cli
from llmslim.evaluation.damage import Damage
from llmslim.evaluation.scores import TokenScores
from llmslim.report.answers import answers, increase
from llmslim.report.compare import compare
from llmslim.report.html import report_page
from llmslim.report.schema import SCHEMA_VERSION, read_report
from llmslim.report.svg import Point, columns, scatter
from tests.test_report import REPORTS, full_report
from tests.tiny import save_tiny

EVIL = "<script>alert('x')</script>\"&|`"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of one tiny model, at 4 and at 8 bits."""
    from unittest.mock import patch

    from llmslim import pipeline
    from llmslim.checkpoint.verify import verify
    from llmslim.recipe import Recipe

    root = tmp_path_factory.mktemp("runs")
    base = save_tiny("llama", root / "base")
    with patch.object(pipeline, "verify_in_fresh_process", verify):
        for bits in (4, 8):
            steps = [{"gptq": {"bits": bits, "group_size": 32}}]
            fields = {"windows": 3, "seq_len": 32, "speed": False}
            recipe = {"steps": steps, "calibration": {"num_samples": 2, "seq_len": 32}, "evaluation": fields}
            pipeline.compress(str(base), Recipe.parse(recipe), root / f"{bits}bit")
    return {"4bit": root / "4bit", "8bit": root / "8bit", "base": base}


class Elements(HTMLParser):
    """The elements of a page and its text; every element that is opened must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def test_a_run_leaves_a_report_to_read(runs: dict[str, Path]) -> None:
    folder = runs["4bit"]
    report, html = read_report(folder), (folder / "report.html").read_text("utf-8")
    assert report["schema_version"] == SCHEMA_VERSION
    found = Elements(html)
    headings = ["What did I gain?", "What did it cost?", "Can I trust it?", "Before and after", "Where quality is lost",
                "The most damaged tokens", "Error by block", "Where the bytes went", "Fallbacks and warnings",
                "Verification", "Do it again", "Made on"]  # fmt: skip
    places = [html.index(f">{heading}<") for heading in headings]
    assert places == sorted(places)
    assert any(tag == "meta" and attrs.get("name") == "viewport" for tag, attrs in found.tags)
    assert "@media print" in html and "llmslim compress MODEL recipe.yaml" in found.text
    assert not re.search(r"\b(src|href)=|url\(", html)  # nothing beside it is fetched
    assert len([tag for tag, _ in found.tags if tag == "svg"]) == 3  # twice by position, once by block
    markdown = (folder / "report.md").read_text("utf-8")
    for words in ("**What did I gain?**", "## KL by position", "## The most damaged tokens", "## Repeat it"):
        assert words in markdown


def test_where_quality_is_lost_adds_up(runs: dict[str, Path]) -> None:
    """The details are of the same pass: their means are the figures of the whole."""
    report = read_report(runs["4bit"])
    quality, details = report["quality"], report["details"]
    rows = details["by_position"]
    assert rows[0]["first"] == 1 and rows[-1]["last"] == 31
    widths = [row["last"] - row["first"] + 1 for row in rows]
    for name in ("kl", "nll_increase"):
        mean = sum(row[name] * width for row, width in zip(rows, widths, strict=True)) / 31
        assert mean == pytest.approx(quality[name]["value"], rel=1e-5)
    own, code = details["by_domain"]
    assert own["kl"] == quality["kl"] and own["windows"] == 3 and code["windows"] == 2
    rises = [row["nll_increase"] for row in details["tokens"]]
    assert len(rises) == 10 and rises == sorted(rises, reverse=True)
    parts = read_report(runs["4bit"])["size"]["result"]["parts"]
    assert {"attention", "MLP", "scales and zero points", "embeddings and head"} <= parts.keys()


def test_damage_finds_the_worst_tokens() -> None:
    """Against sorting all tokens; windows after the first so many are not looked at."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 40, (4, 30), generator=generator)
    damage = Damage(tokens[:3])
    scores = TokenScores(damage)
    rises, kls = [], []
    for window in tokens:
        base, own = (torch.randn(30, 40, generator=generator) for _ in range(2))
        scores.add(window, own, base)
        targets = window[1:]
        rise = (base.log_softmax(-1) - own.log_softmax(-1))[:-1].gather(1, targets[:, None])[:, 0]
        rises.append(rise)
        kls.append((base.softmax(-1) * (base.log_softmax(-1) - own.log_softmax(-1))).sum(-1)[:-1])
    expected = torch.cat(rises[:3]).sort(descending=True).values[:10]
    found = torch.tensor(sorted((entry[0] for entry in damage._worst), reverse=True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(damage.sums["kl"].float(), torch.stack(kls[:3]).sum(0), rtol=1e-4, atol=1e-4)
    assert scores.result(slice(3)).kl is not None
    assert scores.result(slice(3)).kl.value == pytest.approx(float(torch.stack(kls[:3]).mean()), rel=1e-4)


@pytest.mark.parametrize("name", REPORTS)
def test_every_kind_of_report_makes_a_page(name: str) -> None:
    text = Elements(report_page(REPORTS[name](), "llmslim compress demo recipe.yaml")).text
    assert "Before and after" in text
    if name == "encoder":
        assert "not measured" in text and "is an encoder" in text
        assert "--save" not in text  # it has no such scores to add
    else:
        assert "llmslim benchmark FOLDER --base demo --save" in text
    if name == "full":
        assert "900 MB of memory when run became 450 MB." in text


def spoiled(value: Any) -> Any:
    """The same with every text, and every key of a part, made harmful."""
    if isinstance(value, dict):
        return {key: spoiled(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [spoiled(entry) for entry in value]
    return f"{value}{EVIL}" if isinstance(value, str) else value


def test_text_of_strangers_is_never_read_as_code(runs: dict[str, Path]) -> None:
    report = read_report(runs["4bit"])
    sample = [{"prompt": "p", "text": "t"}]
    report["speed"] = {
        side: {"samples": sample, "decode": None, "prefill": None} for side in ("base", "result")
    }
    report["size"]["base"]["parts"] = {EVIL: 10, **report["size"]["base"]["parts"]}
    report["notes"] = [{"where": "w", "what": "w"}]
    recipe, bad = report["recipe"], spoiled(report)
    bad["recipe"] = recipe | {"format": EVIL}
    html = report_page(bad, EVIL)
    found = Elements(html)
    assert "script" not in {tag for tag, _ in found.tags} and "<script" not in html
    assert found.text.count("alert('x')") > 20
    assert "<script" not in columns([EVIL], [1.0], EVIL, EVIL)
    assert "<script" not in scatter([Point(1, 1, EVIL), Point(2, 2, EVIL)], EVIL, EVIL)


def test_the_cost_is_told_with_its_interval() -> None:
    report = full_report()
    assert increase(report["quality"]) == pytest.approx(
        (22.14, 19.77, 24.56), abs=0.01
    )  # exp(0.2 -+ 1.96 * 0.01)
    gained, cost, trust = answers(report)
    assert gained.short == "2.99x smaller" and gained.good
    assert cost.short == "perplexity +22.1 %" and cost.good is False
    assert trust.short == "verified"
    report["quality"]["nll_increase"] = {"value": 0.001, "stderr": 0.002}
    assert answers(report)[1].short == "no measurable loss"
    report["quality"]["nll_increase"] = {"value": 0.001, "stderr": 0.2}
    assert answers(report)[1].short == "too few windows to tell"
    report["verification"] = {"ok": False, "checks": [{"check": "x", "ok": False, "detail": "it broke"}]}
    assert answers(report)[2].good is False and "it broke" in answers(report)[2].lines


def test_the_line_of_the_best_claims_nothing_between_them() -> None:
    """With less than the bytes of the right one only the left one will do; of speeds it is the other way round."""
    points = [Point(1, 5, "a"), Point(2, 3, "b")]
    bytes_, speed = (scatter(points, "x", "y", [0, 1], more_is_better=more) for more in (False, True))
    assert re.search(r'frontier" d="M[\d. ]+H[\d.]+V', bytes_)
    assert re.search(r'frontier" d="M[\d. ]+V[\d.]+H', speed)


def test_columns_go_up_and_down_from_zero() -> None:
    drawing = columns(["a", "b", "c"], [2.0, -1.0, float("nan")], "x", "y")
    rects = re.findall(r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', drawing)
    (top, up), (zero, down) = [tuple(map(float, rect)) for rect in rects]
    assert top + up == pytest.approx(zero, abs=0.2) and up == pytest.approx(2 * down, abs=0.3)


def test_compare_runs(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "compared.html"
    assert cli.main(["compare", str(runs["4bit"]), str(runs["8bit"]), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "4bit\u00a0*" in out and "perplexity" in out and "A base" in out
    found = Elements(page.read_text())
    assert (
        "8bit" in found.text and [tag for tag, _ in found.tags].count("svg") == 2
    )  # perplexity and KL; no speed was measured
    result = compare([runs["4bit"], runs["8bit"]])
    assert [run.name for run in result.runs] == ["base", "4bit", "8bit"] and not result.caveats
    assert result.runs[1].bytes < result.runs[2].bytes < result.runs[0].bytes
    assert result.runs[1].kl > result.runs[2].kl  # type: ignore[operator]


# --- figures measured later ---------------------------------------------------------------------------------


def task_figures() -> dict[str, Any]:
    """As `evaluate_tasks` gives them with a base."""
    acc = {
        "value": 0.5,
        "stderr": 0.05,
        "base": 0.6,
        "base_stderr": 0.05,
        "difference": -0.1,
        "difference_stderr": 0.02,
        "verdict": "-10.0 ± 2.0 points",
    }
    record = {"questions": 100, "total": 570, "main": "acc", "metrics": {"acc": acc}}
    return {"tasks": {"arc_easy": record}, "verdict": "worse on arc_easy", "protocol": "0-shot, lm-eval"}


def speed_figures() -> dict[str, Any]:
    """As `compare_speed` gives them with a base."""
    sides = {
        side: {"figures": {"decode_b1_p32": {"median": value}, "bytes_on_disk": {"median": 1e6 * value}}}
        for side, value in (("model", 20.0), ("base", 10.0))
    }
    comparison = {
        "decode_b1_p32": {"ratio": 2.0, "within_noise": False},
        "bytes_on_disk": {"ratio": 2.0, "within_noise": True},
    }
    return {**sides, "comparison": comparison, "verdict": "decoding is 2.00x the base's"}


def test_figures_measured_later_are_kept(runs: dict[str, Path], tmp_path: Path) -> None:
    from llmslim.hub import push
    from llmslim.report.card import add_to_report

    folder = Path(shutil.copytree(runs["4bit"], tmp_path / "run"))
    add_to_report(folder, "tasks", task_figures())
    add_to_report(folder, "benchmark", speed_figures())
    report = read_report(folder)
    assert report["tasks"] == task_figures() and report["details"] == read_report(runs["4bit"])["details"]
    text = Elements((folder / "report.html").read_text()).text.replace("\u00a0", " ")
    for words in ("arc_easy (acc)", "0.600 ± 0.050", "-10.0 ± 2.0 points", "On tasks: worse on arc_easy."):
        assert words in text
    assert "In turns with the base: decoding is 2.00x the base's." in answers(report)[0].lines
    for words in ("decode, batch 1, prompt 32", "2.00x", "within noise", "20.0 MB"):
        assert words in text
    assert "## Scores on tasks" in (folder / "report.md").read_text()
    push(folder, "ann/run", dry_run=True)  # still what was verified


@pytest.mark.parametrize("words", [["evaluate", "--tasks", "arc_easy"], ["benchmark"]], ids=" ".join)
def test_what_cannot_be_kept(
    words: list[str], runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for model, more, told in (
        (runs["base"], ["--base", str(runs["base"])], "is no run"),
        (runs["4bit"], [], "name it with --base"),
    ):
        assert cli.main([words[0], str(model), *words[1:], *more, "--save"]) == 2
        assert told in capsys.readouterr().err
    command = [words[0], str(runs["4bit"]), *words[1:]]
    assert cli.main([*command, "--base", str(runs["8bit"]), "--save"]) == 2
    assert "keeps figures beside those of" in capsys.readouterr().err
    if words[0] == "evaluate":
        more = ["--base", str(runs["base"]), "--kv-bits", "2"]
        assert cli.main([*command, *more, "--save"]) == 2
        assert "leave out --kv-bits, or --save" in capsys.readouterr().err
    assert cli.main(["evaluate", str(runs["4bit"]), "--save"]) == 2
    assert "--save is about" in capsys.readouterr().err
