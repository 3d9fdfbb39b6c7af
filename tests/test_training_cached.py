"""What a teacher said, kept on disk: the loss against the whole one, and runs that train without the teacher."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmslim.distillation.response import Response
from llmslim.errors import UserError
from llmslim.pipeline import compress
from llmslim.prepare import prepare
from llmslim.quantization.rtn import RTN
from llmslim.recipe import Calibration, Recipe
from llmslim.recovery.scales import Scales
from llmslim.survey import Look
from llmslim.training.cached import TeacherCache
from llmslim.training.losses import coarse_divergence, divergence, likeliest
from tests.checkpoints import killed_at_training_step
from tests.tiny import save_tiny, tiny_model

pytestmark = pytest.mark.usefixtures("verified_here")
QUICK: dict[str, Any] = {"calibration": Calibration(num_samples=8, seq_len=32), "evaluation": None}
FAST: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "lr": 1e-3}


def pair(vocabulary: int = 23) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(3, 100, vocabulary, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_all_tokens_kept_is_the_whole_divergence(kind: Any) -> None:
    student, teacher = pair()
    ids, log_probs, tail = likeliest(teacher, 23, 2.0)
    assert tail is None
    found, wanted = (
        coarse_divergence(student, ids, log_probs, tail, 2.0, kind, 0.3),
        divergence(student, teacher, 2.0, kind, 0.3),
    )
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(value, student)[0] for value in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_the_coarse_divergence_is_that_of_the_coarse_distributions() -> None:
    student, teacher = pair()
    ids, log_probs, tail = likeliest(teacher, 4)
    total = 0.0
    for s, t in zip(student.detach().flatten(0, 1).double(), teacher.flatten(0, 1).double(), strict=True):
        p, q = t.softmax(-1), s.softmax(-1)
        top = t.argsort(descending=True)[:4].tolist()
        rest = [i for i in range(23) if i not in top]
        cells = [(float(p[i]), float(q[i])) for i in top] + [(float(p[rest].sum()), float(q[rest].sum()))]
        total += sum(a * math.log(a / b) for a, b in cells)
    assert coarse_divergence(student, ids, log_probs, tail).item() == pytest.approx(total / 300, rel=1e-5)


def test_coarser_is_never_more_and_is_0_for_the_teacher_itself() -> None:
    student, teacher = pair()
    found = [float(coarse_divergence(student, *likeliest(teacher, k))) for k in (1, 2, 5, 22, 23)]
    assert found == sorted(found) and found[-1] <= float(divergence(student, teacher)) + 1e-6
    leaf = teacher.clone().requires_grad_()
    value = coarse_divergence(leaf, *likeliest(teacher, 5))
    (gradient,) = torch.autograd.grad(value, leaf)
    assert abs(float(value)) < 1e-6 and float(gradient.abs().max()) < 1e-6


def test_the_cache_is_what_the_teacher_says(tmp_path: Path) -> None:
    teacher, tokens = tiny_model("llama"), torch.randint(5, 512, (5, 16))
    cache = TeacherCache(tmp_path / "cache", tokens)
    assert not cache.complete
    cache.write(teacher, 8, 1.5, lambda done, total: None)
    assert cache.complete
    asked = tokens[[3, 1]]
    with torch.no_grad():
        ids, log_probs, tail = likeliest(teacher(asked).logits, 8, 1.5)
    found = TeacherCache(tmp_path / "cache", tokens).of(asked)
    assert torch.equal(found[0], ids)
    torch.testing.assert_close(found[1], log_probs, rtol=1e-3, atol=1e-3)  # float16
    torch.testing.assert_close(found[2], tail)


@pytest.mark.parametrize("verb", ["distill", "recover"])
def test_training_from_the_cache_is_that_from_the_teacher(verb: str, tmp_path: Path) -> None:
    teacher, student = (save_tiny("llama", tmp_path / str(seed), seed) for seed in (0, 1))

    def trained(name: str, **fields: Any) -> list[float]:
        if verb == "distill":
            steps: list[Any] = [Response(teacher=str(teacher), **FAST, **fields)]
        else:
            steps = [RTN(bits=3, group_size=32), Scales(teacher=str(teacher), **FAST, **fields)]
        compress(str(student), steps, tmp_path / name, dtype="float32", **QUICK)
        return losses(tmp_path / name)

    whole, cached, coarse = (
        trained("whole"),
        trained("all", cached_logits=512),
        trained("few", cached_logits=16),
    )
    assert cached == pytest.approx(whole, rel=2e-3)
    assert all(a < b for a, b in zip(coarse, whole, strict=True))


def losses(folder: Path) -> list[float]:
    import json

    lines = (folder / "training.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_a_killed_run_goes_on_without_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    teacher, student = (save_tiny("llama", tmp_path / str(seed), seed) for seed in (0, 1))
    steps = [Response(teacher=str(teacher), cached_logits=8, save_steps=2, **FAST)]
    compress(str(student), steps, tmp_path / "unbroken", **QUICK)
    with killed_at_training_step(3, monkeypatch):
        compress(str(student), steps, tmp_path / "killed", **QUICK)
    monkeypatch.setattr(Look, "other", lambda *args: pytest.fail("the teacher is loaded again"))
    compress(str(student), steps, tmp_path / "killed", **QUICK)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("unbroken", "killed")]
    assert weights[0] == weights[1]


def test_bad_input_is_refused(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    with pytest.raises(UserError, match="more than the 512 tokens"):
        compress(str(base), [Response(teacher=str(base), cached_logits=513)], tmp_path / "x", **QUICK)
    with pytest.raises(UserError, match="learns from none"):
        compress(str(base), [Scales(objective="next_token", cached_logits=8)], tmp_path / "x", **QUICK)
    with pytest.raises(ValueError, match="not of what the student writes"):
        Response(cached_logits=8, on_policy=0.5)


def test_the_plan_knows_the_size_of_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher is held beside the student, in the run's type, or, asked before, in its place."""
    monkeypatch.setattr("llmslim.plan.resident_bytes", lambda: 0)
    student = save_tiny("llama", tmp_path / "student")
    small, large = (
        save_tiny("llama", tmp_path / str(blocks), 1, num_hidden_layers=blocks) for blocks in (2, 60)
    )
    more = sum(
        tensor.numel() for tensor in tiny_model("llama", 1, num_hidden_layers=58).model.layers.parameters()
    )

    def planned(teacher: Path, **fields: Any) -> Any:
        step = Response(teacher=str(teacher), **FAST, **fields)
        return prepare(str(student), Recipe(steps=(step,), **QUICK)).plan

    assert planned(large).peak_memory - planned(small).peak_memory == 4 * more
    asked = planned(large, cached_logits=8)
    assert 4 * more < asked.peak_memory < planned(large).peak_memory
    assert planned(small, cached_logits=8).peak_memory < planned(small).peak_memory


def test_the_plan_knows_how_long_a_teacher_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 FLOP for each of its weights and token that it is shown; one asked before is, whatever training is allowed."""
    monkeypatch.setattr("llmslim.plan._flops_per_second", lambda *asked: 1e9)
    monkeypatch.setattr("llmslim.plan._values_per_second", lambda *asked: 1e9)
    student = save_tiny("llama", tmp_path / "student")
    small, large = (
        save_tiny("llama", tmp_path / str(blocks), 1, num_hidden_layers=blocks) for blocks in (2, 3)
    )
    blocks = tiny_model("llama", 1, num_hidden_layers=1).model.layers
    more = sum(tensor.numel() for tensor in blocks.parameters() if tensor.ndim == 2)

    def seconds(teacher: Path, **fields: Any) -> float:
        step = Response(teacher=str(teacher), **{**FAST, **fields})
        return prepare(str(student), Recipe(steps=(step,), **QUICK)).plan.seconds

    trained, text = 6 * 4 * 32, 8 * 32
    assert seconds(large) - seconds(small) == pytest.approx(2 * trained * more / 1e9, rel=1e-3)
    asked = {"cached_logits": 8, "max_minutes": 1e-9}
    assert seconds(large, **asked) - seconds(small, **asked) == pytest.approx(2 * text * more / 1e9, rel=1e-3)
    before = seconds(small)
    monkeypatch.setattr("llmslim.plan._values_per_second", lambda *asked: 1e8)
    assert seconds(small) > 1.2 * before
