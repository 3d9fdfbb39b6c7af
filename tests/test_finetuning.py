"""finetune: classifiers that learn a toy task, resume to the same bytes, and learn from teachers."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llmslim.errors import UserError
from llmslim.evaluation.glue import evaluate_glue
from llmslim.finetuning.finetune import TARGET, Finetune
from llmslim.loaders.glue import TASKS, Sentences, task_rows
from llmslim.loaders.heads import reading
from llmslim.loaders.models import find
from llmslim.metrics import scores
from llmslim.passes import PassOptions
from llmslim.pipeline import compress
from llmslim.prepare import prepare
from llmslim.recipe import Recipe
from llmslim.survey import Look
from llmslim.training import losses
from llmslim.training.batches import ByLength
from llmslim.training.forward import label_logits
from llmslim.training.watch import Watch
from tests.checkpoints import killed_at_training_step
from tests.glue_data import write_glue
from tests.tiny import randomize, save_tiny, tiny_config, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("verified_here")
CALIBRATION = {"num_samples": 4, "seq_len": 32}
QUICK: dict[str, Any] = {"evaluation": None, "calibration": CALIBRATION}
FAST: dict[str, Any] = {"lr": 2e-3, "epochs": 5, "batch_size": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_glue(tmp_path_factory.mktemp("data"), ["sst2", "mrpc", "stsb"]))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: save_tiny(family, root / family) for family in ("bert", "llama", "gpt2", "t5")}


@pytest.fixture(scope="module")
def teacher(folders: dict[str, Path], data: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from llmslim import pipeline
    from llmslim.checkpoint.verify import verify

    output = tmp_path_factory.mktemp("teacher") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify_in_fresh_process", verify)
        finetune(folders["bert"], output, data)
    yield output


def finetune(base: Path, output: Path, data: str, glue: str = "sst2", **fields: Any) -> Any:
    return compress(str(base), [Finetune(glue=glue, data=data, **{**FAST, **fields})], output, **QUICK)


def accuracy(folder: Path, data: str) -> float:
    return evaluate_glue(str(folder), ["sst2"], data=data)["tasks"]["sst2"]["metrics"]["accuracy"]["value"]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_classifier_learns_and_loads_without_llmslim(
    family: str, folders: dict[str, Path], data: str, tmp_path: Path
) -> None:
    result = finetune(folders[family], tmp_path / "c", data)
    assert result.report["verification"]["ok"] and result.report["format"] == "plain"
    found = accuracy(tmp_path / "c", data)
    assert found > 0.9

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "c")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.architectures == [type(model).__name__]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c")
    rows = task_rows(TASKS["sst2"], "validation", data)
    batch = tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")
    batch = {name: tensor for name, tensor in batch.items() if name in reading(model, tokenizer).inputs}
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(-1).tolist()
    assert sum(p == row["label"] for p, row in zip(predicted, rows, strict=True)) / len(rows) == found


def test_a_score_is_learned_too(folders: dict[str, Path], data: str, tmp_path: Path) -> None:
    finetune(folders["llama"], tmp_path / "c", data, "stsb")
    record = evaluate_glue(str(tmp_path / "c"), ["stsb"], data=data)
    assert record["tasks"]["stsb"]["metrics"]["pearson"]["value"] > 0.8


@pytest.mark.parametrize("glue", ["sst2", "stsb"])
def test_the_loss_is_that_of_labels_and_teacher(glue: str, data: str) -> None:
    """alpha weighs the teacher's classes (KL at a temperature) or score (square) against the labels'."""
    task, tokenizer = TASKS[glue], tiny_tokenizer()
    config = tiny_config("bert", num_labels=task.num_labels)
    student, teacher = (AutoModelForSequenceClassification.from_config(config).eval() for _ in range(2))
    randomize(student, 0)
    randomize(teacher, 1)
    rows = task_rows(task, "validation", data)
    examples = Sentences(task, rows, reading(student, tokenizer), 64, reading(teacher, tokenizer))
    batch = examples.collate([examples[index] for index in range(9)])
    inputs = examples.inputs(batch)
    heat = {"temperature": 2.0} if glue == "sst2" else {}
    step = Finetune(glue=glue, teacher="t", alpha=0.3, hidden=0.0, attention=0.0, **heat)
    with torch.no_grad():
        mine, its = (model(**inputs).logits for model in (student, teacher))
        examples.beside = {TARGET: label_logits(teacher, task, examples, 4, lambda done, total: None)}
        taught = examples.collate([examples[index] for index in range(9)])
        found = step.criterion(student, examples.beside[TARGET], examples)[0](student, taught)
    if glue == "sst2":
        p, q = (logits.div(2).softmax(-1) for logits in (its, mine))
        labels = -mine.softmax(-1)[range(9), batch["labels"]].log().mean()
        taught = 4 * (p * (p / q).log()).sum(-1).mean()
    else:
        labels, taught = (mine[:, 0] - batch["labels"]).square().mean(), (mine - its).square().mean()
    torch.testing.assert_close(found, 0.7 * labels + 0.3 * taught)


@pytest.mark.parametrize("glue", ["sst2", "stsb"])
def test_r_drop_weighs_how_far_two_passes_lie_apart(glue: str, data: str) -> None:
    """Both KLs' mean (of a score the square) on top of the labels' loss, with gradients through both passes."""
    task = TASKS[glue]
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert", num_labels=task.num_labels))
    randomize(model, 0)
    examples = Sentences(task, task_rows(task, "validation", data), reading(model, tiny_tokenizer()), 64)
    batch = examples.collate([examples[index] for index in range(9)])
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in examples.inputs(batch).items()}
    plain, step = (Finetune(glue=glue, r_drop=weight) for weight in (0.0, 0.6))

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, model.classifier.weight)[0]

    loss = step.criterion(model, None, examples)[0]
    torch.manual_seed(1)
    found = loss(model.train(), batch)
    torch.manual_seed(1)
    logits = model(**twice).logits
    one, other = logits[:9], logits[9:]
    labels = torch.cat([batch["labels"]] * 2)
    if glue == "sst2":
        p, q = one.softmax(-1), other.softmax(-1)
        apart = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean() / 2
        wanted = -logits.softmax(-1)[range(18), labels].log().mean() + 0.6 * apart
    else:
        apart = (one - other).square().mean()
        wanted = (logits[:, 0] - labels).square().mean() + 0.6 * apart
    assert apart > 1e-3
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradient(found), gradient(wanted))
    model.eval()  # passes without dropout are the same
    torch.testing.assert_close(loss(model, batch), plain.criterion(model, None, examples)[0](model, batch))


def test_r_drop_brings_passes_together(folders: dict[str, Path], data: str, tmp_path: Path) -> None:
    spread = {}
    for weight in (0.0, 5.0):
        finetune(folders["bert"], tmp_path / str(weight), data, r_drop=weight, epochs=3)
        assert accuracy(tmp_path / str(weight), data) > 0.9
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / str(weight)).train()
        texts = [row["sentence"] for row in task_rows(TASKS["sst2"], "validation", data)]
        read = tiny_tokenizer()(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            torch.manual_seed(0)
            found = torch.stack([model(**read).logits.log_softmax(-1)[:, 1] for _ in range(8)])
        spread[weight] = found.std(0).mean()
    assert spread[5.0] < 0.7 * spread[0.0]


def test_the_plan_counts_both_passes(folders: dict[str, Path], data: str) -> None:
    one, two = (
        prepare(str(folders["bert"]), Recipe(steps=(Finetune(glue="sst2", data=data, r_drop=w),), **QUICK))
        for w in (0.0, 1.0)
    )
    steps = [prepared.recipe.steps[0] for prepared in (one, two)]
    assert steps[1].survey_work(0, 0) == 2 * steps[0].survey_work(0, 0)
    assert two.plan.peak_memory > one.plan.peak_memory and two.plan.seconds > one.plan.seconds


def test_a_decoder_without_a_pad_token_gets_one(folders: dict[str, Path], data: str, tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base", pad_token_id=None)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    finetune(base, tmp_path / "c", data, max_steps=2, epochs=1)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "c").config
    assert config.pad_token_id == AutoTokenizer.from_pretrained(tmp_path / "c").pad_token_id is not None


def test_a_killed_run_goes_on_to_the_same_bytes(
    folders: dict[str, Path],
    teacher: Path,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    fields: dict[str, Any] = {"epochs": 2, "save_steps": 5, "validation": 0.2, "teacher": str(teacher)}
    finetune(folders["bert"], tmp_path / "unbroken", data, **fields)
    for step in (8, 19):  # in either epoch
        with killed_at_training_step(step, monkeypatch):
            finetune(folders["bert"], tmp_path / "killed", data, **fields)
    assert finetune(folders["bert"], tmp_path / "killed", data, **fields).report["run"]["resumed"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("unbroken", "killed")]
    assert weights[0] == weights[1]


def test_a_classifier_is_pruned_quantized_and_taught(teacher: Path, data: str, tmp_path: Path) -> None:
    steps: list[Any] = [
        {"layers": {"drop": [1]}},
        {"finetune": {"glue": "sst2", "data": data, "teacher": str(teacher), **FAST}},
        {"rtn": {"bits": 8}},
    ]
    result = compress(str(teacher), Recipe.parse({"steps": steps, **QUICK}), tmp_path / "s")
    assert result.report["verification"]["ok"]
    assert accuracy(tmp_path / "s", data) > 0.9
    from llmslim.checkpoint.load import load

    model, _ = load(str(tmp_path / "s"))
    assert len(model.bert.encoder.layer) == 2
    assert type(model.classifier) is type(model.bert.pooler.dense) is torch.nn.Linear


def test_what_is_inside_is_learned_without_padding(data: str) -> None:
    """A batch and its sentences one by one have the same loss: a mean over tokens, and no trace of padding."""
    task, tokenizer = TASKS["sst2"], tiny_tokenizer()
    student, teacher = (
        AutoModelForSequenceClassification.from_config(tiny_config("bert", num_hidden_layers=n)).eval()
        for n in (1, 3)
    )
    randomize(student, 0)
    randomize(teacher, 1)
    rows = task_rows(task, "validation", data)
    examples = Sentences(task, rows, reading(student, tokenizer), 64, reading(teacher, tokenizer))
    rows = [examples[index] for index in (0, 1, 2)]
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    assert len(set(lengths.tolist())) > 1
    with torch.no_grad():
        beside = (teacher, reading(teacher, tokenizer))
        loss, _ = Finetune(glue="sst2", teacher="t").criterion(student, beside, examples)
        bare, _ = Finetune(glue="sst2", teacher="t", hidden=0.0, attention=0.0).criterion(
            student, beside, examples
        )
        inside = [float(loss(student, b) - bare(student, b)) for b in (examples.collate([r]) for r in rows)]
        batch = examples.collate(rows)
        found = float(loss(student, batch) - bare(student, batch))
    assert found == pytest.approx(float((torch.tensor(inside) * lengths).sum() / lengths.sum()), rel=1e-3)


def test_padding_is_no_part_of_what_is_compared() -> None:
    student, teacher = torch.randn(2, 7, 8), torch.randn(2, 7, 12)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    rows = [
        losses.self_relations(student[i : i + 1, :n], teacher[i : i + 1, :n], 2) for i, n in ((0, 7), (1, 4))
    ]
    wanted = (7 * rows[0] + 4 * rows[1]) / 11  # a mean over tokens
    torch.testing.assert_close(losses.self_relations(student, teacher, 2, mask), wanted)


def test_batches_are_of_like_length_and_told_by_seed_and_epoch() -> None:
    lengths = [1 + (7 * index) % 31 for index in range(403)]
    sampler = ByLength(lengths, 4, 0)
    first = list(sampler)
    assert sorted(first) == list(range(403)) and first == list(sampler)
    spread = [max(b) - min(b) for b in ([lengths[i] for i in first[s : s + 4]] for s in range(0, 400, 4))]
    assert sum(spread) / len(spread) < 2  # of 30
    sampler.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == list(range(403))


def test_the_head_comes_from_the_seed(folders: dict[str, Path], data: str, tmp_path: Path) -> None:
    heads = []  # that one seed gives one head, the test of the killed run shows
    for name, seed in (("a", 0), ("b", 1)):
        step = Finetune(glue="sst2", data=data, max_steps=1, lr=1e-12)
        compress(str(folders["bert"]), [step], tmp_path / name, seed=seed, **QUICK)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        heads.append(model.classifier.weight.detach())
    assert not torch.allclose(heads[0], heads[1], atol=1e-3)


def test_a_head_of_other_labels_is_replaced_and_the_plan_says_so(teacher: Path, data: str) -> None:
    plan = prepare(str(teacher), Recipe(steps=(Finetune(glue="stsb", data=data),), **QUICK)).plan
    wanted = "a fresh classification head (score) in the place of one of 2 labels (negative, positive)"
    assert wanted in plan.chosen
    plan = prepare(str(teacher), Recipe(steps=(Finetune(glue="mrpc", data=data),), **QUICK)).plan
    assert (
        "(not_equivalent, equivalent) in the place of one of 2 labels (negative, positive)" in plan.chosen[0]
    )
    plan = prepare(str(teacher), Recipe(steps=(Finetune(glue="sst2", data=data),), **QUICK)).plan
    assert not any("head" in chosen for chosen in plan.chosen)
    with pytest.raises(
        UserError, match=r"2 labels \(not_equivalent, equivalent\), and that of .* tells negative, pos"
    ):
        evaluate_glue(str(teacher), ["mrpc"], data=data)


def test_a_run_does_not_go_on_with_other_data_or_another_teacher(
    folders: dict[str, Path], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, school = tmp_path / "data", tmp_path / "school"
    write_glue(data, ["sst2"], train=32, validation=8)
    shutil.copytree(teacher, school)
    fields: dict[str, Any] = {"epochs": 4, "save_steps": 2, "teacher": str(school)}
    with killed_at_training_step(4, monkeypatch):
        finetune(folders["bert"], tmp_path / "c", str(data), **fields)
    for file, what in ((next(data.rglob("train*")), "data"), (school / "model.safetensors", "teacher")):
        before = file.stat()
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1000))
        with pytest.raises(UserError, match=f"holds an unfinished run with another {what}"):
            finetune(folders["bert"], tmp_path / "c", str(data), **fields)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert finetune(folders["bert"], tmp_path / "c", str(data), **fields).report["run"]["resumed"]


def test_a_fitting_head_is_kept(teacher: Path, data: str, tmp_path: Path) -> None:
    finetune(teacher, tmp_path / "c", data, max_steps=1, lr=1e-12)
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(folder).classifier.weight
        for folder in (teacher, tmp_path / "c")
    )
    torch.testing.assert_close(before, after)
    lines = [json.loads(line) for line in (tmp_path / "c/training.jsonl").read_text().splitlines()]
    assert lines and lines[0]["method"] == "finetune"


def test_the_report_has_the_scores_on_the_task(teacher: Path, data: str, tmp_path: Path) -> None:
    step = Finetune(glue="sst2", data=data, max_steps=1, lr=1e-12)
    asked = {"speed": False, "glue_subset": 32}  # of the step's own data
    result = compress(str(teacher), [step], tmp_path / "out", evaluation=asked)
    found = result.report["glue"]["tasks"]["sst2"]["metrics"]["accuracy"]
    own = evaluate_glue(str(tmp_path / "out"), ["sst2"], data=data, subset=32)["tasks"]["sst2"]
    assert found["value"] == pytest.approx(own["score"])
    assert (
        found["base"] == found["value"] and found["difference_low"] == 0
    )  # of a classifier that learned nothing
    assert found["low"] <= found["value"] <= found["high"]
    assert "sst2 accuracy" in (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/report.json").read_text())["glue"] == result.report["glue"]


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("bert", {"glue": "sst"}, r"Unknown GLUE task 'sst' \(did you mean 'sst2'"),
        ("bert", {"glue": ""}, "Which task should it learn"),
        ("bert", {"glue": "rte"}, "No GLUE data for rte"),
        ("bert", {"data": "nowhere"}, "No GLUE data for sst2: there is no folder"),
        ("bert", {"alpha": 0.9}, "alpha is about learning from a teacher, and none is given"),
        (
            "llama",
            {"r_drop": 1.0},
            "r_drop 1 compares two passes with dropout, and LlamaConfig of the model has none",
        ),
        ("bert", {"r_drop": 1.0, "teacher": "bert"}, "leave it out, or give hidden 0 and attention 0"),
        ("bert", {"teacher": "bert"}, "The teacher .* cannot be scored|distilled from itself"),
        ("bert", {"teacher": "llama"}, "classification head of 2 labels, and LlamaForCausalLM has none"),
        ("bert", {"max_length": 1000}, "max_length 1000 is more than the 512 positions"),
        ("t5", {}, "'t5' is an encoder-decoder, which llmslim makes no classifier of"),
        ("bert", {"glue": "stsb", "teacher": "bert", "temperature": 2.0}, "stsb is a score without any"),
    ],
)
def test_what_cannot_work_is_refused_before_weights_are_read(
    family: str, fields: dict[str, Any], message: str, folders: dict[str, Path], data: str
) -> None:
    fields = {"glue": "sst2", "data": data, **fields}
    if "teacher" in fields:
        fields["teacher"] = str(folders[fields["teacher"]])
    with pytest.raises(UserError, match=message):
        prepare(str(folders[family]), Recipe.parse({"steps": [{"finetune": fields}], **QUICK}))


def test_a_compressed_model_gets_no_head(folders: dict[str, Path], data: str, tmp_path: Path) -> None:
    compress(str(folders["bert"]), Recipe.parse({"steps": [{"rtn": {"bits": 8}}], **QUICK}), tmp_path / "q")
    with pytest.raises(UserError, match="fine-tune the uncompressed model, and compress that"):
        prepare(str(tmp_path / "q"), Recipe(steps=(Finetune(glue="sst2", data=data),), **QUICK))


def test_a_packed_classifier_is_sent_to_the_one_that_it_was_made_from(data: str, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_config(tiny_config("bert")).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    compress(str(tmp_path / "m"), Recipe.parse({"steps": [{"rtn": {"bits": 8}}], **QUICK}), tmp_path / "q")
    with pytest.raises(UserError, match="fine-tune the model that it was made from, then quantize that"):
        prepare(str(tmp_path / "q"), Recipe(steps=(Finetune(glue="sst2", data=data),), **QUICK))


def test_two_tasks_are_no_recipe(folders: dict[str, Path], data: str) -> None:
    steps = (Finetune(glue="sst2", data=data), Finetune(glue="stsb", data=data))
    with pytest.raises(
        UserError, match="classification head of 1 label, and BertForSequenceClassification has"
    ):
        prepare(str(folders["bert"]), Recipe(steps=steps, **QUICK))


@pytest.mark.parametrize(
    ("best_by", "found", "told"),
    [
        ("eval_score", [-0.05, -0.2], ", validation score -0.2, best -0.05"),
        ("eval_loss", [2.0, 3.0], ", validation loss 3, best 2"),
    ],
)
def test_validations_are_told_with_their_sign(best_by: str, found: list[float], told: str) -> None:
    watch = object.__new__(Watch)
    watch.best_by = best_by
    assert watch._judged(SimpleNamespace(log_history=[{best_by: value} for value in found])) == told


def test_the_best_by_the_metric_is_kept_not_the_lowest_loss(
    folders: dict[str, Path], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made up scores: best at the first validation in training, so that more of it is forgotten, and soon given up."""
    made_up, seen = iter([0.1, 0.9, 0.5, 0.9, 0.1, 0.2]), []

    def scores(task: Any, found: Any, labels: Any) -> dict[str, float]:
        seen.append((task.name, found.shape, labels.shape))
        return {"score": next(made_up)}

    monkeypatch.setattr("llmslim.finetuning.finetune.scores", scores)
    told: list[str] = []
    step = Finetune(
        glue="sst2", data=data, **{**FAST, "epochs": 1}, validation=0.25, save_steps=2, patience=2
    )
    compress(
        str(folders["bert"]), [step], tmp_path / "c", **QUICK,
        progress=lambda what, done, total, note="": told.append(note),
    )  # fmt: skip
    assert seen == [("sst2", (64,), (64,))] * 4  # at the start, and of 192 / 16 / 2 = 6
    lines = [json.loads(line) for line in (tmp_path / "c/training.jsonl").read_text().splitlines()]
    assert [line["eval_score"] for line in lines if "eval_score" in line] == [0.1, 0.9, 0.5, 0.9]
    assert max(line["step"] for line in lines) == 6
    assert any("validation score 0.5, best 0.9" in note for note in told)

    def first(model: Any) -> torch.Tensor:
        return AutoModelForSequenceClassification.from_pretrained(model).classifier.weight

    flat = itertools.chain([-1.0], itertools.repeat(0.0))
    monkeypatch.setattr("llmslim.finetuning.finetune.scores", lambda *of: {"score": next(flat)})
    finetune(folders["bert"], tmp_path / "flat", data, epochs=1, validation=0.25, save_steps=2, patience=1)
    torch.testing.assert_close(
        first(tmp_path / "c"), first(tmp_path / "flat"), rtol=0, atol=0
    )  # both of step 2


def test_the_validation_data_choose(
    folders: dict[str, Path], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who calls the worst the best gets the worst; nothing is learned from what chooses."""
    judged: list[tuple[list[int], float]] = []

    def upside_down(task: Any, found: Any, labels: Any) -> dict[str, float]:
        judged.append((labels.tolist(), scores(task, found, labels)["score"]))
        return {"score": -judged[-1][1]}

    monkeypatch.setattr("llmslim.finetuning.finetune.scores", upside_down)
    step = Finetune(glue="sst2", data=data, **{**FAST, "epochs": 3}, save_steps=4, choose_on_validation=True)
    result = compress(
        str(folders["bert"]), [step], tmp_path / "c", evaluation={"speed": False}, calibration=CALIBRATION
    )
    found = [score for _, score in judged]
    assert (
        len(judged) == 13
    )  # at the start, and 256 / 16 * 3 / 4: all of the training sentences are trained on
    assert min(found) < found[-1] - 0.2
    assert accuracy(tmp_path / "c", data) == pytest.approx(min(found))
    dev = [row["label"] for row in task_rows(TASKS["sst2"], "validation", data)]
    assert all(sorted(labels) == sorted(dev) for labels, _ in judged)
    assert result.report["glue"]["chosen_by_it"]
    assert "sst2 accuracy (of the data that chose the checkpoint)" in (tmp_path / "c/README.md").read_text()


def test_who_chooses_is_one(data: str) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        Finetune(glue="sst2", validation=0.1, choose_on_validation=True)
    assert Finetune(glue="sst2", patience=2, choose_on_validation=True).validates
    names = [path.name for path in Finetune(glue="sst2", data=data, choose_on_validation=True).reads()]
    assert len(names) == 2 and any(name.startswith("validation") for name in names)


def test_validation_scores_as_the_evaluator_does(teacher: Path, data: str) -> None:
    """The judge of a model gives what `evaluate --glue` finds on the same sentences."""
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    step = Finetune(glue="sst2", data=data)
    rows = task_rows(TASKS["sst2"], "validation", data)
    tokenizer = tiny_tokenizer()
    examples = Sentences(TASKS["sst2"], rows, reading(model, tokenizer), 64)
    judge = step.judge(model, examples)
    with torch.no_grad():
        found = judge.predict(model, examples.collate([examples[index] for index in range(len(rows))]))
    scores = judge.scores(found.numpy(), examples.labels.numpy())
    assert scores == {"accuracy": pytest.approx(accuracy(teacher, data)), "score": scores["accuracy"]}


def test_a_teacher_of_segments_sees_them_whatever_its_student_takes(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A BERT knows by token_type_ids which of two sentences a token is of; a DistilBERT knows no such thing."""
    from tokenizers.processors import TemplateProcessing
    from transformers import BertForSequenceClassification

    for family in ("bert", "distilbert"):
        config = tiny_config(family, num_labels=2)
        model = AutoModelForSequenceClassification.from_config(config)
        randomize(model, 0)
        model.save_pretrained(tmp_path / family)
        tokenizer = tiny_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A", pair="$A [SEP] $B:1", special_tokens=[("[SEP]", 2)]
        )
        tokenizer.save_pretrained(tmp_path / family)
        told = json.loads((tmp_path / family / "tokenizer_config.json").read_text())
        told["model_input_names"] = ["input_ids", *["token_type_ids"] * (family == "bert"), "attention_mask"]
        (tmp_path / family / "tokenizer_config.json").write_text(json.dumps(told))
    forward, seen = BertForSequenceClassification.forward, []

    @functools.wraps(forward)  # which inputs a model takes is read from its signature
    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("token_type_ids"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", spy)
    taught = {"teacher": str(tmp_path / "bert"), "hidden": 0.0, "attention": 0.0, "max_steps": 2}
    finetune(tmp_path / "distilbert", tmp_path / "out", data, "mrpc", **taught)
    assert seen and all(types is not None and types.any() and not types.all() for types in seen)


def other_tokens(folder: Path) -> None:
    """Give a saved model a tokenizer that numbers the same words in reverse, special ones apart."""
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    vocabulary = told["model"]["vocab"]
    numbers = sorted(number for word, number in vocabulary.items() if not word.startswith(("[", "<")))
    mirrored = dict(zip(numbers, reversed(numbers), strict=True))
    told["model"]["vocab"] = {word: mirrored.get(number, number) for word, number in vocabulary.items()}
    path.write_text(json.dumps(told))


def test_a_teacher_with_other_tokens_teaches_its_classes(
    folders: dict[str, Path], teacher: Path, data: str, tmp_path: Path
) -> None:
    """Without a label the student learns the task from it."""
    base = tmp_path / "base"
    shutil.copytree(folders["llama"], base)
    other_tokens(base)
    recipe = {"steps": [{"finetune": {"glue": "sst2", "data": data, "teacher": str(teacher)}}], **QUICK}
    with pytest.raises(
        UserError, match=r"differs\): a teacher must have the same, unless .* hidden 0, attention 0"
    ):
        prepare(str(base), Recipe.parse(recipe))
    finetune(base, tmp_path / "c", data, teacher=str(teacher), hidden=0.0, attention=0.0, alpha=1.0)
    assert accuracy(tmp_path / "c", data) > 0.9


def test_a_teacher_is_asked_once_by_its_own_tokenizer(
    folders: dict[str, Path], data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says of the classes is in files, which a run goes on from; the teacher is loaded for what lacks."""
    base, teacher = tmp_path / "llama", tmp_path / "teacher"
    shutil.copytree(folders["llama"], base)
    other_tokens(base)
    finetune(base, teacher, data, epochs=1)
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    monkeypatch.setattr("llmslim.finetuning.finetune.PIECE", 100)
    step = Finetune(glue="sst2", data=data, teacher=str(teacher), hidden=0.0, attention=0.0, batch_size=16)
    told: list[Any] = []
    files = find(str(folders["bert"]))
    options = PassOptions(None, 3, torch.device("cpu"), torch.float32, torch.float32, files)
    look = Look(files, options, lambda *at: told.append(at), tmp_path / "scratch")
    found = step.learned_from(look)
    assert told[-1] == ("teacher", 256, 256) and len(list((tmp_path / "scratch/teacher").iterdir())) == 3
    texts = [row["sentence"] for row in step._rows(look)]
    read = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(read["input_ids"], attention_mask=read["attention_mask"]).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)

    (tmp_path / "scratch/teacher/000000100.safetensors").unlink()
    told.clear()
    torch.testing.assert_close(step.learned_from(look), found, atol=1e-5, rtol=1e-5)
    assert {done for _, done, _ in told} <= set(range(101, 201))
    monkeypatch.setattr(Look, "other", lambda *args: pytest.fail("the teacher is loaded again"))
    step.learned_from(look)


def test_a_teacher_that_is_asked_is_loaded_in_the_type_of_the_products(
    folders: dict[str, Path], data: str, tmp_path: Path
) -> None:
    """In the run's type, converted, its rotary frequencies would be rounded."""
    teacher = tmp_path / "teacher"
    finetune(folders["llama"], teacher, data, epochs=1)
    fields = {"teacher": str(teacher), "hidden": 0.0, "attention": 0.0, "precision": "bfloat16"}
    step = Finetune(glue="sst2", data=data, **fields)
    options = PassOptions(None, 0, torch.device("cpu"), torch.float32, torch.float32, find(str(teacher)))
    look = Look(find(str(folders["bert"])), options, lambda *at: None, tmp_path / "scratch")
    model = AutoModelForSequenceClassification.from_pretrained(teacher, dtype=torch.bfloat16).eval()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    examples = Sentences(TASKS["sst2"], step._rows(look), reading(model, tiny_tokenizer()), 128)
    wanted = label_logits(model, TASKS["sst2"], examples, step.batch_size, lambda *at: None)
    torch.testing.assert_close(step.learned_from(look), wanted, rtol=0, atol=0)


def test_a_teacher_beside_its_student_reads_the_same_tokens(
    folders: dict[str, Path], teacher: Path, data: str, tmp_path: Path
) -> None:
    """Also where its own tokenizer, with the same vocabulary, would put one more at the end."""
    from tokenizers.processors import TemplateProcessing

    shutil.copytree(teacher, tmp_path / "teacher")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    tokenizer.save_pretrained(tmp_path / "teacher")
    fields = {"max_steps": 2, "epochs": 1}
    outputs = [tmp_path / "with", tmp_path / "without"]
    for output, taught in zip(outputs, (tmp_path / "teacher", teacher), strict=True):
        finetune(folders["bert"], output, data, teacher=str(taught), **fields)
    ones = [
        AutoModelForSequenceClassification.from_pretrained(output).classifier.weight for output in outputs
    ]
    torch.testing.assert_close(*ones, rtol=0, atol=0)


def test_a_teacher_of_which_nothing_is_learned_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha 0 and nothing inside leaves nothing to learn"):
        Finetune(glue="sst2", teacher="t", alpha=0.0, hidden=0.0, attention=0.0)


def test_a_teacher_of_fewer_positions_is_refused(folders: dict[str, Path], data: str, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert", max_position_embeddings=24))
    model.save_pretrained(tmp_path / "short")
    tiny_tokenizer().save_pretrained(tmp_path / "short")
    recipe = {"steps": [{"finetune": {"glue": "sst2", "data": data, "teacher": str(tmp_path / "short")}}]}
    with pytest.raises(UserError, match="max_length 128 is more than the 24 positions of the teacher"):
        prepare(str(folders["llama"]), Recipe.parse({**recipe, **QUICK}))


def test_a_decoder_that_names_no_padding_learns_and_teaches(
    folders: dict[str, Path], data: str, tmp_path: Path
) -> None:
    """As one comes that was fine-tuned with a single sentence to a batch."""
    model = AutoModelForSequenceClassification.from_config(
        tiny_config("gpt2", num_labels=2, pad_token_id=None)
    )
    randomize(model, 0)
    model.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    assert model.config.pad_token_id is None
    taught = {"teacher": str(tmp_path / "gpt2"), "hidden": 0.0, "attention": 0.0}
    for base, fields in ((tmp_path / "gpt2", {}), (folders["gpt2"], taught)):
        result = finetune(base, tmp_path / f"out-{len(fields)}", data, max_steps=2, **fields)
        assert result.report["verification"]["ok"]


def test_the_positions_of_roberta_begin_behind_its_padding(data: str, tmp_path: Path) -> None:
    save_tiny("roberta", tmp_path / "roberta", max_position_embeddings=34, pad_token_id=1)
    recipe = {"steps": [{"finetune": {"glue": "sst2", "data": data, "max_length": 33}}], **QUICK}
    with pytest.raises(UserError, match="max_length 33 is more than the 32 positions"):
        prepare(str(tmp_path / "roberta"), Recipe.parse(recipe))


def test_the_plan_knows_the_sentences(data: str) -> None:
    step = Finetune(glue="sst2", data=data, epochs=2)
    assert step.survey_work(0, 0) == 6 * 256 * 13 * 2  # 256 rows in the folder
    assert step.model_copy(update={"data": ""}).survey_work(0, 0) == 6 * 67349 * 13 * 2
    assert step.model_copy(update={"max_steps": 5, "batch_size": 4}).survey_work(0, 0) == 6 * 5 * 4 * 13
    held = step.model_copy(update={"validation": 0.5}).survey_work(0, 0)
    assert held == pytest.approx((6 + 2) / 2 * 256 * 13 * 2, rel=1e-3)
    taught = Finetune(glue="sst2", data=data, epochs=2, teacher="t", max_length=10)
    assert taught.survey_work(0, 0) == 6 * 256 * 10 * 2
    assert taught.keeps_other and taught.asked(0, 0) == 256 * 10 * 2
    classes = taught.model_copy(update={"hidden": 0.0, "attention": 0.0})
    assert not classes.keeps_other and classes.asked(0, 0) == 256 * 10
    few = classes.model_copy(update={"max_steps": 3, "batch_size": 4, "validation": 0.25})
    assert few.asked(0, 0) == 16 * 10 and len(few._rows(SimpleNamespace(seed=0))) == 16


def test_patience_needs_validation() -> None:
    with pytest.raises(ValueError, match="without --validation SHARE or --choose-on-validation there"):
        Finetune(glue="sst2", patience=2)
