"""The whole road on tiny models: what a user gets, what a killed run keeps, and what is refused at second 0."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llmslim
from llmslim import pipeline
from llmslim.checkpoint.load import load
from llmslim.distillation.response import Response
from llmslim.errors import UserError
from llmslim.evaluation.run import evaluate
from llmslim.pipeline import compress
from llmslim.plan import SMALL_FILES
from llmslim.prepare import prepare
from llmslim.quantization.gptq import GPTQ
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Calibration, Evaluation, Recipe
from llmslim.recovery.full import Full
from llmslim.recovery.lora import LoRA
from llmslim.work import WorkFolder
from tests.tiny import FAMILIES, save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("verified_here")

ROOT = Path(__file__).parents[1]
QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=4, seq_len=32), "evaluation": None}
LONG = Calibration(num_samples=52, seq_len=32)  # 24 tokens for each of the 64 inputs, and some more
STEP = GPTQ(bits=4, group_size=32, symmetric=False, embeddings_bits=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


EVERY = [(family, STEP) for family in FAMILIES]
EVERY += [(family, RTN(bits=3, group_size=32)) for family in ("llama", "qwen3_moe", "t5")]


@pytest.fixture(scope="module")
def every_family(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[Path, dict[str, Any], dict[str, Any]]]:
    """(family, method) -> output, report, and what one fresh process found when it verified them all."""
    root = tmp_path_factory.mktemp("outputs")
    reports: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for family, step in EVERY:
            probe = root / f"probe-{family}-{step.kind}"

            def keep(folder: Path, made: Path, probe: Path = probe) -> dict[str, Any]:
                shutil.copytree(made, probe)
                return {"ok": True, "checks": []}

            patch.setattr(pipeline, "verify_in_fresh_process", keep)
            output = root / f"{family}-{step.kind}"
            reports[family, step.kind] = (
                output,
                compress(str(folders[family]), [step], output, **QUICK).report,
            )
    script = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from llmslim.checkpoint.verify import verify\n"
        "print(json.dumps([verify(f, Path(f).parent / f'probe-{Path(f).name}') for f in sys.argv[1:]]))\n"
    )
    command = [sys.executable, "-c", script, *(str(output) for output, _ in reports.values())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {key: (*reports[key], checks) for key, checks in zip(reports, found, strict=True)}


@pytest.mark.parametrize(("family", "method"), [(family, step.kind) for family, step in EVERY])
def test_every_family_is_quantized_verified_and_loads(family: str, method: str, every_family: Any) -> None:
    """The fresh process compares hidden states block by block, and logits of the model loaded whole."""
    output, report, verification = every_family[family, method]
    assert verification["ok"], verification["checks"]
    assert {"tensors", "streamed", "whole", "tokenizer"} == {c["check"] for c in verification["checks"]}
    assert verification["max_error"] == 0
    size = report["size"]
    assert size["result"]["bits_per_block_weight"] < 8 < size["base"]["bits_per_block_weight"]
    assert not output.with_name(output.name + ".partial").exists()
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.json", "README.md"} <= names
    assert not any(name.startswith((".", "part-", "progress")) for name in names)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_gptq_keeps_more_than_rounding(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    divergences = []
    options = {**QUICK, "evaluation": Evaluation(windows=4, seq_len=32, speed=False)}
    options["calibration"] = Calibration(num_samples=64, seq_len=32)
    for step in (GPTQ(bits=3, group_size=32), RTN(bits=3, group_size=32)):
        result = compress(str(folders[family]), [step], tmp_path / step.kind, **options)
        divergences.append(result.report["quality"]["kl"]["value"])
    assert 0 < divergences[0] < divergences[1]


class Stop(Exception):
    pass


def stop_at(block: int) -> Any:
    def progress(what: str, done: int, total: int) -> None:
        if what == "gptq" and done == block:
            raise Stop

    return progress


@pytest.mark.parametrize("family", ["llama", "t5", "mixtral"])
@pytest.mark.parametrize("asymmetric", [0.0, 0.5])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    family: str, asymmetric: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    step = STEP.model_copy(update={"input_correction": asymmetric})
    options = (
        {**QUICK, "calibration": LONG} if asymmetric else QUICK
    )  # a short text is not compared with the original
    whole = compress(str(folders[family]), [step], tmp_path / "whole", **options)
    blocks = whole.report["plan"]["blocks"]
    for block in range(blocks + 1):  # each time a little further: blocks done are not done again
        with pytest.raises(Stop):
            compress(str(folders[family]), [step], tmp_path / "out", progress=stop_at(block), **options)
    resumed = compress(str(folders[family]), [step], tmp_path / "out", **options)
    assert resumed.report["run"]["resumed"]
    assert weights(resumed.folder) == weights(whole.folder)
    assert (resumed.folder / "config.json").read_bytes() == (whole.folder / "config.json").read_bytes()
    assert resumed.report["linears"] == whole.report["linears"]


def test_inputs_are_corrected_where_the_text_is_long_enough(folders: dict[str, Path], tmp_path: Path) -> None:
    def quantized(name: str, correction: float, text: Calibration) -> bytes:
        step = STEP.model_copy(update={"input_correction": correction})
        return weights(
            compress(str(folders["llama"]), [step], tmp_path / name, **{**QUICK, "calibration": text}).folder
        )

    short = QUICK["calibration"]
    assert quantized("a", 0.6, short) == quantized("b", 0.0, short)
    assert quantized("c", 0.6, LONG) != quantized("d", 0.0, LONG)


def test_a_killed_process_loses_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    """SIGKILL in the middle of the second block's work, while files may be half-written."""
    whole = compress(str(folders["llama"]), [STEP], tmp_path / "whole", **QUICK)
    script = (
        "import os, signal, sys\n"
        "from llmslim.quantization import gptq\n"
        "calls = []\n"
        "original = gptq.gptq\n"
        "def dying(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 10: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(*args)\n"
        "gptq.gptq = dying\n"
        "import tests.conftest\n"  # which the windows are drawn by
        "from tests.test_pipeline import STEP, QUICK, compress\n"
        f"compress({str(folders['llama'])!r}, [STEP], {str(tmp_path / 'out')!r}, **QUICK)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    state = json.loads((tmp_path / "out.partial" / "progress.json").read_text())
    assert state["passes"]["0"]["blocks"] == 1
    resumed = compress(str(folders["llama"]), [STEP], tmp_path / "out", **QUICK)
    assert resumed.report["run"]["resumed"] and weights(resumed.folder) == weights(whole.folder)


def test_an_unfinished_run_with_other_options_is_not_thrown_away(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        compress(str(folders["llama"]), [STEP], tmp_path / "out", progress=stop_at(1), **QUICK)
    with pytest.raises(UserError, match=r"unfinished run with another steps.*--overwrite"):
        compress(str(folders["llama"]), [RTN(group_size=32)], tmp_path / "out", **QUICK)
    assert (tmp_path / "out.partial" / "progress.json").exists()
    result = compress(str(folders["llama"]), [RTN(group_size=32)], tmp_path / "out", overwrite=True, **QUICK)
    assert not result.report["run"]["resumed"]


@pytest.mark.parametrize("kept", ["part-00001.safetensors", ".pass-0/lanes-1.safetensors"])
def test_what_a_stopped_machine_has_damaged_is_named(
    kept: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        compress(str(folders["llama"]), [STEP], tmp_path / "out", progress=stop_at(1), **QUICK)
    work = tmp_path / "out.partial"
    (work / kept).write_bytes(b"")
    with pytest.raises(UserError) as caught:
        compress(str(folders["llama"]), [STEP], tmp_path / "out", **QUICK)
    assert str(work / kept) in str(caught.value)
    assert str(caught.value).endswith(f"remove {work} and give the same command again.")


def test_files_are_on_the_disk_before_the_state_that_vouches_for_them(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By inode: what is moved to its name, and what lies in the output when it is moved to its place, is synced."""
    synced: set[int] = set()
    moved: list[str] = []
    fsync, replace = os.fsync, os.replace

    def syncing(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def moving(source: Any, target: Any) -> None:
        moved.append(Path(target).name)
        below = [path for path in Path(source).rglob("*") if not path.name.startswith(".")]
        for path in [Path(source), *below] if Path(source) != tmp_path / "out.partial" else below:
            assert path.stat().st_ino in synced, path
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", moving)
    folder = compress(str(folders["llama"]), [STEP], tmp_path / "out", **QUICK).folder
    names = {
        "progress.json",
        "config.json",
        "part-00000.safetensors",
        "lanes-1.safetensors",
        "outer.safetensors",
    }
    assert names | {"probe.json", folder.name} <= set(moved)
    assert tmp_path.stat().st_ino in synced


def test_a_run_does_not_go_on_with_another_library(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        compress(str(folders["llama"]), [STEP], tmp_path / "out", progress=stop_at(1), **QUICK)
    original = importlib.metadata.version
    for name in ("transformers", "tokenizers", "datasets", "peft"):
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.metadata,
                "version",
                lambda asked, name=name: "0.1" if asked == name else original(asked),
            )
            told = rf"another version of {name} \({re.escape(original(name))}, now 0\.1\): "
            with pytest.raises(UserError, match=told):
                compress(str(folders["llama"]), [STEP], tmp_path / "out", **QUICK)
    assert compress(str(folders["llama"]), [STEP], tmp_path / "out", **QUICK).report["run"]["resumed"]


def test_two_steps_equal_the_steps_run_by_hand(folders: dict[str, Path], tmp_path: Path) -> None:
    """A pass over an already compressed folder: MLPs first, then what is left."""
    mlp = GPTQ(bits=3, group_size=32, include=("mlp.*",))
    rest = RTN(bits=8, group_size=32, symmetric=False, exclude=("mlp.*",), embeddings_bits=8)
    both = compress(str(folders["llama"]), [mlp, rest], tmp_path / "both", format="llmslim", **QUICK)
    first = compress(str(folders["llama"]), [mlp], tmp_path / "first", format="llmslim", **QUICK)
    second = compress(str(first.folder), [rest], tmp_path / "second", format="llmslim", **QUICK)
    assert weights(both.folder) == weights(second.folder)
    model, _ = llmslim.load(str(both.folder))
    assert model.model.layers[0].mlp.up_proj.scheme.bits == 3
    assert model.model.layers[0].self_attn.q_proj.scheme.bits == 8
    assert (
        model.lm_head.weight_packed is model.model.embed_tokens.weight_packed
        or not model.config.tie_word_embeddings
    )


def test_same_seed_same_bytes_other_seed_other_samples(folders: dict[str, Path], tmp_path: Path) -> None:
    results = [
        compress(str(folders["qwen3"]), [STEP], tmp_path / str(number), seed=seed, **QUICK)
        for number, seed in enumerate((0, 0, 1))
    ]
    assert weights(results[0].folder) == weights(results[1].folder)
    hashes = [result.report["calibration"]["data_hash"] for result in results]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_report_measures_base_and_result_alike(folders: dict[str, Path], tmp_path: Path) -> None:
    evaluation = Evaluation(windows=3, seq_len=32)
    result = compress(
        str(folders["llama"]), [RTN(bits=8, group_size=32)], tmp_path / "out", evaluation=evaluation
    )
    quality, speed = result.report["quality"], result.report["speed"]
    base, _ = llmslim.load(str(folders["llama"]), dtype="float32")
    from llmslim.evaluation.perplexity import perplexity
    from llmslim.loaders.models import find
    from llmslim.loaders.texts import sample

    text = sample("builtin:test", find(str(folders["llama"])).tokenizer(), 3, 32)
    assert quality["base_perplexity"]["value"] == pytest.approx(perplexity(base, text).value, rel=1e-4)
    assert quality["perplexity"]["value"] == pytest.approx(quality["base_perplexity"]["value"], rel=0.05)
    assert 0 < quality["kl"]["value"] < 0.1
    for side in ("base", "result"):
        assert speed[side]["decode"]["tokens_per_second"] > 0 and speed[side]["peak_memory_mb"] > 100
    assert json.loads((result.folder / "report.json").read_text()) == json.loads(json.dumps(result.report))


@pytest.mark.parametrize(
    ("steps", "fields", "message"),
    [
        ([GPTQ(group_size=48)], {}, r"group_size 48 does not divide the 64 inputs of .*: .*32.*"),
        (
            [GPTQ(group_size=32, symmetric=False)],
            {"format": "compressed-tensors"},
            r"cannot hold this result.*",
        ),
        ([GPTQ(group_size=32, bits=5)], {"format": "gptq"}, r"cannot hold this result.*"),
        ([GPTQ(group_size=32)], {"calibration": Calibration(text="nosuch.txt")}, r"nosuch\.txt"),
        (
            [GPTQ(group_size=32)],
            {"calibration": Calibration(seq_len=100_000)},
            r"100000 is more than the \d+ positions",
        ),
        ([GPTQ(group_size=32, include=("nothing",))], {}, r"Nothing to quantize.*nothing"),
        ([RTN(group_size=32, exclude=("q_prj",))], {}, r"exclude 'q_prj'.*did you mean 'q_proj'\?"),
    ],
)
def test_bad_requests_cost_nothing(
    steps: Any, fields: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        compress(str(folders["llama"]), steps, tmp_path / "out", **{**QUICK, **fields})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "foo"}, r"the recipe: format = 'foo': .*'llmslim'"),
        (
            {"calibration": {"num_sample": 3}},
            r"'num_sample' for calibration \(did you mean 'num_samples'\?\)",
        ),
        ({"evaluation": {"tasks_limit": 3}}, "evaluation: tasks_limit is about tasks"),
        ({"steps": ["gptq"]}, "the recipe: steps = 'gptq'"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"device": "cudaa"}, "device 'cudaa' cannot be used here"),
        ({"colour": 3}, "Unknown option 'colour' for the recipe"),
    ],
)
def test_what_python_asks_for_in_vain_is_told_in_a_sentence(
    fields: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    asked = {"steps": [RTN(group_size=32)], "evaluation": None, **fields}
    with pytest.raises(UserError, match=message):
        compress(str(folders["llama"]), asked.pop("steps"), tmp_path / "out", **asked)
    assert list(tmp_path.iterdir()) == []
    if "device" in fields:
        with pytest.raises(UserError, match=message):
            load(str(folders["llama"]), **fields)


def test_a_plan_tells_of_a_text_that_no_step_looks_at(folders: dict[str, Path]) -> None:
    for step, told in ((RTN(group_size=32), 1), (GPTQ(group_size=32), 0)):
        recipe = Recipe(steps=(step,), **QUICK)
        chosen = prepare(str(folders["llama"]), recipe).plan.chosen
        assert sum("no step looks at a text" in line for line in chosen) == told


@pytest.fixture
def hub(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were fetched of the models hub/<family>, in order."""
    fetched: list[Path] = []

    def snapshot_download(spec: str, revision: str | None, allow_patterns: list[str]) -> str:
        snapshot = tmp_path / "hub" / spec.partition("/")[2] / "a1b2c3"
        assert revision in (None, snapshot.name)
        snapshot.mkdir(parents=True, exist_ok=True)
        for path in sorted({path for pattern in allow_patterns for path in folders[spec[4:]].glob(pattern)}):
            if not (snapshot / path.name).exists():
                shutil.copyfile(path, snapshot / path.name)
                fetched.append(Path(spec) / path.name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return fetched


def test_weights_of_the_hub_are_fetched_when_all_is_checked(
    hub: list[Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    def weights_of(family: str) -> bool:
        return Path("hub", family, "model.safetensors") in hub

    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists"):
        compress("hub/llama", [STEP], tmp_path / "there", **QUICK)
    assert not hub  # nothing at all
    for step, message in ((GPTQ(group_size=48), "does not divide"), (RTN(include=("no",)), "Nothing to")):
        with pytest.raises(UserError, match=message):
            compress("hub/llama", [step], tmp_path / "out", **QUICK)
    taught = Response(teacher="hub/qwen2", max_steps=1, batch_size=2)
    recipe = Recipe(steps=(taught,), **QUICK)
    plan = prepare("hub/llama", recipe, plan_only=True).plan
    assert plan.input_bytes == prepare(str(folders["llama"]), recipe, plan_only=True).plan.input_bytes
    assert not weights_of("llama") and not weights_of("qwen2")
    stray = folders["llama"] / "consolidated.safetensors"
    stray.write_bytes(b"the same once more")
    result = compress("hub/llama", [taught], tmp_path / "out", **QUICK)
    stray.unlink()
    assert weights_of("llama") and weights_of("qwen2") and result.report["verification"]["ok"]
    assert not any(path.name == stray.name for path in hub)
    assert result.report["base"]["revision"] == "a1b2c3"  # the commit, whatever the branch comes to


def test_too_short_a_text_is_refused_with_what_would_do(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words, no more.")
    with pytest.raises(UserError, match=r"short\.txt' has \d+ tokens"):
        prepare(
            str(folders["llama"]),
            Recipe(steps=(STEP,), calibration=Calibration(text=str(tmp_path / "short.txt"))),
        )


def test_one_of_several_processes_refuses(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would do the whole run, and all but one meet the lock of its folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, as torchrun and accelerate set it"):
        compress(str(folders["llama"]), [RTN()], tmp_path / "out", **QUICK)
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_never_replaced_unasked(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("ten years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists|not a model folder"):
            compress(str(folders["llama"]), [STEP], tmp_path / "out", overwrite=overwrite, **QUICK)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "ten years of work"


def test_a_folder_in_the_way_of_the_work_is_not_thrown_away(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UserError, match="is not an unfinished run"):
        compress(str(folders["llama"]), [STEP], tmp_path / "out", overwrite=True, **QUICK)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "ten years of work"


def test_outputs_that_cannot_be_made_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("ten years of work")
    (tmp_path / "out.partial").write_text("ten years of work")
    for output, said in (
        ("file/out", "file, which is a file"),
        ("file/above/out", "file, which is a file"),
        ("out", "is not an unfinished run"),
    ):
        with pytest.raises(UserError, match=said):
            WorkFolder(tmp_path / output, {})
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "mkdir", lambda *args, **options: (_ for _ in ()).throw(PermissionError(13, "no"))
        )
        with pytest.raises(UserError, match="cannot be a folder: no; name another"):
            WorkFolder(tmp_path / "other", {}).save()
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(UserError, match="may not write to; name another"):
        WorkFolder(tmp_path / "other", {})


def test_the_folder_that_one_is_in_is_replaced_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "model")
    with pytest.raises(UserError, match="exists"):
        WorkFolder(Path(), {})
    work = WorkFolder(Path(), {}, overwrite=True)
    work.save()
    assert work.path == tmp_path / "model.partial"
    assert work.publish() == tmp_path / "model" and not list(work.output.iterdir())


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"]
)
def test_a_nan_weight_is_named_and_leaves_nothing_that_looks_finished(name: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = save_tiny("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"the tensor {name} has NaN"):
        compress(str(folder), [STEP], tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_quantizing_twice_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    once = compress(str(folders["llama"]), [STEP], tmp_path / "once", **QUICK)
    with pytest.raises(UserError, match="quantized already"):
        compress(str(once.folder), [STEP], tmp_path / "twice", **QUICK)


def test_a_full_disk_is_foreseen(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    with pytest.raises(UserError, match=r"GB free and the run needs"):
        compress(str(folders["llama"]), [STEP], tmp_path / "out", **QUICK)
    assert list(tmp_path.iterdir()) == []
    needed = prepare(str(folders["llama"]), Recipe(steps=(STEP,), **QUICK)).plan.disk_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=needed))
    with pytest.raises(Stop):
        compress(str(folders["llama"]), [STEP], tmp_path / "out", progress=stop_at(1), **QUICK)
    kept = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=needed - kept))
    assert compress(str(folders["llama"]), [STEP], tmp_path / "out", **QUICK).report["run"]["resumed"]


PARTS = [RTN(bits=8, group_size=32, include=("mlp.*",)), RTN(bits=4, group_size=32, exclude=("mlp.*",))]


@pytest.mark.parametrize("killed", ["clear 0", "clear 1", "verify"])
def test_what_is_not_needed_goes_and_a_killed_run_goes_on(
    killed: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear = pipeline._clear

    def clearing(work: WorkFolder, number: int, *rest: Any) -> None:
        if killed == f"clear {number}":
            raise Stop
        clear(work, number, *rest)

    def progress(what: str, *rest: Any) -> None:
        if what == killed:
            raise Stop

    whole = compress(str(folders["llama"]), PARTS, tmp_path / "whole", **QUICK)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(pipeline, "_clear", clearing)
        compress(str(folders["llama"]), PARTS, tmp_path / "out", progress=progress, **QUICK)
    left = tmp_path / "out.partial"
    assert (left / ".pass-0").exists() == (killed == "clear 0")
    assert (left / ".step-0/model.safetensors").exists() == (killed != "verify")
    resumed = compress(str(folders["llama"]), PARTS, tmp_path / "out", **QUICK)
    assert resumed.report["run"]["resumed"] and weights(resumed.folder) == weights(whole.folder)
    assert resumed.report["linears"] == whole.report["linears"]


@pytest.mark.parametrize("step", [
    Full(max_steps=4, save_steps=1, batch_size=2, objective="next_token"),
    LoRA(max_steps=4, save_steps=1, batch_size=2, objective="next_token", rank=32, rounding="nearest"),
])  # fmt: skip
@pytest.mark.parametrize("measured", [False, True])
def test_the_plan_knows_what_the_disk_holds_at_most(
    measured: bool, step: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def noting(*args: Any, **options: Any) -> Any:
            held.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))
            return real(*args, **options)

        monkeypatch.setattr(owner, name, noting)

    for owner, name in ((os, "replace"), (shutil, "rmtree"), (Path, "unlink")):  # in front of each it is most
        watch(owner, name)
    evaluation = Evaluation(windows=1, seq_len=32, speed=False, steps=True) if measured else None
    options = {**QUICK, "evaluation": evaluation}
    result = compress(str(folders["llama"]), [step, *PARTS], tmp_path / "out", **options)
    planned = result.report["plan"]["disk_bytes"] - SMALL_FILES
    assert 0.6 * planned < max(held) < planned + 400_000  # tokenizers


def test_the_plan_knows_the_size_of_the_output(folders: dict[str, Path], tmp_path: Path) -> None:
    for family in ("llama", "gpt2", "bert", "mixtral", "t5"):
        result = compress(str(folders[family]), [STEP], tmp_path / family, **QUICK)
        size = (result.folder / "model.safetensors").stat().st_size
        plan = result.report["plan"]
        assert plan["output_bytes"] == pytest.approx(size, rel=0.03)
        stored = load_file(folders[family] / "model.safetensors").values()
        assert plan["input_bytes"] == sum(tensor.numel() * tensor.itemsize for tensor in stored)


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_what_is_stored_in_16_bits_is_computed_with_whatever_is_quick_here(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Some embeddings compute inside blocks: those of T5's positions."""
    options = {**QUICK, "dtype": "bfloat16"}
    half = compress(str(folders[family]), [RTN(bits=8, group_size=32)], tmp_path / "half", **options)
    assert half.report["verification"]["ok"]


def test_tokens_beyond_the_vocabulary_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    folder = str(save_tiny("llama", tmp_path / "small", vocab_size=64))
    for work in (
        lambda: prepare(folder, Recipe(steps=(STEP,), **QUICK)),
        lambda: prepare(folder, Recipe(steps=(RTN(),), evaluation=Evaluation(windows=1, seq_len=32))),
        lambda: evaluate(folder, "builtin", seq_len=32, windows=1),
    ):
        with pytest.raises(UserError, match="gives token .*, and the model has embeddings for 64"):
            work()


def test_a_model_without_a_tokenizer_can_go_unmeasured(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    step = RTN(bits=8, group_size=32)
    with pytest.raises(UserError, match="Without one nothing can be measured: add it, or give --no-evaluate"):
        prepare(str(tmp_path / "bare"), Recipe(steps=(step,)))
    assert compress(str(tmp_path / "bare"), [step], tmp_path / "out", **QUICK).report["verification"]["ok"]
