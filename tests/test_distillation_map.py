"""Which block of the teacher a block of the student learns from."""

from __future__ import annotations

import itertools

import pytest
import torch

from llmslim.anatomy import Anatomy
from llmslim.distillation.features import Features
from llmslim.edit import DropBlocks
from llmslim.training.pairing import alikeness, ascending
from tests.tiny import tiny_model


def test_alikeness_is_cka_by_its_gram_matrices() -> None:
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 8, dtype=torch.float64)
    y[:, :3] += x[:, :3]
    center = torch.eye(30, dtype=torch.float64) - 1 / 30
    k, m = center @ x @ x.T @ center, center @ y @ y.T @ center
    naive = (k * m).sum() / (k.norm() * m.norm())
    assert alikeness(x, y) == pytest.approx(float(naive), rel=1e-4)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert alikeness(x, 3 * x @ turn + 7) == pytest.approx(1, abs=1e-5)


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
    step = Features(layer_map="learned")
    assert step._chosen(student, teacher, tokens, None) == list(first)
    assert len(Anatomy(student).blocks) == count


def test_the_other_maps() -> None:
    teacher, student = tiny_model("llama", num_hidden_layers=6), tiny_model("llama", num_hidden_layers=3)
    tokens = torch.randint(5, 512, (1, 8))
    assert Features(layer_map="uniform")._chosen(student, teacher, tokens, None) == [1, 3, 5]
    assert Features(layer_map="last")._chosen(student, teacher, tokens, None) == [3, 4, 5]
