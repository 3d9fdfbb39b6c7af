"""report.html, report.md and compare: what they say, that nothing in them is read as code, and older reports."""

from __future__ import annotations

import copy
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from llmslim import cli
from llmslim.errors import UserError
from llmslim.evaluation.damage import Damage
from llmslim.evaluation.scores import TokenScores
from llmslim.report.answers import answers, increase
from llmslim.report.compare import compare, comparison_page
from llmslim.report.html import report_page
from llmslim.report.pareto import frontier
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


# --- compare ------------------------------------------------------------------------------------------------


def test_the_frontier_is_what_no_other_beats() -> None:
    """Against the definition, on random points with ties."""
    generator = torch.Generator().manual_seed(3)
    points = [tuple(map(float, row)) for row in torch.randint(0, 8, (40, 2), generator=generator)]

    def beaten(a: tuple[float, ...], sign: float) -> bool:
        return any(
            sign * b[0] <= sign * a[0] and b[1] <= a[1] and (b[0], b[1]) != (a[0], a[1]) for b in points
        )

    for more_is_better in (False, True):
        expected = {a for a in points if not beaten(a, -1.0 if more_is_better else 1.0)}
        found = frontier(points, more_is_better)
        assert {points[index] for index in found} == expected and len(found) == len(expected)
        assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)
    assert frontier([(1.0, None), (None, 1.0), (2.0, float("inf")), (3.0, 3.0)]) == [3]


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


def written(folder: Path, report: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_what_is_not_alike_is_said(tmp_path: Path) -> None:
    one, other = full_report(), full_report()
    other["base"]["model"] = "another"
    other["quality"]["perplexity"]["protocol"] = "another text"
    other["environment"]["threads"] = 8
    found = compare([written(tmp_path / "one", one), written(tmp_path / "other", other)])
    assert len(found.caveats) == 3 and [run.name for run in found.runs] == ["one", "other"]  # no base of both
    assert all("cannot be compared" in caveat for caveat in found.caveats)
    page = Elements(comparison_page(found))
    assert "Not alike" in page.text and [tag for tag, _ in page.tags].count("svg") == 4


def scored(folder: Path, bytes_on_disk: float, **tasks: float) -> Path:
    """A run of full_report with scores, each 0.1 below the base's."""
    report = full_report()
    report["size"]["result"]["bytes_on_disk"] = bytes_on_disk
    found = {
        name: {
            "questions": 500,
            "main": "acc",
            "metrics": {
                "acc": {
                    "value": value,
                    "stderr": 0.02,
                    "base": value + 0.1,
                    "base_stderr": 0.02,
                    "share": True,
                }
            },
        }
        for name, value in tasks.items()
    }
    report["tasks"] = {"tasks": found, "protocol": "the first 500"} if found else None
    return written(folder, report)


def test_scores_on_tasks_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean is of the tasks that all scored runs have; a high score is good."""
    folders = [
        scored(tmp_path / "small", 50e6, piqa=0.5, arc_easy=0.4),
        scored(tmp_path / "middle", 60e6, piqa=0.4, arc_easy=0.3, boolq=0.9),
        scored(tmp_path / "large", 70e6, piqa=0.6, arc_easy=0.6),
        scored(tmp_path / "unscored", 40e6),
    ]
    found = compare(folders, quality="tasks")
    means = [run.mean_score for run in found.runs]
    assert means[:4] == pytest.approx([0.55, 0.45, 0.35, 0.6]) and means[4] is None  # the base in front
    assert {found.runs[index].name for index in found.best} == {"small", "large"}
    headings, rows = found.tasks
    assert headings == ["run", "piqa", "arc_easy", "boolq", "mean"]
    assert rows[2] == ("middle", "0.400 ± 0.020", "0.300 ± 0.020", "0.900 ± 0.020", "0.350")
    assert rows[0][3] == "1.000 ± 0.020"  # of the base, from the one run that asked it
    assert rows[4] == ("unscored", "-", "-", "-", "-")
    page = Elements(comparison_page(found))
    assert "Mean task score against MB on disk: left and up is better." in page.text
    words = ["compare", *map(str, folders), "--against", "decode", "--quality", "tasks"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "scores on tasks" in out and "mean task score, against decode, tokens/s" in out


def test_encoders_are_compared_by_their_scores(tmp_path: Path) -> None:
    folders = []
    for name, score in (("one", 0.81), ("other", 0.85)):
        glue = {"tasks": {"mrpc": {"score": score, "metrics": {}}}}
        folders.append(written(tmp_path / name, REPORTS["encoder"]() | {"glue": glue}))
    found = compare(folders)
    assert found.quality == "tasks" and "mean task score" in found.picture
    assert found.tasks == (["run", "mrpc"], [("base", "-"), ("one", "0.810"), ("other\u00a0*", "0.850")])


def test_other_questions_are_not_alike(tmp_path: Path) -> None:
    one, other = scored(tmp_path / "one", 5e6, piqa=0.5), scored(tmp_path / "other", 6e6, piqa=0.5)
    report = read_report(other)
    report["tasks"]["protocol"] = "all"
    (other / "report.json").write_text(json.dumps(report))
    (caveat,) = compare([one, other]).caveats
    assert "questions of the tasks differ" in caveat


def test_reports_of_other_versions_and_of_encoders(tmp_path: Path) -> None:
    """An older report lacks what came later; of what was not measured there is a dash, and no picture."""
    old = REPORTS["encoder"]() | {"schema_version": 1}
    assert "verification" in read_report(written(tmp_path / "old", old))
    found = compare([tmp_path / "old", written(tmp_path / "bare", REPORTS["bare"]())])
    assert all(run.perplexity is None for run in found.runs) and not found.best
    assert "No picture" in found.picture and "-" in found.runs[0].cells(False)
    Elements(comparison_page(found))


def refusal(*folders: Path) -> str:
    with pytest.raises(UserError) as caught:
        compare(folders)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = written(tmp_path / "good", full_report())
    assert "two runs or more" in refusal(good)
    assert "twice" in refusal(good, good)
    assert "is no run" in refusal(good, tmp_path) and "is no run" in refusal(good, tmp_path / "missing")
    newer = written(tmp_path / "newer", full_report() | {"schema_version": SCHEMA_VERSION + 1})
    assert "update llmslim" in refusal(good, newer)
    stranger = written(tmp_path / "stranger", {"results": []})
    assert "no report of llmslim" in refusal(good, stranger)
    lacking = copy.deepcopy(full_report())
    del lacking["size"]
    assert "lacks size" in refusal(good, written(tmp_path / "lacking", lacking))
    (stranger / "report.json").write_text("{")
    assert "is damaged" in refusal(good, stranger)
    other = written(tmp_path / "other", full_report())
    assert cli.main(["compare", str(good), str(other), "--quality", "speed"]) == 2
    assert "'speed' is no axis of a comparison: give one of perplexity, kl, tasks." in capsys.readouterr().err
    assert cli.main(["compare", str(good), str(other), "--html", str(tmp_path / "no/x.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


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
    assert cli.main(["evaluate", str(runs["4bit"]), "--save"]) == 2
    assert "--save is about" in capsys.readouterr().err
