"""Scores on GLUE: the metrics by their formulas, padding, label names, splits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from llmslim.cli import main
from llmslim.errors import UserError
from llmslim.evaluation.glue import evaluate_glue, interval, predictions
from llmslim.loaders.glue import TASKS, Sentences, task_rows
from llmslim.loaders.heads import reading
from llmslim.metrics import score
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


def test_labels_with_names_of_no_task_are_taken_in_their_order(bert: Path, data: str, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    plain = evaluate_glue(str(bert), ["sst2"], data=data, subset=9)["tasks"]["sst2"]["score"]
    model.config.id2label = {0: "bad", 1: "good"}
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert evaluate_glue(str(tmp_path), ["sst2"], data=data, subset=9)["tasks"]["sst2"]["score"] == plain


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_that_the_task_has_not(label: int, bert: Path, tmp_path: Path) -> None:
    """GLUE's test parts, whose labels are kept, have -1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = next((write_glue(tmp_path, ["sst2"], 2, 4) / "nyu-mll/glue/sst2").glob("validation*"))
    table = pq.read_table(path)
    labels = [*table["label"].to_pylist()[:-1], label]
    pq.write_table(table.set_column(table.column_names.index("label"), "label", pa.array(labels)), path)
    with pytest.raises(
        UserError, match=rf"has a label {label}, and those of sst2 are 0 to 1 \(negative, positive"
    ):
        evaluate_glue(str(bert), ["sst2"], data=str(tmp_path))


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
