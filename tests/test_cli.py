"""The command line: quick; flags are the steps' fields; bad input gets one sentence; stdout holds results."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from llmslim import cli, pipeline
from llmslim.commands.run import RECIPE, STEP, methods_of, recipe_parser, step_parser
from llmslim.errors import UserError, VerificationError
from llmslim.recipe import Calibration, Evaluation, Recipe
from llmslim.step import STEPS, load_steps
from tests.tiny import save_tiny

load_steps()
VERBS = sorted({cls.verb for cls in STEPS.values()})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("bert", tmp_path_factory.mktemp("models") / "bert"))


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a refused command."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in err
    return last


# --- importing and help -------------------------------------------------------------------------------------


def test_importing_llmslim_imports_nothing_heavy() -> None:
    heavy = "('torch', 'transformers', 'pydantic', 'rich')"
    code = f"import sys, llmslim; print([name for name in {heavy} if name in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_help_takes_less_than_half_a_second_of_cpu() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python("-m", "llmslim", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "quantize" in done.stdout
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.5


def test_help_lists_the_verb_of_every_step_without_importing_it() -> None:
    assert sorted(cli.step_verbs()) == VERBS
    for verb, summary in cli.step_verbs().items():
        assert f"{verb:<10} {summary}" in cli.overview()
    assert cli.step_verbs()["quantize"].startswith(
        "Quantize the weights"
    )  # not that of a room with one method


def test_public_names_resolve() -> None:
    import llmslim

    for name in llmslim.__all__:
        assert getattr(llmslim, name).__name__ == name
    for cls in STEPS.values():  # a method needs no line in __init__.py
        assert getattr(llmslim, cls.__name__) is cls
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = llmslim.Nonsense


@pytest.mark.parametrize("verb", ["inspect", "compress", "evaluate", "generate", *VERBS])
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"usage: llmslim {verb} MODEL" in text and "example" in text
    assert max(map(len, text.splitlines())) <= 120


# --- flags are fields ---------------------------------------------------------------------------------------


def typed(annotation: Any, flag: str) -> tuple[list[str], Any]:
    """Words that set a field of that type, and what the parser should make of them."""
    if annotation is bool or bool in get_args(annotation):
        return [f"--no-{flag[2:]}"], False
    if flag in ("--include", "--exclude", "--target-modules"):
        return [flag, "a", flag, "b"], ["a", "b"]
    if flag == "--override":
        words = [flag, "*.a:bits=8,group_size=32", flag, "b:symmetric=false"]
        return words, {"*.a": {"bits": 8, "group_size": 32}, "b": {"symmetric": False}}
    if flag == "--retrain":
        return [flag, "full:max_steps=3"], {"full": {"max_steps": 3}}
    if flag == "--target-size":
        return [flag, "150MB"], "150MB"
    if annotation is str:
        return [flag, "a"], "a"
    if annotation is float or float in get_args(annotation):
        return [flag, "0.5"], 0.5
    if annotation is int or int in get_args(annotation):
        return [flag, "8"], 8
    choice = get_args(annotation)[0 if type(None) in get_args(annotation) else -1]
    choice = get_args(choice)[-1] if get_args(choice) else choice
    return [flag, choice], choice


NEEDED: dict[str, dict[str, Any]] = {
    "longest": {"grouping": "similarity"},
    "owl_outlier": {"layer_sparsity": "owl"},
    "sparsity_range": {"layer_sparsity": "owl"},
    "ramp": {"rounds": 2},
    "patience": {"validation": 0.5},
    "rewind": {"retrain": {"full": {"objective": "next_token"}}},
    "ratio_range": {"allocation": "sensitivity"},
    "refit_damping": {"refit": True},
    "dropout": {"objective": "next_token"},
    "kv_budget": {"kv_bits": "auto"},
    "kv_evict": {"kv_keep": 0.5},
    "kv_keep": {"kv_evict": "knorm"},
    "activation_scale": {"activation_bits": 8},
    **{
        name: {"teacher": "a"}
        for name in (
            *("temperature", "hidden", "attention", "attention_maps"),
            *("distance", "angle", "token_distance", "token_angle"),
        )
    },
    "layer_map": {"teacher": "a", "hidden": 1},
    "relation_heads": {"teacher": "a", "attention": 1},
}
"""Fields that are refused without another one."""


@pytest.mark.parametrize("verb", VERBS)
def test_every_field_of_every_step_has_a_flag_that_help_explains(verb: str) -> None:
    parser = step_parser(f"llmslim {verb}", verb)
    text = " ".join(parser.format_help().split())
    actions = {action.dest: action for action in parser._actions}
    for kind, cls in methods_of(verb).items():
        assert kind in text and (cls.__doc__ or "").splitlines()[0] in text
        for name, field in cls.model_fields.items():
            action = actions[STEP + name]
            assert field.description, f"{kind}.{name} has no description"
            assert " ".join(field.description.split()) in text
            words, value = typed(field.annotation, action.option_strings[0])
            options = parser.parse(["model", "--method", kind, *words])
            assert options[STEP + name] == value
            assert (
                getattr(cls(**NEEDED.get(name, {}), **{name: value}), name) is not None
            )  # the field takes what the flag gives


def test_methods_that_share_a_flag_each_take_words_of_their_own() -> None:
    parser = step_parser("llmslim prune", "prune")
    (action,) = [action for action in parser._actions if action.dest == f"{STEP}criterion"]
    methods = methods_of("prune")
    taken = {kind: get_args(methods[kind].model_fields["criterion"].annotation) for kind in ("mlp", "layers")}
    assert set(str(action.metavar).split("|")) == {word for words in taken.values() for word in words}
    assert "layers: influence, change of" in str(action.help)
    with pytest.raises(ValidationError, match="'influence', 'angular', 'perplexity' or 'random'"):
        methods["layers"](criterion="obs")


def test_a_training_needs_no_options() -> None:
    options = step_parser("llmslim prune", "prune").parse(["model", "--method", "mlp", "--retrain", "full"])
    assert options[f"{STEP}retrain"] == {"full": {}}


def test_untyped_flags_leave_no_trace() -> None:
    assert step_parser("llmslim quantize", "quantize").parse(["m"]) == {"model": "m", "verb": "quantize"}


@pytest.mark.parametrize("make", [lambda: step_parser("p", "quantize"), lambda: recipe_parser("p")])
def test_every_field_of_the_recipe_has_a_flag(make: Any) -> None:
    dests = {action.dest.removeprefix(RECIPE) for action in make()._actions if action.dest.startswith(RECIPE)}
    sections = {"calibration": Calibration, "evaluation": Evaluation}
    expected = {f"{section}.{name}" for section, cls in sections.items() for name in cls.model_fields}
    expected |= {name for name in Recipe.model_fields if name not in (*sections, "steps")}
    assert expected <= dests


# --- what reaches the pipeline ------------------------------------------------------------------------------


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The arguments of `compress`, which is replaced."""
    from tests.test_report import full_report

    seen: dict[str, Any] = {}

    def compress(model: str, recipe: Recipe, output: str, **options: Any) -> pipeline.Result:
        options.pop("progress")("gptq", 1, 2)
        seen.update(model=model, recipe=recipe, output=output, **options)
        return pipeline.Result(tmp_path / output, full_report())

    monkeypatch.setattr(pipeline, "compress", compress)
    return seen


def test_flags_become_a_recipe(reached: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = "--method gptq --bits 3 --group-size channel --no-symmetric --override *.o_proj:bits=8 --seed 7"
    run = "--calibration a.txt --num-samples 4 --seq-len 64 --evaluate b.txt --eval-windows 3 --no-speed "
    run += "--measure-steps --eval-tasks arc_easy,piqa --eval-limit 9 "
    run += "--eval-glue sst2,rte --eval-subset 5 --eval-glue-data c"
    assert (
        cli.main(["quantize", "demo", *words.split(), *run.split(), "--format", "gptq", "--output", "out"])
        == 0
    )
    recipe = reached["recipe"]
    step = recipe.steps[0]
    assert (step.kind, step.bits, step.group_size, step.symmetric) == ("gptq", 3, "channel", False)
    assert step.overrides == {"*.o_proj": {"bits": 8}}
    assert recipe.calibration == Calibration(text="a.txt", num_samples=4, seq_len=64)
    asked: dict[str, Any] = {"tasks": ("arc_easy", "piqa"), "tasks_limit": 9}
    asked |= {"glue": ("sst2", "rte"), "glue_subset": 5, "glue_data": "c"}
    assert recipe.evaluation == Evaluation(text="b.txt", windows=3, speed=False, steps=True, **asked)
    assert (recipe.seed, recipe.format) == (7, "gptq")
    assert not reached["overwrite"] and reached["device"] is None
    out = capsys.readouterr().out
    assert "size on disk" in out and "Saved to" in out


def test_a_recipe_file_with_overrides_in_any_place(reached: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("steps:\n- gptq: {bits: 4}\n- rtn: {include: ['lm_head']}\nseed: 1\n")
    words = [
        "compress",
        "demo",
        str(path),
        "gptq.bits=3",
        "--output",
        "out",
        "calibration.num_samples=5",
        "--seed",
        "9",
    ]
    assert cli.main([*words, "--no-evaluate", "--overwrite", "--calibration", "ä 😀.txt"]) == 0
    recipe = reached["recipe"]
    assert recipe.calibration.text == "ä 😀.txt"
    assert [step.bits for step in recipe.steps] == [3, 4]
    assert (recipe.calibration.num_samples, recipe.seed, recipe.evaluation) == (5, 9, None)
    assert reached["overwrite"]


def test_threads_are_set_for_the_run_and_its_children(
    reached: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    import torch

    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        assert cli.main(["quantize", "demo", "--method", "rtn", "--output", "out", "--threads", "3"]) == 0
        assert torch.get_num_threads() == 3 and os.environ["OMP_NUM_THREADS"] == "3"
    finally:
        torch.set_num_threads(before)


# --- bad input ----------------------------------------------------------------------------------------------

QUANTIZE = ["quantize", "demo", "--method", "rtn", "--output", "out"]
PRUNE = ["prune", "demo", "--method", "mlp", "--output", "out"]
RECOVER = ["recover", "demo", "--method", "full", "--output", "out"]
BAD = {
    "misspelt verb": (["quantise", "demo"], "did you mean 'quantize'?"),
    "misspelt option": ([*QUANTIZE, "--bit", "3"], "Unknown option --bit (did you mean '--bits'?)"),
    "abbreviation": ([*QUANTIZE, "--embeddings", "8"], "did you mean '--embeddings-bits'?"),
    "misspelt method": (["quantize", "demo", "--method", "gtpq"], "did you mean 'gptq'?"),
    "no method": (["quantize", "demo"], "--method autoround or bnb or gptq or kv_cache or qat or rtn"),
    "no output": (["quantize", "demo", "--method", "rtn"], "--output FOLDER"),
    "no model": (["inspect"], "required: MODEL"),
    "another method's option": (
        [*QUANTIZE, "--damp-percent", "0.1"],
        "--damp-percent is an option of gptq, not of rtn",
    ),
    "another method's switch": (
        ["quantize", "d", "--method", "gptq", "--no-search"],
        "an option of rtn, not of gptq",
    ),
    "bits": ([*QUANTIZE, "--bits", "9"], "bits = 9"),
    "bits in words": ([*QUANTIZE, "--bits", "four"], "'four'"),
    "group size": ([*QUANTIZE, "--group-size", "2"], "at least 8 inputs"),
    "override": ([*QUANTIZE, "--override", "bits=8"], "PATTERN:KEY=VALUE"),
    "override's key": ([*QUANTIZE, "--override", "a:bit=8"], "'bit'"),
    "override's group": (
        [*QUANTIZE, "--override", "a:group_size=0"],
        "group_size = 0: a group has at least 8",
    ),
    "override's bits": ([*QUANTIZE, "--override", "a:bits=9"], "rtn: bits = 9: Input should be less than"),
    "retrain": ([*PRUNE, "--retrain", "full="], "METHOD[:KEY=VALUE,...], such as 'full:max_steps=50'"),
    "retrain's method": ([*PRUNE, "--retrain", "fill"], "did you mean 'full'?"),
    "no end": ([*RECOVER, "--epochs", "inf"], "epochs = inf: Input should be a finite number"),
    "no rate": ([*RECOVER, "--lr", "inf"], "lr = inf: Input should be a finite number"),
    "format": ([*QUANTIZE, "--format", "gguf"], "format = 'gguf'"),
    "samples": ([*QUANTIZE, "--num-samples", "0"], "num_samples = 0"),
    "seed": ([*QUANTIZE, "--seed", "-1"], "seed"),
    "big seed": ([*QUANTIZE, "--seed", "99999999999999999999"], "seed = 99999999999999999999: Input should"),
    "long training": ([*RECOVER, "--epochs", "1e300"], "epochs = 1e+300: Input should be less than"),
    "many steps": ([*RECOVER, "--max-steps", "9" * 300], "Input should be less than or equal to 1000000000"),
    "device": ([*QUANTIZE, "--device", "cuda:77"], "device 'cuda:77'"),
    "device without values": ([*QUANTIZE, "--device", "meta"], "'meta'"),
    "threads": ([*QUANTIZE, "--threads", "0"], "--threads 0"),
    "a word too many": ([*QUANTIZE, "more"], "'more' is one word too many"),
    "a value too few": ([*QUANTIZE, "--bits"], "expected one argument"),
    "contradiction": (
        [*QUANTIZE, "--no-evaluate", "--eval-windows", "3"],
        "--eval-windows and --no-evaluate",
    ),
    "measured steps": ([*QUANTIZE, "--no-evaluate", "--measure-steps"], "--measure-steps and --no-evaluate"),
    "no text to read": (
        [*QUANTIZE, "--calibration", "/no/such.txt", "--num-samples", "7"],
        "--calibration and --num-samples would change nothing: rtn",
    ),
    "limit of no task": ([*QUANTIZE, "--eval-limit", "5"], "evaluation: tasks_limit is about tasks"),
    "data of no task": ([*QUANTIZE, "--eval-data", "/no/such"], "evaluation: tasks_data is about tasks"),
    "no recipe": (["compress", "demo", "none.yaml", "--output", "out"], "No recipe at none.yaml"),
    "no model there": (["inspect", "./nowhere"], "'./nowhere'"),
    "no such file": (["quantize", "./x.gguf", "--method", "rtn", "--output", "out"], "'./x.gguf'"),
    "evaluation's length": (["evaluate", "demo", "--seq-len", "1"], "seq_len = 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv, said = BAD[name]
    assert said in refusal(argv, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps:\n- gptq: {bit: 3}\n", "did you mean 'bits'?"),
        ("steps:\n- gtpq: {}\n", "did you mean 'gptq'?"),
        ("steps:\n- gptq: {}\nsede: 3\n", "did you mean 'seed'?"),
        ("steps: [", "not valid YAML"),
        ("- gptq: {}\n", "mapping with a list of steps"),
        ("steps: 3\n", "mapping with a list of steps"),
        ("steps:\n- gptq: 3\n", "gptq takes options by name"),
    ],
)
def test_a_bad_recipe(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert said in refusal(["compress", "demo", str(path), "--output", str(tmp_path / "out")], capsys)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rtn.bits=3", "the recipe has no 'rtn'; what can be changed is gptq, steps, calibration"),
        ("gtpq.bits=3", "the recipe has no 'gtpq' (did you mean 'gptq'?"),
        ("sede=3", "did you mean 'seed'?"),
        ("gptq.bit=3", "did you mean 'bits'?"),
        ("gptq.bits=[3", "'[3' is not a value"),
        ("gptq=3", "gptq takes options by name"),
        ("gptq.bits", "write key=value"),
        ("seed.bits=3", "'seed' has no keys below it"),
    ],
)
def test_a_bad_override(override: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("steps:\n- gptq\nseed: 1\n")
    assert said in refusal(["compress", "demo", str(path), override, "--output", "out"], capsys)


def test_an_override_reaches_a_step_that_is_only_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("steps: [gptq, rtn, gptq]\n")
    steps = Recipe.read(path, ["gptq.bits=3", "rtn.bits=8"]).steps
    assert [step.bits for step in steps] == [3, 8, 3]  # type: ignore[attr-defined]


def test_bad_requests_for_a_real_model(
    model: str, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short a text.")
    text = ["--perplexity", str(short), "--seq-len", "64"]
    assert "64 tokens" in refusal(["evaluate", model, *text], capsys)
    assert "encoder" in refusal(["evaluate", encoder, "--seq-len", "64", "--windows", "1"], capsys)
    assert "512 positions" in refusal(["evaluate", model, "--seq-len", "513"], capsys)
    assert "does not continue texts" in refusal(["generate", encoder, "Hello"], capsys)
    assert "empty" in refusal(["generate", model, ""], capsys)
    assert "positions" in refusal(["generate", model, "Hello", "--max-new-tokens", "512"], capsys)
    assert "max_new_tokens = 0" in refusal(["generate", model, "Hello", "--max-new-tokens", "0"], capsys)
    for temperature in ("nan", "inf", "-1", "1e-30"):
        said = refusal(["generate", model, "Hello", "--temperature", temperature], capsys)
        assert f"temperature = {temperature} cannot be sampled at: 0 is greedy" in said
    existing = ["quantize", model, "--method", "rtn", "--group-size", "32", "--output", str(tmp_path)]
    assert "--overwrite" in refusal([*existing, "--plan"], capsys)
    assert "--overwrite" in refusal(existing, capsys)
    wrong = refusal(["quantize", model, "--method", "rtn", "--group-size", "48", "--plan"], capsys)
    assert "does not divide" in wrong and "64" in wrong


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "float8_e4m3fn", "nn"])
def test_a_type_that_nothing_is_computed_in(
    dtype: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["generate", model, "Hello"], ["evaluate", model, "--windows", "1", "--seq-len", "64"]):
        assert f"Unknown dtype '{dtype}'; there are auto, float32" in refusal(
            [*words, "--dtype", dtype], capsys
        )


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(UserError, match="nowhere"):
        cli.main(["inspect", "./nowhere", "--debug"])


# --- other ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "The same command goes on where this one stopped"),
        (OSError(28, "No space left on device"), 1, "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "the disk is full"),
        (MemoryError(), 1, "memory ran out"),
        (
            VerificationError("The checkpoint is not what was made"),
            1,
            "error: The checkpoint is not what was made",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 1, "memory ran out"),
    ],
)
def test_other_ends_are_told(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def compress(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "compress", compress)
    assert cli.main(QUANTIZE) == code
    assert said in capsys.readouterr().err


def test_a_defect_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def compress(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "compress", compress)
    with pytest.raises(ZeroDivisionError):
        cli.main(QUANTIZE)


@pytest.mark.parametrize("words", [[], ["--sensitivity", "--output", "out"]])
def test_an_interrupted_reading_promises_nothing(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmslim.commands.inspect.run", run)
    assert cli.main(["inspect", "demo", *words]) == 130
    assert capsys.readouterr().err == "error: interrupted.\n"


# --- the verbs on a real, tiny model ------------------------------------------------------------------------


def test_plan_says_and_creates_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(Path(model).iterdir())
    words = [
        "--method",
        "gptq",
        "--group-size",
        "32",
        "--seq-len",
        "64",
        "--num-samples",
        "2",
        "--eval-seq-len",
        "64",
    ]
    assert cli.main(["quantize", model, *words, "--output", "out", "--plan"]) == 0
    out = capsys.readouterr().out
    for word in ("peak memory", "time", "disk", "format", "3, read one block at a time"):
        assert word in out
    assert not list(tmp_path.iterdir()) and sorted(Path(model).iterdir()) == before


def test_inspect_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["stacks"][0]["blocks"] == 3 and facts["format"] is None
    assert facts["unmatched"] == []
    assert cli.main(["inspect", model]) == 0
    assert "num kv heads" in capsys.readouterr().out


def test_evaluate_in_memory_and_streamed_agree(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "evaluate",
        model,
        "--base",
        model,
        "--perplexity",
        "builtin",
        "--seq-len",
        "32",
        "--windows",
        "3",
        "--json",
    ]
    figures = []
    for extra in ([], ["--stream"]):
        assert cli.main([*words, *extra]) == 0
        figures.append(
            json.loads(capfd.readouterr().out)
        )  # nothing else on stdout, at the level of the process
    assert figures[0]["perplexity"] == pytest.approx(figures[1]["perplexity"], rel=1e-4)
    assert figures[0]["perplexity"] == pytest.approx(figures[0]["base_perplexity"])
    assert figures[0]["kl"] == pytest.approx(0, abs=1e-6) and figures[0]["top1_agreement"] == 1
    assert (
        figures[0]["windows"] == 3 and figures[0]["tokens"] == 3 * 31 and figures[0]["perplexity_stderr"] > 0
    )


def test_evaluate_spells_out_the_protocol(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--perplexity", "builtin", "--seq-len", "32", "--windows", "2", "--join"]
    assert cli.main(["evaluate", model, *words]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for word in ("2 windows of 32 tokens", "stride 32", "joined by", "no BOS", "±", "data hash", "float32"):
        assert word in out


def test_generate_is_the_models_own_greedy_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    import llmslim

    assert cli.main(["generate", model, "The import statement", "--max-new-tokens", "7"]) == 0
    loaded, tokenizer = llmslim.load(model)
    tokens = tokenizer("The import statement", return_tensors="pt")["input_ids"]
    start = tokens.shape[1]
    with torch.no_grad():
        for _ in range(7):
            tokens = torch.cat([tokens, loaded(tokens).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(tokens[0, start:].tolist(), skip_special_tokens=True)
    assert capsys.readouterr().out == expected + "\n"


def test_generate_samples_by_its_seed(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        cli.main(["generate", model, "The", "--chat", "--temperature", "1.5", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_run_from_the_shell(model: str, tmp_path: Path) -> None:
    output = tmp_path / "small"
    words = [
        "--method",
        "rtn",
        "--group-size",
        "32",
        "--eval-windows",
        "2",
        "--eval-seq-len",
        "64",
        "--no-speed",
    ]
    done = python("-m", "llmslim", "quantize", model, *words, "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert (
        "size on disk" in done.stdout
        and "perplexity" in done.stdout
        and str(output) in done.stdout.replace("\n", "")
    )
    lines = done.stderr.splitlines()
    assert lines[0].startswith("plan: 3 blocks")
    assert all(re.match(r"(rtn|verify|evaluate): \d+/\d+", line) for line in lines[1:]), done.stderr
    report = json.loads((output / "report.json").read_text())
    assert report["quality"]["perplexity"]["windows"] == 2 and report["speed"] is None
    assert (output / "README.md").read_text().startswith("---\n")
    assert cli.main(["inspect", str(output), "--json"]) == 0


def test_the_benchmark_of_a_folder_prints_one_line_of_json(model: str, encoder: str) -> None:
    from llmslim.evaluation.benchmark import benchmark_folder

    done = python("-m", "llmslim.evaluation.benchmark", model)
    figures = json.loads(done.stdout)
    assert figures["prompt_len"] == 512 - 48 and figures["new_tokens"] == 48
    assert figures["decode"]["tokens_per_second"] > 0 and figures["peak_memory_mb"] > 50
    assert benchmark_folder(encoder)["decode"] is None
