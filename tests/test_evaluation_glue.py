"""Scores on GLUE: the metrics by their formulas, padding, label names, splits, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import AutoModelForSequenceClassification

from llmslim.cli import main
from llmslim.errors import UserError
from llmslim.evaluation.glue import compared, evaluate_glue, interval, overall, predictions
from llmslim.evaluation.paired import shift
from llmslim.loaders.glue import TASKS, Sentences, task_rows
from llmslim.loaders.heads import reading
from llmslim.loaders.models import find
from llmslim.metrics import score
from llmslim.prepare import prepare
from llmslim.pruning.weights import Magnitude
from llmslim.recipe import Recipe
from llmslim.report.answers import answers
from llmslim.report.compare import compare
from llmslim.report.schema import read_report
from tests.glue_data import COLUMNS, write_glue
from tests.tiny import randomize, save_tiny, tiny_config, tiny_tokenizer


def save_classifier(family: str, folder: Path, **config: Any) -> Path:
    """A random classifier, as `tiny.save_tiny` makes models."""
    model = AutoModelForSequenceClassification.from_config(tiny_config(family, **config)).eval()
    randomize(model, 0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_glue(tmp_path_factory.mktemp("data"), ["sst2", "mrpc", "mnli", "stsb"], train=8))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier("bert", tmp_path_factory.mktemp("bert"))


def test_metrics_are_their_formulas() -> None:
    labels = [1] * 6 + [0] * 5
    predicted = [1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0]  # 4 true, 1 false positive; 4 true, 2 false negative
    assert score("accuracy", predicted, labels) == pytest.approx(8 / 11)
    assert score("f1", predicted, labels) == pytest.approx(2 * 4 / (2 * 4 + 1 + 2))
    assert score("matthews", predicted, labels) == pytest.approx((4 * 4 - 1 * 2) / (5 * 6 * 5 * 6) ** 0.5)
    assert score("spearman", [1.0, 2.0, 30.0, 4.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(
        1 - 6 * 2 / (4 * 15)
    )
    # deviations -1.5, -0.5, 0.5, 1.5 and -1.5, -0.5, 1.5, 0.5: 4 / 5
    assert score("pearson", [1.0, 2.0, 4.0, 3.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(0.8)
    for metric in ("matthews", "pearson", "spearman"):
        assert score(metric, [1, 1, 1, 1], [0, 1, 0, 1]) == 0.0


def test_the_interval_of_an_accuracy_is_that_of_a_share() -> None:
    labels, predicted = np.ones(400), np.repeat([1, 0], [320, 80])
    low, high = interval("accuracy", predicted, labels)
    spread = 1.96 * (0.8 * 0.2 / 400) ** 0.5
    assert low == pytest.approx(0.8 - spread, abs=0.01) and high == pytest.approx(0.8 + spread, abs=0.01)
    assert (low, high) == interval("accuracy", predicted, labels)


def test_a_paired_difference_is_of_the_same_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of accuracy the interval is that of the mean of differences; of F1 it is sklearn's on the same draws."""
    from sklearn.metrics import f1_score

    draw = np.random.default_rng(1)
    labels = draw.integers(2, size=500)
    base = np.where(draw.random(500) < 0.15, 1 - labels, labels)
    result = np.where(draw.random(500) < 0.05, 1 - base, base)
    gaps = (result == labels).astype(float) - (base == labels)
    found = compared("accuracy", labels, result, base)
    spread = 1.96 * gaps.std() / 500**0.5
    assert found["difference"] == pytest.approx(gaps.mean())
    assert found["difference_low"] == pytest.approx(gaps.mean() - spread, abs=0.004)
    assert found["difference_high"] == pytest.approx(gaps.mean() + spread, abs=0.004)
    apart = sum((found[f"{side}high"] - found[f"{side}low"]) ** 2 for side in ("", "base_")) ** 0.5
    assert found["difference_high"] - found["difference_low"] < 0.7 * apart  # what is hard for both cancels

    monkeypatch.setattr("llmslim.evaluation.glue.RESAMPLES", 100)
    found, again = compared("f1", labels, result, base), np.random.default_rng(0)
    drawn = [again.integers(500, size=500) for _ in range(100)]
    ours, theirs = ([f1_score(labels[rows], side[rows]) for rows in drawn] for side in (result, base))
    for prefix, values in (("", ours), ("base_", theirs), ("difference_", np.subtract(ours, theirs))):
        ends = found[f"{prefix}low"], found[f"{prefix}high"]
        assert ends == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_a_difference_is_told_by_its_interval() -> None:
    labels, half = np.ones(400), np.repeat([1, 0], [200, 200])
    same, better = compared("accuracy", labels, half, half), compared("accuracy", labels, labels, half)
    assert same["verdict"] == "no measurable loss (+0.0 [+0.0, +0.0] points)"
    assert better["verdict"].startswith("+50.0 [+45.") and "loss" not in better["verdict"]
    few = compared("accuracy", labels[:50], half[:50], half[:50])
    assert few["verdict"].startswith("too few questions to tell (+0.0 [+0.0, +0.0] points, of 50")
    wide = compared("accuracy", labels, half, np.roll(half, 150))  # 150 of 400 are right of one alone
    assert wide["difference"] == 0 and wide["verdict"].startswith("too few questions to tell")
    told = overall({"sst2": {"metrics": {"accuracy": better}}, "mrpc": {"metrics": {"f1": same}}})
    assert told == f"sst2 accuracy {better['verdict']}; no measurable loss on mrpc f1"


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2"])
def test_padding_changes_no_prediction(family: str, data: str) -> None:
    task, tokenizer = TASKS["stsb"], tiny_tokenizer()
    model = AutoModelForSequenceClassification.from_config(tiny_config(family, num_labels=1)).eval()
    randomize(model, 0)
    examples = Sentences(
        task,
        task_rows(task, "validation", data),
        reading(model, tokenizer),
        64,
    )
    assert len(set(examples.lengths)) > 5
    alone, together = (predictions(model, task, examples, size) for size in (1, 16))
    np.testing.assert_allclose(alone, together, atol=1e-4)
    order = torch.arange(len(examples))  # of the rows, not of the lengths
    row = examples.collate([examples[int(order[7])]])
    del row["labels"]
    with torch.no_grad():
        logits = model(**row).logits
    assert float(logits[0, 0]) == pytest.approx(float(together[7]), abs=1e-4)


def test_labels_are_matched_by_name(bert: Path, data: str, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    plain = evaluate_glue(str(bert), ["sst2"], data=data, subset=9)["tasks"]["sst2"]["score"]
    model.config.id2label = {0: "POSITIVE", 1: "NEGATIVE"}
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    named = evaluate_glue(str(tmp_path), ["sst2"], data=data, subset=9)["tasks"]["sst2"]["score"]
    assert named == pytest.approx(1 - plain) and named != plain


def test_the_plan_counts_the_scoring(bert: Path, data: str) -> None:
    """A whole model in float32, and a batch; of a small one that is more than what the run holds of a block."""

    def planned(**evaluation: Any) -> int:
        asked = {"steps": (Magnitude(sparsity=0.5),), "evaluation": {"speed": False, **evaluation}}
        return prepare(str(bert), Recipe.checked(**asked)).plan.peak_memory

    assert planned(glue=["sst2"], glue_data=data) > planned() + 4 * 32 * 128 * 3 * 64


def test_labels_with_names_of_no_task_are_taken_in_their_order(bert: Path, data: str, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    plain = evaluate_glue(str(bert), ["sst2"], data=data, subset=9)["tasks"]["sst2"]["score"]
    model.config.id2label = {0: "bad", 1: "good"}
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert evaluate_glue(str(tmp_path), ["sst2"], data=data, subset=9)["tasks"]["sst2"]["score"] == plain


def changed(root: Path, task: str, column: str, last: Any) -> None:
    """Data of a task whose last validation row has another value."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = next((write_glue(root, [task], 2, 4) / "nyu-mll/glue" / task).glob("validation*"))
    table = pq.read_table(path)
    values = table[column].to_pylist()
    column_of = pa.array([*values[:-1], last])
    pq.write_table(table.set_column(table.column_names.index(column), column, column_of), path)


@pytest.mark.parametrize(
    ("task", "column", "value", "said"),
    [  # GLUE's test parts, whose labels are kept, have -1
        ("sst2", "label", -1, r"has the label -1, and those of sst2 are 0 to 1 \(negative, positive"),
        ("sst2", "label", 2, "Row 4 of nyu-mll/glue:sst2:validation has the label 2"),
        ("sst2", "sentence", None, "Row 4 .* has None in its column 'sentence', which is no text"),
        ("stsb", "label", None, "has the label None, and its labels are numbers"),
    ],
)
def test_rows_that_the_task_cannot_have(
    task: str, column: str, value: Any, said: str, bert: Path, tmp_path: Path
) -> None:
    changed(tmp_path, task, column, value)
    model = str(bert) if task == "sst2" else str(save_classifier("bert", tmp_path / "m", num_labels=1))
    with pytest.raises(UserError, match=said):
        evaluate_glue(model, [task], data=str(tmp_path))


def test_a_sentence_without_a_token_is_scored(tmp_path: Path) -> None:
    """Tokenizers that put nothing around a sentence make none of an empty one."""
    changed(tmp_path, "sst2", "sentence", "")
    model = save_classifier("llama", tmp_path / "m", num_labels=2)
    assert find(str(model)).tokenizer()("")["input_ids"] == []
    assert evaluate_glue(str(model), ["sst2"], data=str(tmp_path))["tasks"]["sst2"]["examples"] == 4


@pytest.mark.parametrize(("without", "found"), [("train", True), ("validation", False)])
def test_only_the_split_that_is_measured_must_be_there(
    without: str, found: bool, bert: Path, tmp_path: Path
) -> None:
    root = write_glue(tmp_path, ["sst2"], train=2, validation=4) / "nyu-mll/glue"
    next((root / "sst2").glob(f"{without}*")).unlink()
    card = (root / "README.md").read_text()
    (root / "README.md").write_text(card.replace(f"  - split: {without}\n    path: sst2/{without}-*\n", ""))
    if found:
        assert evaluate_glue(str(bert), ["sst2"], data=str(tmp_path))["tasks"]["sst2"]["examples"] == 4
        return
    with pytest.raises(UserError, match="No GLUE data for sst2"):
        evaluate_glue(str(bert), ["sst2"], data=str(tmp_path))


def test_mnli_has_two_splits_and_a_subset_is_named(data: str, tmp_path: Path) -> None:
    folder = save_classifier("bert", tmp_path / "m", num_labels=3)
    record = evaluate_glue(str(folder), ["mnli"], data=data, subset=5)
    assert record["tasks"]["mnli"]["metrics"].keys() == {"accuracy", "accuracy_mismatched"}
    assert record["tasks"]["mnli"]["examples"] == 10 and record["tasks"]["mnli"]["total"] == 128
    assert "first 5 examples" in record["protocol"]


def test_all_nine_tasks_have_their_columns_heads_and_official_metrics(tmp_path: Path) -> None:
    data = str(write_glue(tmp_path / "data", list(COLUMNS), train=2, validation=12))
    metrics = {
        1: {"stsb": {"pearson", "spearman"}},
        2: {
            "cola": {"matthews"},
            "sst2": {"accuracy"},
            "mrpc": {"f1", "accuracy"},
            "qqp": {"f1", "accuracy"},
            "qnli": {"accuracy"},
            "rte": {"accuracy"},
            "wnli": {"accuracy"},
        },
        3: {"mnli": {"accuracy", "accuracy_mismatched"}},
    }
    assert {name for tasks in metrics.values() for name in tasks} == set(COLUMNS) == set(TASKS)
    for labels, tasks in metrics.items():
        folder = save_classifier("bert", tmp_path / str(labels), num_labels=labels)
        found = evaluate_glue(str(folder), list(tasks), data=data)["tasks"]
        assert {name: set(record["metrics"]) for name, record in found.items()} == tasks
        assert all(record["examples"] == (24 if name == "mnli" else 12) for name, record in found.items())


def test_the_command_scores_several_tasks(bert: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(bert), "--glue", "sst2,mrpc", "--data", data]
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["tasks"]["mrpc"]["metrics"].keys() == {"f1", "accuracy"}
    assert record["average"] == pytest.approx(sum(t["score"] for t in record["tasks"].values()) / 2)
    assert main([*words, "--subset", "9"]) == 0
    told = capsys.readouterr().out
    assert "9 of 64 examples" in told and "average" in told


@pytest.fixture(scope="module")
def half(bert: Path, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that prunes the classifier, scored on a part of a task."""
    from llmslim import pipeline
    from llmslim.checkpoint.verify import verify

    output = tmp_path_factory.mktemp("runs") / "half"
    asked = {"glue": ["mrpc"], "glue_data": data, "glue_subset": 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify_in_fresh_process", verify)
        patch.setattr("llmslim.evaluation.glue.RESAMPLES", 100)
        pipeline.compress(str(bert), [Magnitude(sparsity=0.8)], output, evaluation=asked)
    return output


def test_a_pruned_classifier_is_scored_beside_its_base(
    half: Path, bert: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmslim.evaluation.glue.RESAMPLES", 100)  # as there
    report = read_report(half)
    ours, theirs = (evaluate_glue(str(folder), ["mrpc"], data=data, subset=20) for folder in (half, bert))
    task = report["glue"]["tasks"]["mrpc"]
    assert task["metrics"].keys() == {"f1", "accuracy"} and task["examples"] == 20
    for name, found in task["metrics"].items():
        own, other = (one["tasks"]["mrpc"]["metrics"][name] for one in (ours, theirs))
        assert {key: found[key] for key in own} == own
        assert [found["base"], found["base_low"], found["base_high"]] == list(other.values())
        assert found["difference"] == pytest.approx(own["value"] - other["value"])
    assert task["base_score"] == theirs["average"] == report["glue"]["base_average"]
    assert "the first 20 examples of each split alone" in report["glue"]["protocol"]

    told = shift(*(task["metrics"]["accuracy"][f"difference{end}"] for end in ("", "_low", "_high")))
    card, page = (half / "README.md").read_text(), (half / "report.html").read_text()
    for text in (card, page, (half / "report.md").read_text()):
        assert told in text and "the first 20 examples of each split alone" in text
    index = yaml.safe_load(card.split("---")[1])["model-index"]
    _, results = model_index_to_eval_results(index)
    assert [(r.metric_name, r.metric_value) for r in results if r.metric_type == "f1"] == [
        ("f1", task["metrics"]["f1"]["value"]),
        ("f1 of the base", task["metrics"]["f1"]["base"]),
    ]
    assert {(r.dataset_type, r.dataset_config) for r in results} == {("nyu-mll/glue", "mrpc")}
    assert {r.dataset_name for r in results} == {"GLUE mrpc (the first 20 examples)"}
    cost = answers(report)[1]
    assert cost.lines == (f"On GLUE: {report['glue']['verdict']}.",) and cost.short != "not measured"


def test_scores_beside_a_base_are_kept(
    half: Path, bert: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(half, tmp_path / "run"))
    words = ["evaluate", str(run), "--glue", "sst2", "--data", data, "--base"]
    assert main([*words, str(bert), "--save"]) == 0
    out, report = capsys.readouterr().out, read_report(run)
    found = report["glue"]["tasks"]["sst2"]["metrics"]["accuracy"]
    gap = " ".join(f"{100 * found[f'difference{end}']:+.2f}" for end in ("", "_low", "_high"))
    assert gap in re.sub(
        r"[\[\],]|(?<= ) +", "", next(line for line in out.splitlines() if "difference" in line)
    )
    assert f"verdict: {report['glue']['verdict']}" in out
    assert "sst2 accuracy, 64 examples" in (run / "report.md").read_text()

    one, other = compare([half, run]).runs, compare([run, shutil.copytree(run, tmp_path / "again")]).runs
    assert other[0].scores == {"sst2": (found["base"], None)} and other[1].scores["sst2"][0] == found["value"]
    assert [run.name for run in one] == ["half", "run"]  # of other examples: no base of both
    assert "examples of GLUE differ" in compare([half, run]).caveats[0]
    assert main([*words, str(half), "--save"]) == 2
    assert "keeps figures beside those of" in capsys.readouterr().err
    assert main([*words, str(save_tiny("bert", tmp_path / "bare"))]) == 2
    assert "bare cannot be scored on sst2: that needs a classification head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"glue": "sst3"}, "Unknown GLUE task 'sst3' (did you mean 'sst2'?"),
        ({"glue": "sst2,mnli"}, "cannot be scored on mnli: that needs a classification head of 3 labels"),
        ({"glue": "rte"}, "No GLUE data for rte"),
        ({"glue": "sst2", "data": "nowhere"}, "with --eval-glue-data FOLDER they are read from FOLDER/nyu"),
        ({"glue": "sst2", "subset": "1"}, "glue_subset"),
        ({"subset": "9"}, "glue_subset is about the scores of a classifier on GLUE: name its tasks"),
    ],
)
def test_a_run_that_cannot_be_scored_is_refused_before_it_begins(
    asked: dict[str, str],
    message: str,
    bert: Path,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = {"glue": "--eval-glue", "subset": "--eval-subset", "data": "--eval-glue-data"}
    asked = {"data": data, **asked} if "glue" in asked else asked
    words = [word for name, value in asked.items() for word in (flags[name], value)]
    command = ["prune", str(bert), "--method", "magnitude", *words, "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--glue", "sst3"], "Unknown GLUE task 'sst3' (did you mean 'sst2'?"),
        (["--glue", ""], "Which GLUE tasks?"),
        (
            ["--glue", "mnli"],
            "needs a classification head of 3 labels, and BertForSequenceClassification has",
        ),
        (["--glue", "sst2", "--data", "nowhere"], "No GLUE data for sst2: there is no folder"),
        (["--glue", "rte"], "with --data FOLDER they are read from FOLDER/nyu-mll/glue"),
        (["--glue", "sst2", "--subset", "0"], "subset 0 is too few"),
        (["--glue", "sst2", "--windows", "3"], "--windows is about perplexity"),
        (["--subset", "3"], "--subset is about the scores of a classifier on GLUE"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    words: list[str], message: str, bert: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [] if "--data" in words or "--glue" not in words else ["--data", data]
    assert main(["evaluate", str(bert), *words, *where]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_a_head_is_refused(data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="LlamaForCausalLM has none; `llmslim finetune` makes one"):
        evaluate_glue(str(save_tiny("llama", tmp_path)), ["sst2"], data=data)


def test_data_are_looked_for_before_the_model() -> None:
    with pytest.raises(UserError, match="No GLUE data for sst2"):
        evaluate_glue("no/such-model", ["sst2"], data="nowhere")
