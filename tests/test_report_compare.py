"""compare: which run no other beats, scores on tasks, and what cannot be laid side by side."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmslim import cli
from llmslim.errors import UserError
from llmslim.report.compare import compare, comparison_page
from llmslim.report.pareto import frontier
from llmslim.report.schema import SCHEMA_VERSION, read_report
from tests.test_report import REPORTS, full_report
from tests.test_report_page import Elements


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


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        ({"size": {}}, "it lacks size.base"),
        ({"size": {"base": [], "result": {}}}, "size.base = '[]'"),
        ({"base": {}}, "it lacks base.model"),
        ({"recipe": {"steps": [{}]}}, "recipe.steps.0 = '{}'"),
        ({"recipe": {"steps": [{"gptq": None}]}}, "recipe.steps.0.gptq = 'None'"),
        ({"quality": {"perplexity": {}}}, "it lacks quality.perplexity.value"),
        ({"speed": {"base": {"decode": {"tokens_per_second": "9"}}}}, "speed.base.decode.tokens_per_second = '9'"),
        ({"environment": 3}, "environment = '3'"),
        ({"tasks": {"tasks": {"piqa": {"main": "acc", "metrics": {"acc": {"share": True}}}}}}, "tasks.tasks.piqa.m"),
        ({"glue": {"tasks": {"mrpc": {}}}}, "it lacks glue.tasks.mrpc.score"),
    ],
)  # fmt: skip
def test_a_damaged_report_is_named_with_its_field(damage: dict[str, Any], field: str, tmp_path: Path) -> None:
    good = written(tmp_path / "good", full_report())
    bad = written(tmp_path / "bad", full_report() | damage)
    assert f"{bad / 'report.json'} is damaged: {field}" in refusal(good, bad)


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = written(tmp_path / "good", full_report())
    assert "two runs or more" in refusal(good)
    assert "twice" in refusal(good, good)
    assert "is no run" in refusal(good, tmp_path) and "is no run" in refusal(good, tmp_path / "missing")
    newer = written(tmp_path / "newer", full_report() | {"schema_version": SCHEMA_VERSION + 1})
    assert "update llmslim" in refusal(good, newer)
    stranger = written(tmp_path / "stranger", {"results": []})
    assert "no report of llmslim" in refusal(good, stranger)
    odd = written(tmp_path / "odd", full_report() | {"schema_version": "2"})
    assert "its schema_version is '2', not a number from 1 to 2" in refusal(good, odd)
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
