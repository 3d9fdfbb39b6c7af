"""Recovery: training lowers the divergence, changes only what it should, and resumes to the same bytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llmslim.anatomy.parts import dense_weight
from llmslim.checkpoint.load import load_model
from llmslim.errors import UserError
from llmslim.files import load_tensors
from llmslim.loaders.models import find
from llmslim.loaders.texts import sample
from llmslim.pipeline import compress
from llmslim.prepare import prepare
from llmslim.pruning.weights import Magnitude
from llmslim.quantization.gptq import GPTQ
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Calibration, Recipe
from llmslim.recovery._merging import open_weights
from llmslim.recovery.full import Full
from llmslim.recovery.lora import LoRA, with_adapter
from llmslim.recovery.scales import ScaledLinear, Scales
from llmslim.sharing.share import ShareBlocks
from llmslim.training.loop import train
from llmslim.training.losses import divergence, next_token
from llmslim.training.watch import Schedule, Watch
from tests.checkpoints import killed_at_training_step
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("verified_here")
QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=8, seq_len=32), "evaluation": None}
RTN3 = RTN(bits=3, group_size=32, symmetric=False)
FAST: dict[str, Any] = {"max_steps": 12, "batch_size": 4, "lr": 3e-3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in ("llama", "gpt2", "qwen3", "bert")}


def whole(folder: Path) -> Any:
    return load_model(find(str(folder)), torch.float32, torch.device("cpu"))


def kl(teacher: Path, student: Path) -> float:
    tokens = sample("builtin", find(str(teacher)).tokenizer(), 8, 32, 0).tokens
    with torch.no_grad():
        return float(divergence(whole(student)(tokens).logits, whole(teacher)(tokens).logits))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(whole(folder).state_dict())


def test_losses_are_those_of_torch() -> None:
    student = torch.randn(2, 200, 11, requires_grad=True)
    teacher, tokens = torch.randn(2, 200, 11), torch.randint(0, 11, (2, 200))
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    naive = 4 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(divergence(student, teacher, 2.0), naive)
    (wanted,) = torch.autograd.grad(naive, student)
    torch.testing.assert_close(torch.autograd.grad(divergence(student, teacher, 2.0), student)[0], wanted)
    plain = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(next_token(student, tokens), plain)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, "channel", "tensor"])
def test_gradients_of_scales_are_those_of_autograd(symmetric: bool, group: Any) -> None:
    from llmslim.quantization.grid import Scheme, round_to_nearest
    from llmslim.quantization.packed import PackedLinear

    scheme = Scheme(bits=3, group_size=group, symmetric=symmetric)
    packed = PackedLinear.from_quantized(round_to_nearest(torch.randn(16, 64), scheme))
    scaled, x = ScaledLinear(packed), torch.randn(2, 5, 64, requires_grad=True)
    quantized = packed.quantized()
    quantized.scale = quantized.scale.clone().requires_grad_()
    wanted = torch.autograd.grad((x @ quantized.dequantize().T).sin().sum(), [x, quantized.scale])
    found = torch.autograd.grad(scaled(x).sin().sum(), [x, scaled.scale])
    torch.testing.assert_close(found, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        y = scaled(x)
    assert y.dtype == torch.bfloat16
    rough = torch.autograd.grad(y.float().sin().sum(), scaled.scale)[0]
    assert rough.dtype == torch.float32 and not torch.equal(rough, found[1])
    assert torch.nn.functional.cosine_similarity(rough.flatten(), found[1].flatten(), dim=0) > 0.99


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, str], Path]:
    """made(step, family): that model compressed by one step; once for all tests."""
    root = tmp_path_factory.mktemp("made")

    def make(step: Any, family: str) -> Path:
        output = root / f"{family}-{step.kind}"
        if not output.exists():
            compress(str(folders[family]), [step], output, **QUICK)
        return output

    return make


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "bert"])
def test_scales_recover_and_codes_stay(
    family: str, folders: dict[str, Path], made: Any, tmp_path: Path
) -> None:
    base, packed = folders[family], made(RTN3, family)
    result = compress(
        str(packed), [Scales(**{**FAST, "max_steps": 40})], tmp_path / "r", **QUICK
    )  # teacher: from its report
    assert result.report["verification"]["ok"]
    assert kl(base, tmp_path / "r") < 0.95 * kl(base, packed)
    before, after = tensors(packed), tensors(tmp_path / "r")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith("weight_scale") for name in changed)
    assert all(name.endswith("weight_scale") or before[name].ndim == 1 for name in changed)
    lines = [json.loads(line) for line in (tmp_path / "r/training.jsonl").read_text().splitlines()]
    assert {"loss", "tokens_per_second", "seconds_left"} <= lines[0].keys()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_scales_alone(family: str, folders: dict[str, Path], made: Any, tmp_path: Path) -> None:
    """EfficientQAT's second phase: all but the step sizes is the base's, bit for bit, in the files."""
    packed = made(RTN3, family)
    step = Scales(train="scales", weight_decay=0.1, **{**FAST, "max_steps": 40})
    compress(str(packed), [step], tmp_path / "r", **QUICK)
    assert kl(folders[family], tmp_path / "r") < 0.95 * kl(folders[family], packed)
    before, after = stored(packed), stored(tmp_path / "r")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("weight_scale")}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's files, as they are."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_tensors(file).items()}


def test_scales_alone_need_packed_weights(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="trains the scales of packed Linears, and no block has one"):
        step = Scales(train="scales", objective="next_token", **FAST)
        prepare(str(folders["llama"]), Recipe(steps=(step,), **QUICK))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("step", [LoRA(rank=8, **FAST), Full(**FAST)], ids=["lora", "full"])
def test_pruned_models_recover_and_masks_hold(
    step: Any, family: str, folders: dict[str, Path], made: Any, tmp_path: Path
) -> None:
    base = folders[family]
    prune = Magnitude(sparsity=0.5)
    pruned = made(prune, family)
    result = compress(str(base), [prune, step], tmp_path / "r", **QUICK)
    assert result.report["verification"]["ok"]
    assert kl(base, tmp_path / "r") < 0.9 * kl(base, pruned)
    before, after = tensors(pruned), tensors(tmp_path / "r")
    for name in before:
        if name.endswith("weight_bitmap"):
            weight = name.replace("weight_bitmap", "weight")
            assert torch.equal(before[name], after[name]) and not torch.equal(before[weight], after[weight])
            assert not after[weight][before[weight] == 0].any()


@pytest.mark.parametrize(("family", "sparse"), [("llama", ""), ("gpt2", ""), ("gpt2", "*.attn.c_proj")])
def test_a_merged_model_is_the_one_with_adapters(
    family: str, sparse: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Where some Linears are sparse, too: [out, in], beside GPT-2's [in, out]."""
    base = folders[family]
    if sparse:
        compress(str(base), [Magnitude(sparsity=0.5, include=(sparse,))], tmp_path / "sparse", **QUICK)
        base = tmp_path / "sparse"
    model, tokens = whole(base), torch.randint(5, 500, (2, 16))
    with LoRA(rank=4).training(model) as (trained, finish), torch.no_grad():
        for parameter in trained:
            parameter.normal_(std=0.05)
        wanted, added = model(tokens).logits, LoRA(rank=4)._added(finish())
    plain = whole(base)
    assert not torch.allclose(plain(tokens).logits, wanted, atol=1e-2)
    with torch.no_grad():
        for name in added.names:
            module = plain.get_submodule(name)
            dense_weight(module).add_(added.delta(name) * open_weights(module))
    torch.testing.assert_close(plain(tokens).logits, wanted, atol=1e-4, rtol=1e-4)


def test_lora_over_packed_weights_stays_packed(folders: dict[str, Path], made: Any, tmp_path: Path) -> None:
    """Merged by the text, scales and all, or by the nearest codes, which says what it lost."""
    base, packed, rows = folders["llama"], made(RTN3, "llama"), {}
    for rounding in ("gptq", "nearest"):
        lora = LoRA(rank=8, rounding=rounding, **{**FAST, "lr": 1e-2})
        report = compress(str(base), [RTN3, lora], tmp_path / rounding, **QUICK).report
        assert report["verification"]["ok"] and kl(base, tmp_path / rounding) < kl(base, packed)
        rows[rounding] = [row for row in report["linears"] if row.get("what") == "merged"]
        before, after = tensors(packed), tensors(tmp_path / rounding)
        changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
        grid = {"weight_scale", "weight_zero_point"} if rounding == "gptq" else set()
        assert changed == {"weight_packed"} | grid
    assert kl(base, tmp_path / "gptq") < kl(base, tmp_path / "nearest")
    assert all(0 < row["output_error"] < 0.1 and row["tokens"] == 8 * 32 for row in rows["gptq"])
    assert all(0.1 < row["lost"] < 1.5 for row in rows["nearest"])
    assert len(rows["gptq"]) == len(rows["nearest"]) == 3 * 7


def test_no_more_of_the_text_than_merging_needs_passes_through_the_blocks(
    folders: dict[str, Path], made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmslim.recovery.lora.MERGED", 100)
    lora = LoRA(rank=2, objective="next_token", max_steps=1)
    report = compress(str(made(RTN3, "llama")), [lora], tmp_path / "out", **QUICK).report
    assert {row["tokens"] for row in report["linears"]} == {3 * 32}


def test_pruned_weights_stay_zero_when_lora_is_merged_into_packed_ones(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    steps = [Magnitude(sparsity=0.5), RTN(bits=4, group_size=32, symmetric=False)]
    compress(str(folders["llama"]), steps, tmp_path / "packed", **QUICK)
    check_zeros_stay(tmp_path, LoRA(rank=8, teacher=str(folders["llama"]), **{**FAST, "lr": 3e-2}))


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_what_gptq_pruned_as_it_packed_stays_zero_or_is_told(
    rounding: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The layouts of others have no place for it."""
    lora = LoRA(rank=8, rounding=rounding, teacher=str(folders["llama"]), **{**FAST, "lr": 3e-2})
    for form in ("llmslim", "compressed-tensors"):
        step = GPTQ(bits=4, group_size=32, symmetric=True, pattern="2:4")
        folder = tmp_path / form
        compress(str(folders["llama"]), [step], folder / "packed", format=form, **QUICK)
        if form == "llmslim":
            check_zeros_stay(folder, lora)
            continue
        report = compress(str(folder / "packed"), [lora], folder / "out", **QUICK).report
        assert sum("if they were pruned, quantize with --format" in n["what"] for n in report["notes"]) > 10


def check_zeros_stay(folder: Path, lora: LoRA) -> None:
    report = compress(str(folder / "packed"), [lora], folder / "out", **QUICK).report
    assert not any("left out" in note["what"] for note in report["notes"])  # it was masked while it trained
    before, after, changed = whole(folder / "packed"), whole(folder / "out"), 0
    for module, packed in before.named_modules():
        if hasattr(packed, "quantized"):
            one, two = (m.quantized().dequantize() for m in (packed, after.get_submodule(module)))
            assert (one == 0).float().mean() > 0.45 and not two[one == 0].any()
            changed += not torch.equal(one, two)
    assert changed


def test_a_run_that_was_killed_while_it_saved_goes_on_to_the_same_bytes(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is half written is not gone on from."""
    from transformers import Trainer

    torch.set_num_threads(1)
    steps = [RTN3, Scales(**{**FAST, "save_steps": 4})]
    compress(str(folders["llama"]), steps, tmp_path / "unbroken", **QUICK)
    save, saved = Trainer._save_rng_state, []

    def die(self: Any, folder: str) -> None:
        saved.append(folder)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", die)
        with pytest.raises(KeyboardInterrupt):
            compress(str(folders["llama"]), steps, tmp_path / "killed", **QUICK)
    assert Path(saved[1]).is_dir() and not (Path(saved[1]) / "sizes.json").exists()
    compress(str(folders["llama"]), steps, tmp_path / "killed", **QUICK)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("unbroken", "killed")]
    assert weights[0] == weights[1]


def test_biases_and_norms_do_not_decay(folders: dict[str, Path], tmp_path: Path) -> None:
    """With a rate that does nothing but decay: what has one dimension is as it was."""
    step = Full(objective="next_token", weight_decay=1000.0, max_steps=1, batch_size=4, lr=1e-5, warmup=0.0)
    compress(str(folders["gpt2"]), [step], tmp_path / "r", **QUICK)
    before, after = tensors(folders["gpt2"]), tensors(tmp_path / "r")
    shares = {
        name: float((after[name].norm() / before[name].norm()) - 1) for name in before if before[name].any()
    }
    assert all(abs(share) < 2e-3 for name, share in shares.items() if before[name].dim() == 1)
    assert all(share < -5e-3 for name, share in shares.items() if before[name].dim() == 2)


@pytest.mark.parametrize("step", ["scales", "lora"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    step: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    fields: dict[str, Any] = {**FAST, "save_steps": 4, "validation": 0.25}
    steps = (
        [RTN3, Scales(**fields)]
        if step == "scales"
        else [LoRA(rank=4, dropout=0.1, objective="next_token", **fields)]
    )
    compress(str(folders["llama"]), steps, tmp_path / "unbroken", **QUICK)

    with killed_at_training_step(6, monkeypatch):
        compress(str(folders["llama"]), steps, tmp_path / "killed", **QUICK)
    result = compress(str(folders["llama"]), steps, tmp_path / "killed", **QUICK)
    assert result.report["run"]["resumed"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("unbroken", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("step", ["scales", "lora"])
def test_what_training_only_made_worse_is_left_as_it_began(
    step: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By validation the start was best: weights are those without training, and the report says so; resumed, too."""
    torch.set_num_threads(1)
    fields: dict[str, Any] = {**FAST, "lr": 3.0, "save_steps": 4, "validation": 0.25}
    trained = Scales(**fields) if step == "scales" else LoRA(rank=4, **fields)
    before = [RTN3 if step == "scales" else Magnitude(sparsity=0.5)]
    base = str(folders["llama"])
    compress(base, before, tmp_path / "start", **QUICK)
    with killed_at_training_step(6, monkeypatch):
        compress(base, [*before, trained], tmp_path / "r", **QUICK)
    report = compress(base, [*before, trained], tmp_path / "r", **QUICK).report
    assert report["run"]["resumed"]
    assert [note["what"] for note in report["notes"] if note["where"] == step] == [
        "training changed nothing: no validation did better than the one at the start"
    ]
    start, end = tensors(tmp_path / "start"), tensors(tmp_path / "r")
    assert all(torch.equal(start[name], end[name]) for name in start) and set(start) == set(end)
    history = [json.loads(line) for line in (tmp_path / "r/training.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}
    assert 0 in losses and len(losses) > 2 and min(losses.values()) == losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_computed_in_the_runs_type_and_weights_stay_float32(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    linear, seen = torch.nn.Linear(8, 8), set()

    def loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        y = model(tokens.float())
        seen.add((torch.is_grad_enabled(), y.dtype))
        return y.float().square().mean()

    schedule = Schedule(
        "test", lr=0.01, epochs=1, max_steps=None, batch_size=2, warmup=0, weight_decay=0, save_steps=2,
        held=4, max_minutes=None, seed=0, dtype=dtype,
    )  # fmt: skip
    tokens = torch.randint(0, 9, (8, 8))
    train(
        linear,
        list(linear.parameters()),
        torch.nn.ModuleList(),
        tokens,
        loss,
        schedule,
        tmp_path / "1",
        tmp_path / "log",
        lambda *told: None,
    )
    assert seen == {(True, dtype), (False, dtype)}
    assert linear.weight.dtype == torch.float32


def test_the_mean_of_the_weights_is_validated_and_kept(tmp_path: Path) -> None:
    """Against the mean of the weights that each step of the same training begins and ends with."""
    tokens = torch.randint(0, 9, (12, 8), generator=torch.Generator().manual_seed(0))

    def run(ema: float) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        linear, trained, judged = torch.nn.Linear(8, 8), [], []

        def loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
            (trained if torch.is_grad_enabled() else judged).append(model.weight.detach().clone())
            return model(tokens.float()).square().mean()

        schedule = Schedule(
            "test", lr=0.01, epochs=3, max_steps=None, batch_size=2, warmup=0, weight_decay=0, save_steps=4,
            held=4, max_minutes=None, seed=0, dtype=torch.float32, ema=ema,
        )  # fmt: skip
        place = tmp_path / str(ema)
        train(
            linear, list(linear.parameters()), torch.nn.ModuleList(), tokens, loss, schedule, place,
            tmp_path / "log", lambda *told: None,
        )  # fmt: skip
        return trained, judged, linear.weight.detach()

    weights, _, last = run(0.0)
    same, judged, kept = run(0.6)
    assert all(one.equal(other) for one, other in zip(weights, same, strict=True))
    means = [weights[0]]
    for step, weight in enumerate([*weights[1:], last], 1):
        decay = min(0.6, (1 + step) / (10 + step))
        means.append(decay * means[-1] + (1 - decay) * weight)
    for step, found in zip((0, 4, 8, 12), judged[::2], strict=True):
        torch.testing.assert_close(found, means[step])
    torch.testing.assert_close(kept, means[12])


def test_the_learning_rate_rises_and_falls_with_the_time_when_that_ends_training(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "name": "test", "lr": 0.1, "epochs": 1, "max_steps": None, "batch_size": 1, "warmup": 0.1, "weight_decay": 0,
        "save_steps": 50, "held": 0, "seed": 0, "dtype": torch.float32,
    }  # fmt: skip
    (tmp_path / "elapsed.json").write_text("30.0")  # of 60 seconds, 3 of a million steps
    nothing: Any = lambda *told: None  # noqa: E731
    timed = Watch(Schedule(**fields, max_minutes=1), 10**6, 8, tmp_path, tmp_path, tmp_path / "log", nothing)
    assert timed.rate(3) == pytest.approx(0.5, abs=0.01)
    endless = Watch(
        Schedule(**fields, max_minutes=None), 10**6, 8, tmp_path, tmp_path, tmp_path / "log", nothing
    )
    assert endless.rate(3) < 1e-4 and endless.rate(10**5) == pytest.approx(0.976, abs=0.01)


def test_gradients_of_small_batches_add_up_to_those_of_a_large_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"objective": "next_token", "max_steps": 3, "lr": 1e-3}
    whole_ones = Full(batch_size=4, **fields)
    parts = Full(batch_size=1, gradient_accumulation_steps=4, **fields)
    for name, step in (("large", whole_ones), ("small", parts)):
        compress(str(folders["llama"]), [step], tmp_path / name, **QUICK)
    large, small, base = (tensors(f) for f in (tmp_path / "large", tmp_path / "small", folders["llama"]))
    for name, tensor in large.items():
        moved = (tensor - base[name]).abs().max()
        assert (small[name] - tensor).abs().max() < 0.02 * moved, name
    assert parts.survey_work(0, 32) == whole_ones.survey_work(0, 32)


def test_an_encoder_learns_the_tokens_that_are_masked(folders: dict[str, Path], tmp_path: Path) -> None:
    from llmslim.calibration.objectives import masked_tokens

    step = Full(objective="masked_token", **{**FAST, "max_steps": 30})
    compress(str(folders["bert"]), [step], tmp_path / "out", **QUICK)
    tokenizer = find(str(folders["bert"])).tokenizer()
    tokens = sample("builtin", tokenizer, 8, 32, 0).tokens

    def asked(folder: Path) -> float:
        model, generator = whole(folder), torch.Generator().manual_seed(0)
        with torch.no_grad():
            return (
                sum(float(masked_tokens(model, w[None], generator, tokenizer.mask_token_id)) for w in tokens)
                / 8
            )

    assert asked(tmp_path / "out") < asked(folders["bert"]) - 0.2


def test_the_plan_counts_epochs_steps_batches_and_minutes(folders: dict[str, Path], monkeypatch: Any) -> None:
    monkeypatch.setattr("llmslim.plan._flops_per_second", lambda *asked: 1e6)
    monkeypatch.setattr("llmslim.plan._values_per_second", lambda *asked: 1e9)

    def plan(**fields: Any) -> Any:
        step = Full(objective="next_token", **{"batch_size": 2, **fields})
        return prepare(
            str(folders["llama"]), Recipe(steps=(step,), calibration=QUICK["calibration"], evaluation=None)
        ).plan

    rest = plan(max_minutes=1e-9).seconds
    once = plan().seconds - rest
    assert plan(epochs=3).seconds - rest == pytest.approx(3 * once)
    windows = QUICK["calibration"].num_samples
    assert plan(max_steps=windows).seconds - rest == pytest.approx(2 * once)
    assert plan(epochs=1e9, max_minutes=2).seconds - rest == pytest.approx(120)
    assert plan(batch_size=8).peak_memory > plan(batch_size=2).peak_memory


def test_tensorboard_gets_the_curves_beside_the_log_where_it_is_installed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer stands in here: the package is none of ours."""
    curves: dict[str, set[str]] = {}

    class Writer:
        def __init__(self, log_dir: str) -> None:
            self.seen = curves.setdefault(log_dir, set())
            Path(log_dir).mkdir(parents=True)
            (Path(log_dir) / "events").write_text("")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.seen.add(name)

        def add_text(self, *args: Any) -> None: ...

        def flush(self) -> None: ...

        def close(self) -> None: ...

    for name in ("tensorboard", "torch.utils.tensorboard"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.SummaryWriter = Writer  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    report = compress(str(folders["llama"]), [RTN3, Scales(**FAST)], tmp_path / "out", **QUICK).report
    assert [file.parent.parent for file in (tmp_path / "out").rglob("events")] == [
        tmp_path / "out/tensorboard"
    ]
    assert ["train/loss" in found for found in curves.values()] == [True]
    assert not [path for path in report["files"] if "tensorboard" in path]


def test_time_stops_training(folders: dict[str, Path], tmp_path: Path) -> None:
    step = Scales(objective="next_token", max_steps=10_000, max_minutes=0.01)
    assert compress(str(folders["llama"]), [step], tmp_path / "r", **QUICK).report["verification"]["ok"]
    entries = [json.loads(line) for line in (tmp_path / "r/training.jsonl").read_text().splitlines()]
    assert 0 < max(entry["step"] for entry in entries) < 5_000


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmslim.training import losses

    good, calls = losses.next_token, []

    def bad(logits: Any, tokens: Any) -> Any:
        calls.append(1)
        return good(logits, tokens) * (float("nan") if len(calls) > 5 else 1)

    monkeypatch.setattr(losses, "next_token", bad)
    step = Full(objective="next_token", save_steps=2, **FAST)
    with pytest.raises(
        UserError, match="full: the loss of training step 6 is not finite.* kept as .*checkpoint-4\\."
    ):
        compress(str(folders["llama"]), [step], tmp_path / "r", **QUICK)
    assert (tmp_path / "r.partial/.pass-0/trainer/checkpoint-4").is_dir()
    calls[:] = [1] * 5  # from the first on
    with pytest.raises(UserError, match="step 1 is not finite, so training stopped, before its first good"):
        compress(str(folders["llama"]), [step], tmp_path / "other", **QUICK)


def test_a_checkpoint_of_ruined_weights_is_no_good_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """The first step ruins them, and is saved."""
    ruinous: dict[str, Any] = {"lr": 1e30, "warmup": 0.0, "save_steps": 1, "max_steps": 4, "batch_size": 4}
    with pytest.raises(
        UserError, match=r"of training step 2 is not finite.* before its first good checkpoint"
    ):
        compress(str(folders["llama"]), [Full(objective="next_token", **ruinous)], tmp_path / "r", **QUICK)
    assert (tmp_path / "r.partial/.pass-0/trainer/checkpoint-1").is_dir()
    with pytest.raises(UserError, match="the validation loss after step 1 is not finite"):
        step = Full(objective="next_token", validation=0.5, **ruinous)
        compress(str(folders["llama"]), [step], tmp_path / "v", **QUICK)


@pytest.mark.parametrize("beside", [False, True])
def test_a_mixture_with_dense_blocks_gets_adapters_where_peft_has_them(beside: bool, tmp_path: Path) -> None:
    """peft takes the dense block's gate_proj for a part of the others' experts."""
    base, step = (
        save_tiny("qwen3_moe", tmp_path / "base"),
        LoRA(objective="next_token", save_adapter=beside, **FAST),
    )
    report = compress(str(base), [step], tmp_path / "out", **QUICK).report
    alone = {note["where"] for note in report["notes"] if "got no adapter: peft" in note["what"]}
    assert alone == {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    if beside:
        assert with_adapter(whole(tmp_path / "out"), tmp_path / "out/adapter")
        return
    before, after = tensors(base), tensors(tmp_path / "out")
    moved = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.{n}.self_attn.{p}_proj" for n in range(3) for p in "qkvo"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_not_gone_on_from(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a machine that stops may leave it: the one before is whole."""
    torch.set_num_threads(1)
    step = Full(objective="next_token", save_steps=2, **{**FAST, "max_steps": 6})
    compress(str(folders["llama"]), [step], tmp_path / "unbroken", **QUICK)
    with killed_at_training_step(5, monkeypatch):
        compress(str(folders["llama"]), [step], tmp_path / "killed", **QUICK)
    file = tmp_path / "killed.partial/.pass-0/trainer/checkpoint-4" / name
    file.write_bytes(file.read_bytes()[:-9])
    compress(str(folders["llama"]), [step], tmp_path / "killed", **QUICK)
    weights = [(tmp_path / made / "model.safetensors").read_bytes() for made in ("unbroken", "killed")]
    assert weights[0] == weights[1]


def test_experts_in_one_tensor_get_no_adapters_and_the_report_says_so(tmp_path: Path) -> None:
    base = str(save_tiny("mixtral", tmp_path / "base"))
    notes = []
    for name, targets in (("all", ()), ("some", "q_proj, v_proj")):
        step = LoRA(objective="next_token", target_modules=targets, save_adapter=True, max_steps=1)
        notes.append(compress(base, [step], tmp_path / name, **QUICK).report["notes"])
    said = [any("the experts of 3 blocks got no adapters" in note["what"] for note in some) for some in notes]
    assert said == [True, False]


@pytest.mark.parametrize(
    ("family", "steps", "message"),
    [
        ("llama", [Scales()], "distilled from itself"),
        (
            "llama",
            [LoRA(target_modules=("query",))],
            "no such Linear in the blocks; there are down_proj, gate_proj",
        ),
        ("llama", [ShareBlocks(unique_blocks=1), LoRA()], "no Linear that one block has .* --save-adapter"),
        ("llama", [RTN3, Full()], "cannot train packed weights"),
        ("encoder", [Full()], "BertModel does not; finetune trains classifiers"),
        ("bert", [Full(objective="next_token")], "needs a causal model"),
        ("llama", [Full(objective="masked_token")], "sees both sides"),
        ("llama", [RTN3, Scales(teacher="OTHER")], "vocabulary of 320 tokens"),
        (
            "llama",
            [RTN3, Scales(validation=0.95)],
            "validation 0.95 holds out 8 of 8 windows, and 0 are too few",
        ),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(
    family: str, steps: list[Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = save_tiny("llama", tmp_path / "other", vocab_size=320)
    steps = [s.model_copy(update={"teacher": str(other)}) if getattr(s, "teacher", "") else s for s in steps]
    if family == "encoder":
        tiny_model("bert").bert.save_pretrained(tmp_path / family)
        tiny_tokenizer().save_pretrained(tmp_path / family)
    with pytest.raises(UserError, match=message):
        prepare(str(folders.get(family, tmp_path / family)), Recipe(steps=tuple(steps), **QUICK))


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (LoRA, {"dropout": 0.1}, "dropout is for objective next_token"),
        (Full, {"objective": "next_token", "teacher": "t"}, "teacher is about learning from a teacher"),
        (
            Scales,
            {"objective": "next_token", "temperature": 2.0},
            "temperature is about learning from a teacher",
        ),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    cls: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**fields)
