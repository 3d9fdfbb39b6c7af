"""push and the Hub: against a small Hub on 127.0.0.1, the command line in processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

from llmslim.report.card import _license
from llmslim.report.head import card_problem
from llmslim.report.index import model_index
from tests import fake_hub
from tests.test_report import full_report
from tests.test_report_page import task_figures
from tests.tiny import save_tiny

ROOT = Path(__file__).parents[1]
WRITE = "hf_annwrites"

# Runs command lines given as JSON, one after the other, and tells exit code, stdout and stderr of each.
RUNNER = """
import contextlib, io, json, sys
from llmslim import cli
told = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    told.append([code, out.getvalue(), err.getvalue()])
assert ("torch" in sys.modules) == any(words[0] != "push" for words in json.loads(sys.argv[1]))
print(json.dumps(told))
"""
LOGITS = """
import sys, torch, llmslim
tokens = torch.arange(5, 37)[None]
here, there = (llmslim.load(name, dtype=torch.float32)[0](tokens).logits for name in sys.argv[1:])
assert torch.equal(here, there)
"""


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class Desk:
    """A Hub, a checkpoint that a run made, and a way to give commands as somebody."""

    def __init__(self, hub: fake_hub.FakeHub, made: Path, home: Path) -> None:
        self.hub, self.made, self.home = hub, made, home

    def run(self, *lines: list[str], token: str | None = WRITE) -> list[Ran]:
        script = self.child(RUNNER, json.dumps(lines), token=token)
        assert script.returncode == 0, script.stderr[-2000:]
        found = [Ran(*one) for one in json.loads(script.stdout.splitlines()[-1])]
        assert not any("hf_" in ran.out + ran.err.replace("hf_token", "") for ran in found)  # nobody's token
        return found

    def child(self, code: str, *words: str, token: str | None = WRITE) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment = {**kept, "PYTHONPATH": str(ROOT), **self.hub.environment(token, self.home)}
        command = [sys.executable, "-c", code, *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    def push(self, name: str, *options: str, folder: Path | None = None, token: str | None = WRITE) -> Ran:
        return self.run(["push", str(folder or self.made), name, *options], token=token)[0]

    def error(self, *words: str, folder: Path | None = None, token: str | None = WRITE) -> str:
        """The one sentence that a refused push gives."""
        ran = self.push(*words, folder=folder, token=token)
        assert ran.code == 2 and not ran.out
        (line,) = [line for line in ran.err.splitlines() if not line.startswith("pushing")]
        return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    from llmslim import pipeline
    from llmslim.checkpoint.verify import verify
    from llmslim.recipe import Recipe

    root = tmp_path_factory.mktemp("hub")
    base = save_tiny("llama", root / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (base / "LICENSE").write_text("MIT\n")
    recipe = Recipe.parse(
        {
            "steps": [
                {"rtn": {"bits": 4, "group_size": 32}},
                {"kv_cache": {"kv_bits": 2, "kv_method": "pca", "kv_group_size": 8, "kv_window": 5}},
            ],
            "calibration": {"num_samples": 4, "seq_len": 64},
            "evaluation": {"windows": 2, "seq_len": 32, "speed": False},
        }
    )
    with patch.object(pipeline, "verify_in_fresh_process", verify):
        pipeline.compress(str(base), recipe, root / "made")
    with fake_hub.running() as hub:
        yield Desk(hub, root / "made", root / "home")


@pytest.fixture
def copy(desk: Desk, tmp_path: Path) -> Path:
    """A copy of the checkpoint that may be spoiled."""
    return Path(shutil.copytree(desk.made, tmp_path / "copy"))


def test_a_push_and_the_way_back(desk: Desk) -> None:
    first, second = desk.run(
        ["push", str(desk.made), "ann/tiny", "--dry-run"], ["push", str(desk.made), "ann/tiny", "--private"]
    )
    assert first.code == second.code == 0, second.err
    assert "model.safetensors" in first.out and "Nothing was sent" in first.out and "Pushed" in second.out
    repo = desk.hub.repos["ann/tiny"]
    assert repo.private and repo.commits == 1
    report = json.loads((desk.made / "report.json").read_text())
    assert {"model.safetensors", "config.json", "tokenizer.json", "LICENSE"} <= report["files"].keys()
    assert {
        *report["files"],
        "README.md",
        "report.json",
        "kv_cache/components.safetensors",
    } <= repo.files.keys()
    for name, content in repo.files.items():
        assert WRITE.encode() not in content
        assert str(desk.made.parent).encode() not in content  # nor where base and result lie on this machine
        if name not in ("README.md", "report.json", "report.md", "report.html", ".gitattributes"):
            assert content == (desk.made / name).read_bytes()
    card = repo.files["README.md"].decode()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "mit" and "rtn" in head["tags"]
    assert 'from_pretrained("ann/tiny")' in card and "vllm serve ann/tiny" in card and '"FOLDER"' not in card

    (desk.made / "thoughts.txt").write_text("not of the run")  # never goes up
    assert "is at" in desk.push("ann/tiny", "--private").out and repo.commits == 1
    loaded = desk.child(LOGITS, str(desk.made), "ann/tiny")
    assert loaded.returncode == 0, loaded.stderr[-2000:]


def test_a_broken_upload_goes_on(desk: Desk) -> None:
    desk.hub.lfs.clear()
    desk.hub.broken = 1
    assert "goes on" in desk.error("ann/broken")
    assert desk.hub.repos["ann/broken"].commits == 0  # made, and empty
    assert desk.push("ann/broken").code == 0
    weights = (desk.made / "model.safetensors").read_bytes()
    assert desk.hub.repos["ann/broken"].files["model.safetensors"] == weights
    desk.hub.repos["ann/broken"].files = {
        ".gitattributes": b""
    }  # a commit that was lost: what was sent is not resent
    desk.hub.calls.clear()
    assert desk.push("ann/broken").code == 0
    assert not [call for call in desk.hub.calls if call.startswith("PUT")]


def test_files_of_another_are_not_overwritten_silently(desk: Desk) -> None:
    theirs = {".gitattributes": b"", "config.json": b"{}", "model-00001-of-00002.safetensors": b"other"}
    desk.hub.repos["ann/theirs"] = fake_hub.Repo(files=dict(theirs))
    found = desk.error("ann/theirs")
    assert "config.json" in found and "model-00001-of-00002.safetensors" in found and "--overwrite" in found
    assert desk.hub.repos["ann/theirs"].files == theirs
    shown, done = desk.run(
        ["push", str(desk.made), "ann/theirs", "--overwrite", "--dry-run"],
        ["push", str(desk.made), "ann/theirs", "--overwrite"],
    )
    assert "replaces another" in shown.out and "deleted" in shown.out and done.code == 0
    files = desk.hub.repos["ann/theirs"].files
    assert "model-00001-of-00002.safetensors" not in files and files["config.json"] != b"{}"


def test_who_may_not(desk: Desk) -> None:
    assert "HF_TOKEN" in desk.error("ann/new", token=None)
    assert "may not write to ann/new" in desk.error("ann/new", token="hf_annreads")
    assert "may not write to bob/new" in desk.error("bob/new")
    assert "does not take this token" in desk.error("ann/new", token="hf_of_nobody")
    assert "is no name for a repository" in desk.error("justaname")
    desk.hub.repos["ann/public"] = fake_hub.Repo()
    assert "public" in desk.error("ann/public", "--private")
    assert "ann/new" not in desk.hub.repos and "bob/new" not in desk.hub.repos


def test_what_is_not_fit_to_go_up(desk: Desk, copy: Path, tmp_path: Path) -> None:
    from llmslim.errors import UserError
    from llmslim.hub import push

    def refused() -> str:
        with pytest.raises(UserError) as caught:
            push(copy, "ann/x", dry_run=True)
        return str(caught.value)

    weights, report = (copy / name for name in ("model.safetensors", "report.json"))
    good, told = weights.read_bytes(), report.read_text()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "model.safetensors" in refused() and "changed since" in refused()
    weights.write_bytes(good)
    (copy / "tokenizer.json").rename(copy / "elsewhere")
    assert "tokenizer.json" in refused()
    (copy / "elsewhere").rename(copy / "tokenizer.json")
    failed = json.loads(told)
    failed["verification"]["ok"] = False
    report.write_text(json.dumps(failed))
    assert "verification" in refused() and "failed" in refused()
    outside = json.loads(told)
    outside["files"]["../base/config.json"] = outside["files"]["config.json"]
    report.write_text(json.dumps(outside))
    assert "../base/config.json" in refused()
    old = json.loads(told)
    del old["files"]
    report.write_text(json.dumps(old))
    assert "older llmslim" in refused()
    for files, field in (
        ({"model.safetensors": 1}, "files.model.safetensors = '1'"),
        (["model.safetensors"], "files = "),
        ({"model.safetensors": {}}, "it lacks files.model.safetensors.bytes"),
        ({"\0": {"bytes": 1, "sha256": ""}}, "files."),
    ):
        report.write_text(json.dumps({**json.loads(told), "files": files}))
        assert f"{report} is damaged: {field}" in refused()
    report.write_text("[")
    assert "damaged" in refused()
    report.unlink()
    assert "no report.json" in refused()
    copy = tmp_path
    assert "is no checkpoint" in refused()


def test_a_card_that_the_hub_rejects(desk: Desk, copy: Path) -> None:
    card = copy / "README.md"
    card.write_text(card.read_text().replace("license: mit", "license: unknown-to-the-hub"))
    desk.hub.calls.clear()
    assert '"license" must be one of' in desk.error("ann/card", folder=copy)
    assert "ann/card" not in desk.hub.repos  # found out before anything was made
    card.write_text(card.read_text() + f"\n{WRITE}\n")
    assert "holds your Hub token" in desk.error("ann/card", folder=copy)


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        ("license: mit\ntags: [a, 4-bit]\nbase_model: a/b", None),
        ("license: Apache 2.0", "license 'Apache 2.0'"),
        ("tags: [4]", "tags holds 4"),
        ("base_model: ./here/model", "no name of a model"),
        ("a: [", "cannot be read"),
        ("just words", "not a mapping"),
        ("model-index: [{name: x, results: [{task: {type: t}}]}]", "lacks"),
        ("model-index: [{name: x, results: [{task: {type: t}, dataset: {name: d, type: d}, metrics: "
         "[{type: perplexity, value: .inf}]}]}]", "no finite number"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_card(head: str, problem: str | None) -> None:
    found = card_problem(f"---\n{head}\n---\n# Title\n")
    assert (found is None) if problem is None else (found is not None and problem in found)
    assert "does not begin" in str(card_problem("# Title\n"))


def test_the_model_index_is_what_the_hub_reads() -> None:
    report = full_report()
    report["quality"]["perplexity"]["text"] = "../shared/data/Salesforce/wikitext:wikitext-2-raw-v1:test"
    name, results = model_index_to_eval_results(model_index(report, "tiny, rtn"))
    assert name == "tiny, rtn"
    assert {(r.dataset_type, r.dataset_config, r.dataset_split) for r in results} == {
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    }
    values = {(result.metric_name, result.metric_value) for result in results}
    assert ("Perplexity", 40.0) in values and ("Perplexity of the base", 32.0) in values
    report["quality"]["perplexity"]["value"] = float("inf")  # the Hub takes no infinity
    assert all(r.metric_value < 100 for r in model_index_to_eval_results(model_index(report, "x"))[1])
    assert model_index(report | {"quality": {"skipped": "an encoder"}}, "x") == []
    _, results = model_index_to_eval_results(
        model_index(report | {"quality": None, "tasks": task_figures()}, "x")
    )
    assert [(r.dataset_name, r.metric_name, r.metric_value) for r in results] == [
        ("arc_easy", "acc", 0.5),
        ("arc_easy", "acc of the base", 0.6),
    ]


@pytest.mark.parametrize(
    ("head", "carried"),
    [
        ("license: mit", {"license": "mit"}),
        ("license: Some License v2", {"license": "other", "license_name": "some-license-v2"}),
        (
            "license: other\nlicense_name: tiny\nlicense_link: LICENSE",
            {"license": "other", "license_name": "tiny", "license_link": "LICENSE"},
        ),
        ("language: en", {}),
    ],
)
def test_the_license_is_carried_over(head: str, carried: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    assert _license(tmp_path) == carried


def test_a_run_ends_in_a_push(desk: Desk, tmp_path: Path) -> None:
    def words(out: str, *more: str) -> list[str]:
        base = str(desk.made.parent / "base")
        return ["quantize", base, "--method", "rtn", "--no-evaluate", "--output", str(tmp_path / out), *more]

    desk.hub.repos["ann/taken"] = fake_hub.Repo(files={"mine": b""})
    alone, taken, done = desk.run(
        words("a", "--private"), words("b", "--push", "ann/taken"), words("c", "--push", "ann/run")
    )
    assert alone.code == taken.code == 2 and "--push" in alone.err and "mine" in taken.err
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.partial").exists()  # refused before the work
    assert done.code == 0 and "Pushed" in done.out, done.err
    assert "report.json" in desk.hub.repos["ann/run"].files


def test_the_hub_is_away(desk: Desk) -> None:
    with fake_hub.running() as gone:
        pass
    elsewhere: Any = Desk(gone, desk.made, desk.home)
    assert "cannot be reached" in elsewhere.error("ann/tiny")
