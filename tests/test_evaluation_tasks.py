"""Tasks of lm-eval: scores as lm-eval's own, paired differences by hand, data from a folder, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.metrics import mean
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llmslim.checkpoint.load import load
from llmslim.cli import main
from llmslim.commands.evaluate import tasks_text
from llmslim.errors import UserError
from llmslim.evaluation import tasks as tasks_module
from llmslim.evaluation.harness import fitting
from llmslim.evaluation.kept import kept_in
from llmslim.evaluation.lm import _compared, evaluate_tasks, grouped, overall
from llmslim.evaluation.paired import difference, spread, verdict
from llmslim.evaluation.tasks import data_from, leaves, load_tasks
from llmslim.kvcache.settings import KVSettings
from llmslim.pipeline import compress
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Evaluation
from llmslim.report.figures import rows
from tests.lm_data import write_lm_data
from tests.tiny import save_tiny

THREE = ["arc_easy", "piqa", "lambada_openai"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_lm_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("model")))


def test_scores_are_lm_evals_to_the_digit(model: str, data: str) -> None:
    loaded, tokenizer = load(model, dtype="float32")
    with data_from(data):  # the only thing of ours in the direct run
        direct = simple_evaluate(
            HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=4),
            tasks=THREE,
            limit=9,
            task_manager=tasks_module.manager_of(THREE),
            bootstrap_iters=1000,
        )
    assert direct is not None
    ours = evaluate_tasks(model, THREE, data=data, limit=9, batch_size=4, dtype="float32")
    for name in THREE:
        for metric, found in ours["tasks"][name]["metrics"].items():
            assert found["value"] == direct["results"][name][f"{metric},none"]
            assert found["stderr"] == direct["results"][name][f"{metric}_stderr,none"]
    assert ours["tasks"]["arc_easy"]["metrics"].keys() == {"acc", "acc_norm"}
    assert ours["tasks"]["lambada_openai"]["main"] == "acc"
    with data_from(data):
        manager = tasks_module.manager_of(["arc_easy"])
        shots = simple_evaluate(
            HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=4),
            tasks=["arc_easy"],
            limit=9,
            num_fewshot=2,
            task_manager=manager,
        )
    ours_shots = evaluate_tasks(
        model, ["arc_easy"], data=data, limit=9, num_fewshot=2, batch_size=4, dtype="float32"
    )
    assert shots is not None
    assert ours_shots["tasks"]["arc_easy"]["data_hash"] == ours["tasks"]["arc_easy"]["data_hash"]
    assert (
        ours_shots["tasks"]["arc_easy"]["metrics"]["acc"]["value"] == shots["results"]["arc_easy"]["acc,none"]
    )
    assert ours["tasks"]["piqa"]["questions"] == 9 and ours["tasks"]["piqa"]["total"] == 16


def test_a_packed_model_beside_its_base(
    model: str, data: str, tmp_path: Path, verified_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    compress(model, [RTN(bits=3, group_size=32)], output=str(tmp_path / "packed"), evaluation=None)
    words = [
        "evaluate",
        str(tmp_path / "packed"),
        "--vs",
        model,
        "--tasks",
        "piqa,lambada_openai",
        "--data",
        data,
    ]
    assert main([*words, "--json", "--limit", "10", "--chat-template"]) == 0
    record = json.loads(capsys.readouterr().out)
    main_ones = [one["metrics"][one["main"]] for one in record["tasks"].values()]
    for found in main_ones:
        assert found["difference"] == pytest.approx(found["value"] - found["base"])
    assert record["average"]["difference"] == pytest.approx(np.mean([one["difference"] for one in main_ones]))
    assert record["tasks"]["lambada_openai"]["metrics"]["perplexity"]["difference"] != 0
    told = tasks_text(record)
    assert "10 of 16 questions" in told and "verdict: " in told and "with chat template" in told


def test_six_answers_of_a_model_beside_itself_prove_nothing(model: str, data: str) -> None:
    record = evaluate_tasks(model, ["arc_easy"], base=model, data=data, limit=6, num_fewshot=1)
    assert record["tasks"]["arc_easy"]["num_fewshot"] == 1
    assert record["verdict"] == "too few questions to tell on arc_easy (6 questions)"
    assert record["average"] is None


def test_a_quantized_cache_is_read_by_what_comes_later(
    model: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmslim.evaluation.lm.KV_CHUNK", 8)
    asked: dict[str, Any] = {"data": data, "limit": 4, "dtype": "float32"}
    small: dict[str, Any] = {"group_size": 8, "window": 0, "sink": 0}
    found = [
        evaluate_tasks(model, ["lambada_openai"], kv_cache=settings, **asked)
        for settings in (None, KVSettings.of(bits=16, **small), KVSettings.of(bits=2, **small))
    ]
    plain, whole, few = (one["tasks"]["lambada_openai"]["metrics"]["perplexity"]["value"] for one in found)
    assert whole == pytest.approx(plain, rel=1e-4)
    assert abs(few - plain) > 1e-3 * plain
    assert "KV cache            2 bits (kivi), read in chunks" in tasks_text(found[2])


def test_kept_answers_are_not_asked_again(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmslim.evaluation.harness import Harness

    rows = []
    run = Harness._model_call
    monkeypatch.setattr(
        Harness, "_model_call", lambda self, x, *a, **k: rows.append(len(x)) or run(self, x, *a, **k)
    )

    def scores(limit: int) -> tuple[Any, int]:
        rows.clear()
        found = evaluate_tasks(
            model, THREE, data=data, limit=limit, dtype="float32", batch_size=4, keep_answers=tmp_path
        )
        return found["tasks"], sum(rows)

    first, asked = scores(4)
    (file,) = tmp_path.iterdir()
    assert asked and scores(4) == (first, 0)
    plain = evaluate_tasks(model, THREE, data=data, limit=4, dtype="float32", batch_size=4)
    assert plain["tasks"] == first
    _, more = scores(6)  # the first four of six are there
    assert 0 < more < asked
    file.write_text(file.read_text()[:-9])  # a line that a kill cut off
    assert scores(6)[1] == 1
    other = str(save_tiny("llama", tmp_path / "other", seed=5))
    evaluate_tasks(other, THREE, data=data, limit=4, dtype="float32", batch_size=4, keep_answers=tmp_path)
    assert len(list(tmp_path.glob("answers-*.jsonl"))) == 2  # of other weights, answers of their own
    rows.clear()
    shared = {"data": data, "limit": 4, "dtype": "float32", "batch_size": 4, "keep_answers": tmp_path}
    assert (
        evaluate_tasks(other, THREE, base=model, **shared)["verdict"] and not rows
    )  # nor as the base of another


def test_kept_answers_are_of_the_adapter_and_the_components_as_they_are(tmp_path: Path) -> None:
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder, name in ((model, "model"), (adapter, "adapter_model")):
        folder.mkdir()
        (folder / f"{name}.safetensors").write_bytes(b"1")
    (model / "kv_cache").mkdir()

    def place(beside: str | None) -> Path:
        return kept_in(tmp_path / "kept", model, beside, "float32").path

    places = [place(None), place(str(adapter))]
    (adapter / "adapter_model.safetensors").write_bytes(b"trained again")
    places.append(place(str(adapter)))
    (model / "kv_cache/components.safetensors").write_bytes(b"2")
    assert len({*places, place(str(adapter))}) == 4 and place(str(adapter)) == place(str(adapter))


def test_equal_answers_to_few_questions_prove_nothing() -> None:
    base = {"value": 1.0, "stderr": 0.0}
    nine = _compared(base, [1.0] * 9, [1.0] * 9, mean)
    assert nine["verdict"].startswith("too few questions to tell (+0.0 ± 17")
    assert _compared(base, [0.0] * 2, [1.0] * 2, mean)["verdict"].startswith("too few questions to tell")
    many = _compared(base, [1.0] * 500, [1.0] * 500, mean)
    assert many["verdict"] == "no measurable loss (+0.0 ± 0.3 points)"
    # a figure that is no share is as it was
    assert _compared(base, [7.0] * 9, [7.0] * 9, mean)["difference_stderr"] == 0


def test_the_paired_error_by_hand() -> None:
    result, base = [1, 0, 0, 1, 0, 1], [1, 1, 0, 1, 1, 0]
    gap, stderr = difference(result, base)
    gaps = np.array([0, -1, 0, 0, -1, 1])
    assert gap == pytest.approx(-1 / 6) and stderr == pytest.approx(gaps.std(ddof=1) / 6**0.5)
    many = np.random.default_rng(0)
    ours, theirs = list(many.normal(size=300)), list(many.normal(size=300))
    closed, booted = (
        difference(ours, theirs),
        difference(ours, theirs, lambda scores: sum(scores) / len(scores)),
    )
    assert closed[0] == pytest.approx(booted[0]) and closed[1] == pytest.approx(booted[1], rel=0.1)
    shift = list(np.array(theirs) + 0.5)  # what is common to both cancels
    assert difference(shift, theirs)[1] == pytest.approx(0, abs=1e-12)
    assert difference([1], [0]) == (-1 + 2, None)


def test_the_verdict_in_words() -> None:
    assert verdict(-0.019, 0.008, 500) == "-1.9 ± 0.8 points"
    assert verdict(-0.004, 0.008, 500) == "no measurable loss (-0.4 ± 0.8 points)"
    assert verdict(-0.004, 0.008, 20) == "no measurable loss (-0.4 ± 0.8 points, of 20 questions)"
    assert verdict(-0.025, 0.067, 40) == "too few questions to tell (-2.5 ± 6.7 points, of 40 questions)"
    assert verdict(0.2, None, 1) == "too few questions to tell"
    assert spread(0.312, 0.12, share=False) == "+0.312 ± 0.12"


def test_no_loss_is_claimed_where_chance_would_hide_one() -> None:
    def task(gap: float, stderr: float, questions: int) -> dict[str, Any]:
        main = {"difference": gap, "difference_stderr": stderr, "share": True}
        return {"questions": questions, "main": "acc", "metrics": {"acc": main}}

    found = {"a": task(-0.02, 0.008, 500), "b": task(-0.004, 0.008, 500), "c": task(-0.02, 0.067, 40)}
    assert overall(found) == (
        "a -2.0 ± 0.8 points; no measurable loss on b; too few questions to tell on c (40 questions)"
    )


def test_rows_follow_the_memory(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, _ = load(model, dtype="float32")
    row = 100 * 4 * (2 * 512 + 2 * 3 * 64 + 4 * 128)
    for free, most in ((8 * row, 4), (row, 1), (1000 * row, 16)):
        monkeypatch.setattr("llmslim.evaluation.harness.available_memory", lambda free=free: free)
        assert fitting(loaded, 100) == most


def test_a_definition_of_ones_own(model: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"q": f"a {n}", "a": n % 2}) + "\n" for n in range(4))
    )
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: "
        + str(tmp_path / "rows.jsonl")
        + "}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_target: a\n"
        "doc_to_choice: ['no', 'yes']\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    record = evaluate_tasks(model, [str(tmp_path / "mine.yaml")])
    assert record["tasks"]["mine"]["questions"] == 4


def test_what_is_better_of_a_group_is_as_its_tasks_say() -> None:
    """Perplexity before accuracy, as lm-eval may list them: the chief metric is the accuracy."""
    figures = {
        "perplexity,none": 9.0,
        "perplexity_stderr,none": "N/A",
        "acc,none": 0.4,
        "acc_stderr,none": 0.1,
    }
    run = {
        "groups": {"both": figures}, "results": {"both": figures}, "group_subtasks": {"both": ["a", "b"]},
        "higher_is_better": {"both": {"perplexity": False, "acc": True}},
    }  # fmt: skip
    record = grouped("both", run, run)
    told = {name: metric["higher_is_better"] for name, metric in record["metrics"].items()}
    assert told == {"perplexity": False, "acc": True} and record["main"] == "acc"


def test_a_group_is_its_tasks(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [task.task_name for task in leaves(load_tasks(["arc_easy", "piqa", "arc_easy"], data))] == THREE[
        :2
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "arc_esy"], "lm-eval has no task 'arc_esy'; the nearest are arc_easy"),
        (["--tasks", ""], "Which tasks?"),
        (["--tasks", "none/of.yaml"], "No task definition at none/of.yaml."),
        (["--tasks", "arc_challenge"], "cannot be had: BuilderConfig 'ARC-Challenge' not found"),
        (["--tasks", "hellaswag"], "--data holds no data set Rowan/hellaswag: put its files"),
        (["--tasks", "piqa", "--num-fewshot", "2"], "takes its few-shot examples from a split"),
        (["--tasks", "piqa", "--limit", "0"], "limit 0 is too few"),
        (["--tasks", "piqa", "--batch-size", "0"], "batch_size 0 is too few"),
        (["--tasks", "piqa", "--windows", "2"], "--windows is about perplexity"),
        (["--tasks", "piqa", "--glue", "sst2"], "--glue and --tasks are different measurements"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_weights(
    words: list[str],
    message: str,
    model: str,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import lm_eval.tasks

    few = Path(lm_eval.tasks.__file__).parent / "arc"  # all of them take ten seconds to read
    monkeypatch.setattr(
        tasks_module, "everything", lambda: TaskManager(include_path=few, include_defaults=False)
    )
    monkeypatch.setattr("llmslim.evaluation.lm.prepared", lambda *_: pytest.fail("weights were loaded"))
    assert main(["evaluate", model, *words, "--data", data]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_without_a_network_the_folder_is_named(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match="cannot be had: Couldn't reach 'baber/piqa' on the Hub; with --data FOLDER it is"
    ):
        load_tasks(["piqa"])
    assert datasets.load_dataset is unreachable


def test_a_recipe_has_its_result_asked(model: str, data: str, tmp_path: Path, verified_here: None) -> None:
    asked = {"windows": 1, "seq_len": 32, "speed": False, "tasks": ("piqa",), "tasks_limit": 4}
    with pytest.raises(UserError, match="--data holds no data set"):  # before anything is computed
        compress(
            model,
            [RTN()],
            output=str(tmp_path / "a"),
            evaluation=Evaluation(**asked, tasks_data=str(tmp_path)),
        )
    result = compress(
        model,
        [RTN(bits=8, group_size=32)],
        output=str(tmp_path / "b"),
        evaluation=Evaluation(**asked, tasks_data=data),
    )
    found = json.loads((tmp_path / "b" / "report.json").read_text())["tasks"]["tasks"]["piqa"]
    assert found["questions"] == 4 and "verdict" in found["metrics"]["acc"]
    assert [row.label for row in rows(result.report) if row.label == "piqa"]


def test_an_encoder_is_refused(data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an encoder"):
        evaluate_tasks(str(save_tiny("bert", tmp_path)), ["piqa"], data=data)
