"""Training quantized weights block by block: gradients, what is learned, what is kept, and the road around it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import llmslim
from llmslim.errors import UserError
from llmslim.pipeline import compress
from llmslim.pruning.weights import Magnitude
from llmslim.quantization.autoround import AutoRound, RoundedWeight, SignDescent
from llmslim.quantization.fake_quantize import TrainedInputs, fake_quantize
from llmslim.quantization.gptq import GPTQ
from llmslim.quantization.grid import Scheme, round_to_grid, round_to_nearest, search_grid
from llmslim.quantization.packed import PackedLinear
from llmslim.quantization.qat import QAT, LearnedGrid
from llmslim.quantization.reconstruction import TrainedVector
from llmslim.recipe import Calibration
from llmslim.sharing.share import ShareBlocks
from llmslim.step import STEPS, build_step
from llmslim.training.losses import hidden_states
from tests.tiny import FAMILIES, save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")

TEXT: dict[str, Any] = {"calibration": Calibration(num_samples=32, seq_len=32), "evaluation": None}
COMMON: dict[str, Any] = {"bits": 2, "group_size": 32, "symmetric": False}
SHORT = {
    "qat": QAT(**COMMON, epochs=1, batch_size=4),
    "autoround": AutoRound(**COMMON, iterations=8, batch_size=8),
}


class Folders(dict[str, Path]):
    """The tiny models asked for, each made once."""

    root: Path

    def __missing__(self, family: str) -> Path:
        self[family] = save_tiny(family, self.root / family)
        return self[family]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    made = Folders()
    made.root = tmp_path_factory.mktemp("models")
    return made


def problem(groups: int = 3, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, groups, width, generator=generator, dtype=torch.float64)
    scale = 0.3 + torch.rand(5, groups, generator=generator, dtype=torch.float64) / 5
    return weight, scale, torch.randint(0, 4, scale.shape, generator=generator).double()


def gradients(grad: Tensor, *inputs: Tensor, max_code: int = 3) -> list[Tensor]:
    leaves = [value.clone().requires_grad_() for value in inputs]
    weight, scale, zero, *offset = leaves
    fake_quantize(weight, scale, zero, max_code, *offset).backward(grad)
    return [leaf.grad for leaf in leaves]  # type: ignore[misc]


def test_the_step_size_has_the_gradient_of_lsq() -> None:
    """Equation 3 of arXiv:1902.08153, for signed codes -Q_n .. Q_p: zero in the middle of the grid."""
    weight, scale, _ = problem()
    q_n, q_p = 2, 1
    levels = weight / scale[..., None]
    expected = torch.where(levels.round() <= -q_n - 0.0, -q_n, torch.where(levels.round() >= q_p, q_p, 0.0))
    inside = (levels.round() >= -q_n) & (levels.round() <= q_p)
    expected = torch.where(inside, levels.round() - levels, expected)
    found = gradients(torch.ones_like(weight), weight, scale, torch.full_like(scale, float(q_n)))
    torch.testing.assert_close(found[1], expected.sum(-1))
    torch.testing.assert_close(found[0], inside.double())


@pytest.mark.parametrize("with_offset", [False, True])
def test_gradients_are_those_of_rounding_straight_through(with_offset: bool) -> None:
    """Against autograd of the formula with round(x) written as x + (round(x) - x) held constant."""
    weight, scale, zero = problem()
    inputs = [weight, scale, zero, torch.rand_like(weight) - 0.5][: 4 if with_offset else 3]
    grad = torch.randn_like(weight)
    leaves = [value.clone().requires_grad_() for value in inputs]
    levels = leaves[0] / leaves[1][..., None] + leaves[2][..., None] + (leaves[3] if with_offset else 0)
    rounded = levels + (levels.round() - levels).detach()
    output = (rounded.clamp(0, 3) - leaves[2][..., None]) * leaves[1][..., None]
    output.backward(grad)
    torch.testing.assert_close(fake_quantize(*inputs[:3], 3, *inputs[3:]), output.detach())
    for found, leaf in zip(gradients(grad, *inputs), leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad)


def test_gradients_are_finite_differences_where_there_are_any() -> None:
    """Beyond the ends of the grid nothing is rounded; inside, the slope over a whole step of the grid counts."""
    weight, scale, zero = problem()
    far = weight.sign() * (weight.abs() + 5)
    grad = torch.ones_like(far)
    at_weight, at_scale, at_zero = gradients(grad, far, scale, zero)
    assert not at_weight.any()
    for value, found in ((scale, at_scale), (zero, at_zero)):
        delta = 1e-6 * torch.ones_like(value)
        moved = [(far, scale + sign * delta, zero) for sign in (1, -1)]
        if value is zero:
            moved = [(far, scale, zero + sign * delta) for sign in (1, -1)]
        up, down = (fake_quantize(*inputs, 3).sum(-1) for inputs in moved)
        torch.testing.assert_close(found, (up - down) / 2e-6, rtol=1e-5, atol=1e-6)
    one = scale[..., None]
    near = (1.0 - zero[..., None] + torch.rand_like(weight) * 0.8 - 0.4) * one  # code 1, and 2 a step further
    slope = (fake_quantize(near + one, scale, zero, 3) - fake_quantize(near, scale, zero, 3)) / one
    torch.testing.assert_close(slope, gradients(grad, near, scale, zero)[0])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [16, "channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_training_begins_at_the_codes_it_is_given(bits: int, group: Any, symmetric: bool) -> None:
    scheme = Scheme(bits=bits, group_size=group, symmetric=symmetric)
    weight = torch.randn(8, 48)
    weight[:, 5] = 0
    other = weight + 0.2 * torch.randn(8, 48).masked_fill(weight == 0, 0)
    start = round_to_grid(other, *search_grid(other, scheme), scheme)
    learned = LearnedGrid(weight, start)
    assert torch.equal(learned.quantized().codes, start.codes)
    assert torch.equal(learned(), start.dequantize())
    rounding = RoundedWeight(weight, scheme)
    plain = round_to_nearest(weight, scheme)
    assert (rounding.quantized().codes == plain.codes).float().mean() > 0.99
    for trained in (learned, rounding):  # what training sees is what is stored, whatever has been learned
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                low = name in ("alpha", "beta")
                parameter.sub_(torch.rand_like(parameter) * 0.3 if low else torch.randn_like(parameter) * 0.1)
        torch.testing.assert_close(trained(), trained.quantized().dequantize(), rtol=0, atol=0)
        assert not trained()[:, 5].any()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_step_is_as_long_as_its_rate_however_small_the_loss(bits: int) -> None:
    """A Linear's error beside a residual stream of 100 times the size: gradients from 1e-6 down to 1e-13."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 64, generator=generator), torch.randn(256, 64, generator=generator)
    residual = 1000 * torch.randn(256, 64, generator=generator)
    scheme = Scheme(bits=bits, group_size=16, symmetric=False, scale_dtype="float32")
    step = QAT(bits=bits)
    learned = LearnedGrid(weight, round_to_nearest(weight, scheme))
    inputs, bias = TrainedInputs(torch.tensor([0.02]), scheme), TrainedVector(torch.ones(64))
    started = {name: value.detach().clone() for name, value in learned.named_parameters()}
    optimizer = step.schedule([learned], [bias, inputs], chunks=4).optimizer
    hidden_states(residual + inputs(x) @ learned().T + bias(), residual + x @ weight.T + 1).backward()
    optimizer.step()
    moved = {name: (value.detach() - started[name]).abs() for name, value in learned.named_parameters()}
    assert float(moved["weight"].median()) == pytest.approx(step.lr, rel=1e-2)
    rate = step.scale_lr * {2: 1, 4: 1 / 5, 8: 1 / 85}[bits]
    for by in (moved["ratio"], bias.change.abs(), inputs.change.abs()):
        assert float(by.detach().median()) == pytest.approx(rate, rel=1e-2)


def test_a_fine_grid_is_trained_in_small_steps(folders: dict[str, Path], tmp_path: Path) -> None:
    """Shares that do for 2 bits would do harm to the first block, whose error is that of its own rounding."""
    step = QAT(bits=8, group_size=32, batch_size=8, validation=0.0)
    found = errors(folders["llama"], step, tmp_path / "out")
    assert all(after < before for before, after in found)


def test_each_grid_moves_at_the_rate_of_its_bits() -> None:
    """Overrides, and the 8 bits of inputs, have steps of their own size."""
    step = QAT(bits=2, group_size=16, activation_bits=8, activation_scale="learned", scale_lr=0.01)
    generator = torch.Generator().manual_seed(0)

    def trained(bits: int) -> Any:
        scheme = Scheme(bits=bits, group_size=16, activation_bits=8, activation_scale="tensor")
        weight = torch.randn(4, 32, generator=generator)
        return step.trained(weight, round_to_nearest(weight, scheme))

    weights = [trained(2), trained(8)]
    small: list[Any] = [TrainedVector(torch.ones(8)), TrainedInputs(torch.ones(1), weights[0].scheme)]
    groups = step.schedule(weights, small, 10).optimizer.param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    shares = [weights[0].ratio, weights[1].ratio, small[0].change, small[1].change]
    fine = 0.01 * 3 / 255
    assert [rates[id(one)] for one in shares] == pytest.approx([0.01, fine, 0.01, fine])


def test_signed_descent_steps_by_the_sign_and_stays_in_bounds() -> None:
    offset = torch.nn.Parameter(torch.tensor([0.0, 0.0, 0.45, -0.2]))
    share = torch.nn.Parameter(torch.tensor([1.0, 0.05]))
    unused = torch.nn.Parameter(torch.ones(1))
    optimizer = SignDescent(
        [
            {"params": [offset, unused], "lr": 0.1, "bounds": (-0.5, 0.5)},
            {"params": [share], "lr": 0.1, "bounds": (0.0, 1.0)},
        ]
    )
    offset.grad, share.grad = torch.tensor([3.0, -1e-9, -2.0, 0.0]), torch.tensor([-1.0, 1.0])
    optimizer.step()
    torch.testing.assert_close(offset.data, torch.tensor([-0.1, 0.1, 0.5, -0.2]))
    torch.testing.assert_close(share.data, torch.tensor([1.0, 0.0]))


def test_autoround_leaves_pruned_weights_zero() -> None:
    """On an odd zero point half a step more would round to the next code."""
    weight = torch.randn(8, 32)
    weight[:, ::2] = 0
    rounded = RoundedWeight(weight, Scheme(bits=4, group_size=16, symmetric=False))
    with torch.no_grad():
        rounded.offset.fill_(0.5)
    assert (rounded.grid()[1] % 2 == 1).any()
    for found in (rounded(), rounded.quantized().dequantize()):
        assert not found[:, ::2].any() and found[:, 1::2].any()


def test_the_rates_of_autoround_let_an_offset_get_just_anywhere() -> None:
    schedule = AutoRound(iterations=200).schedule([], [], chunks=4)
    assert sum(schedule.rate(step / 200) for step in range(200)) / 200 == pytest.approx(0.5, abs=0.01)
    assert schedule.steps == 200


def errors(folder: Path, step: Any, output: Path, **fields: Any) -> list[tuple[float, float]]:
    report = compress(str(folder), [step], output, **{**TEXT, **fields}).report
    rows = [row for row in report["linears"] if "output_error_before" in row]
    return [(row["output_error_before"], row["output_error"]) for row in rows]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_training_beats_where_it_begins(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Of the first block, whose inputs are everyone's: error of rounding > GPTQ's > that of training."""
    text = {"calibration": Calibration(num_samples=64, seq_len=32)}
    common = {**COMMON, "validation": 0.0, "batch_size": 8}
    qat = QAT(**common, epochs=8, lr=1e-2)
    trained = errors(folders[family], qat, tmp_path / "qat", **text)
    signed = errors(folders[family], AutoRound(**common, iterations=60), tmp_path / "auto", **text)
    assert all(after < before for before, after in (*trained, *signed))
    (gptq, after_qat), (rtn, _) = trained[0], signed[0]
    assert after_qat < 0.98 * gptq < gptq < rtn
    assert signed[0][1] < 0.8 * rtn


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "qat") for family in FAMILIES),  # the road through a block is the same for both
        *((family, "autoround") for family in ("gpt2", "mixtral", "bert", "t5")),
    ],
)
def test_every_family_is_trained_and_loads_as_it_was_saved(
    family: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    report = compress(str(folders[family]), [SHORT[kind]], tmp_path / "out", **TEXT).report
    assert report["verification"]["ok"] and report["verification"]["max_error"] == 0
    rows = [row for row in report["linears"] if "output_error_before" in row]
    assert len(rows) == report["plan"]["blocks"]
    assert any(row["output_error"] < row["output_error_before"] for row in rows)  # of text held out


def stop_at(kind: str, block: int) -> Any:
    def progress(what: str, done: int, total: int, note: str = "") -> None:
        if what == kind and done == block:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(("family", "kind"), [("llama", "autoround"), ("t5", "qat")])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    family: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    source, step = str(folders[family]), SHORT[kind]
    whole = compress(source, [step], tmp_path / "whole", **TEXT)
    for block in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            compress(source, [step], tmp_path / "out", progress=stop_at(kind, block), **TEXT)
    resumed = compress(source, [step], tmp_path / "out", **TEXT)
    assert resumed.report["run"]["resumed"]
    names = ("model.safetensors", "config.json")
    assert all((resumed.folder / n).read_bytes() == (whole.folder / n).read_bytes() for n in names)
    assert resumed.report["linears"] == whole.report["linears"]


@pytest.mark.parametrize("kind", SHORT)
def test_the_training_of_blocks_is_told_and_written_down(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    told: list[tuple[str, int, str]] = []

    def progress(what: str, done: int, total: int, note: str = "") -> None:
        told.append((what, done, note))
        if killed and what == kind and done == 1 and note:
            raise KeyboardInterrupt

    killed, step = True, SHORT[kind]
    with pytest.raises(KeyboardInterrupt):
        compress(str(folders["llama"]), [step], tmp_path / "out", progress=progress, **TEXT)
    killed = False  # what is trained again is written down once
    compress(str(folders["llama"]), [step], tmp_path / "out", progress=progress, **TEXT)
    notes = [note for what, done, note in told if what == kind and done == 2 and note]
    assert re.match(r"step 1/\d+, loss [\d.e-]+, \d+ tokens/s, [\d,]+ MB$", notes[0]), notes[0]
    report = json.loads((tmp_path / "out/report.json").read_text())
    best = {row["name"]: row["output_error"] for row in report["linears"] if "output_error_before" in row}
    lines = [json.loads(line) for line in (tmp_path / "out/training.jsonl").read_text().splitlines()]
    assert {line["method"] for line in lines} == {kind}
    for name, error in best.items():
        own = [line for line in lines if line["block"] == name]
        assert len({line["step"] for line in own}) == len(own) > 0
        assert error <= min(line["eval_loss"] for line in own) + 1e-9
        rates = [line["learning_rate"] for line in own]
        assert rates == sorted(rates, reverse=True) and rates[-1] == 0


def test_training_stops_in_time_and_the_rate_falls_in_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that runs one second at each look: a block has 20 of 60."""
    clock = itertools.count()
    ticking = SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr("llmslim.quantization.reconstruction.time", ticking)
    step = AutoRound(**COMMON, iterations=10**6, max_minutes=1)
    compress(str(folders["llama"]), [step], tmp_path / "out", **TEXT)
    lines = [json.loads(line) for line in (tmp_path / "out/training.jsonl").read_text().splitlines()]
    for block in {line["block"] for line in lines}:
        own = [line for line in lines if line["block"] == block]
        assert 10 < own[-1]["step"] <= 20 and own[-1]["learning_rate"] == 0
        rates = [line["learning_rate"] for line in own]
        assert rates == sorted(rates, reverse=True) and 0.1 < rates[0] < 1
    assert step.blocks_limit == 60


def test_norms_and_biases_are_trained_and_nothing_outside(folders: dict[str, Path], tmp_path: Path) -> None:
    source = llmslim.load(str(folders["gpt2"]))[0]
    step = QAT(**COMMON, epochs=4, validation=0.0)
    made = llmslim.load(str(compress(str(folders["gpt2"]), [step], tmp_path / "out", **TEXT).folder))[0]
    ours = dict(made.named_parameters())
    for name, parameter in source.named_parameters():
        if parameter.ndim == 1 and ".h." in name:
            assert not torch.equal(ours[name], parameter), name
        elif ".h." not in name:
            assert torch.equal(ours[name], parameter), name


def test_pruned_weights_stay_zero(folders: dict[str, Path], tmp_path: Path) -> None:
    steps = [Magnitude(sparsity=0.5), QAT(**COMMON, epochs=2, lr=0.02)]
    made = llmslim.load(str(compress(str(folders["llama"]), steps, tmp_path / "out", **TEXT).folder))[0]
    pruned = compress(str(folders["llama"]), steps[:1], tmp_path / "pruned", **TEXT).folder
    before = llmslim.load(str(pruned))[0]
    for name, module in made.named_modules():
        if isinstance(module, PackedLinear):
            zero = before.get_submodule(name).weight == 0  # type: ignore[union-attr]
            assert zero.float().mean() > 0.4 and not module.dequantize()[zero].any(), name


@pytest.mark.parametrize("kind", SHORT)
def test_shared_blocks_take_what_the_first_has_learned(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    steps = [ShareBlocks(group_size=3), SHORT[kind]]
    report = compress(str(folders["llama"]), steps, tmp_path / "out", **TEXT).report
    assert report["verification"]["ok"]
    made = llmslim.load(str(tmp_path / "out"))[0]
    first, last = (made.model.layers[i].mlp.up_proj for i in (0, 2))
    assert first.weight_packed.data_ptr() == last.weight_packed.data_ptr()


def test_a_training_that_diverges_is_told_and_kept_from_the_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    step = QAT(**COMMON, epochs=2, lr=1e30, scale_lr=1e30)
    report = compress(str(folders["llama"]), [step], tmp_path / "out", **TEXT).report
    notes = [note["what"] for note in report["notes"]]
    assert any("did not lower the error" in note for note in notes)
    gptq = compress(str(folders["llama"]), [step.start()], tmp_path / "start", **TEXT)
    assert isinstance(step.start(), GPTQ) and gptq.report["verification"]["ok"]


@pytest.mark.parametrize("kind", SHORT)
def test_targets_may_be_the_blocks_own(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Behind the first block they leave out what quantizing earlier ones has done, so that less is wrong at first."""
    found = {}
    for target in ("block", "model"):
        step = SHORT[kind].model_copy(update={"target": target, "validation": 0.0})
        found[target] = errors(folders["qwen3"], step, tmp_path / target)
        assert all(after < before for before, after in found[target])
    begun = {target: [before for before, _ in rows[1:]] for target, rows in found.items()}
    assert all(own < models for own, models in zip(begun["block"], begun["model"], strict=True))


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("qat", {"bits": 1}, "greater than or equal to 2"),
        ("qat", {"lr": 0}, "greater than 0"),
        ("qat", {"validation": 1.0}, "less than 1"),
        ("qat", {"iterations": 3}, "Unknown option 'iterations' for qat"),
        ("autoround", {"iterations": 0}, "greater than or equal to 1"),
        ("autoround", {"target": "teacher"}, "'model' or 'block'"),
    ],
)
def test_bad_fields_are_refused_in_one_sentence(kind: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_step(kind, fields)
    assert STEPS[kind].verb == "quantize"
