"""Which block of the teacher a block of the student learns from."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from llmslim.anatomy import Anatomy
from llmslim.distillation.features import Features
from llmslim.edit import DropBlocks
from llmslim.training import pairing
from llmslim.training.pairing import alikenesses, ascending, outputs
from tests.tiny import tiny_model


def test_alikeness_is_cka_by_its_gram_matrices() -> None:
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)
    y[:, :3] += x[:, :3]
    center = torch.eye(30, dtype=torch.float64) - 1 / 30
    k, m = center @ x @ x.T @ center, center @ y @ y.T @ center
    naive = (k * m).sum() / (k.norm() * m.norm())
    assert float(alikenesses([x], [y])) == pytest.approx(float(naive), rel=1e-4)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert float(alikenesses([x], [3 * x @ turn + 7])) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (3, 3), (3, 6), (4, 7)])
def test_ascending_is_the_best_of_all(rows: int, columns: int) -> None:
    for seed in range(10):
        scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
        ways = itertools.combinations(range(columns), rows)
        best = max(ways, key=lambda way: sum(float(scores[r, c]) for r, c in enumerate(way)))
        assert ascending(scores) == list(best)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_student_of_the_teacher_s_blocks_finds_the_first_ones(count: int) -> None:
    teacher = tiny_model("llama", num_hidden_layers=6)
    student = tiny_model("llama", num_hidden_layers=6)
    first = tuple(range(count))  # their inputs, too, are those that they have in the teacher
    DropBlocks(stack="model.layers", keep=first).apply(student)
    tokens = torch.randint(5, 512, (4, 32), generator=torch.Generator().manual_seed(0))
    assert chosen("learned", student, teacher, tokens) == list(first)
    assert len(Anatomy(student).blocks) == count


def test_the_other_maps() -> None:
    teacher, student = tiny_model("llama", num_hidden_layers=6), tiny_model("llama", num_hidden_layers=3)
    tokens = torch.randint(5, 512, (1, 8))
    assert chosen("uniform", student, teacher, tokens) == [1, 3, 5]
    assert chosen("last", student, teacher, tokens) == [3, 4, 5]


def chosen(layer_map: Any, student: Any, teacher: Any, tokens: torch.Tensor) -> list[int]:
    """The teacher's blocks whose hidden states are compared with those of the student's."""
    comparison = Features(layer_map=layer_map, attention=0).comparison(student, teacher, (tokens, tokens))
    blocks = [block.module for block in Anatomy(teacher).blocks]
    return [blocks.index(module) for module in comparison.views[1].modules]


def test_a_sample_passes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What blocks give is that of the whole sample, and no more than some tokens are in a model at once."""
    student, teacher = tiny_model("bert", 0), tiny_model("bert", 1)
    blocks = tuple([block.module for block in Anatomy(model).blocks] for model in (student, teacher))
    tokens = torch.randint(5, 500, (5, 16))
    mask = torch.rand(5, 16) > 0.3
    named = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    whole = outputs((student, teacher), blocks, (tokens, named), mask)
    assert whole[0][0].shape == (int(mask.sum()), 64)
    monkeypatch.setattr(pairing, "PART", 32)
    seen: list[int] = []
    student.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    parts = outputs((student, teacher), blocks, (tokens, named), mask)
    assert seen == [2, 2, 1]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)
