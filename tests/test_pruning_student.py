"""Students: the sizes asked for, the largest that meets a target, and weights inherited from the teacher."""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from llmslim import cli
from llmslim.checkpoint.load import load
from llmslim.errors import UserError
from llmslim.pruning.student import (
    BLOCK_OVERHEAD,
    DEPTH,
    WIDTH,
    Student,
    evenly,
    parse_parameters,
    token_cost,
)
from llmslim.step import Step
from tests.checkpoints import outlook
from tests.tiny import save_tiny

pytestmark = pytest.mark.usefixtures("verified_here")

DEEP: dict[str, Any] = {"num_hidden_layers": 12, "intermediate_size": 256, "num_attention_heads": 8}


def after(steps: list[Step], before: Any) -> Any:
    for step in steps:
        step.check(before.anatomy)
        before = before.after(step.planned_edits(before.anatomy))
    return before


def test_blocks_at_even_distances() -> None:
    assert evenly(6, 3) == [0, 2, 5] and evenly(12, 12) == list(range(12)) and evenly(5, 1) == [0]
    for count in range(2, 40):
        for stay in range(2, count + 1):
            kept = evenly(count, stay)
            gaps = {kept[i + 1] - kept[i] for i in range(stay - 1)}
            assert kept[0] == 0 and kept[-1] == count - 1 and max(gaps) - min(gaps) <= 1


def test_parameters_are_read_as_a_count_or_a_share() -> None:
    assert (
        parse_parameters("60M") == 60e6 and parse_parameters("1.5b") == 1.5e9 and parse_parameters(0.5) == 0.5
    )
    for text in ("60Q", "-1M", 1, 0, "much"):
        with pytest.raises(ValueError, match="60M"):
            parse_parameters(text)


@pytest.mark.parametrize("family", ["llama", "opt", "t5", "mixtral"])
def test_the_sizes_are_those_asked_for(family: str) -> None:
    before = outlook(family)
    steps, told = Student(layers=2, heads=2, channels=40).resolve(before)
    left = after(steps, before).anatomy
    assert [len(stack.blocks) for stack in left.stacks] == [2] * len(left.stacks)
    assert {block.attention.num_heads for block in left.blocks} == {2}
    assert {block.mlp.width for block in left.blocks if block.mlp} == {40}
    assert "2 heads" in told and "40 channels" in told


def test_kv_heads_are_pooled() -> None:
    before = outlook("llama", num_key_value_heads=4)
    steps, _ = Student(kv_heads=2).resolve(before)
    attention = after(steps, before).anatomy.blocks[0].attention
    assert [step.kind for step in steps] == ["kv_groups"]
    assert (attention.num_heads, attention.num_kv_heads) == (4, 2)


@pytest.mark.parametrize("fields", [{"params": 0.6}, {"params": "0.2M"}, {"latency": 0.4}, {}])
def test_a_target_is_met_by_the_least_exponent(fields: dict[str, Any]) -> None:
    """Depth and inner width are those of one exponent, and of one notch less they would be too large."""
    before = outlook("llama", **DEEP)
    student = Student(**fields)
    steps, _ = student.resolve(before)
    left = after(steps, before)
    goal = {"0.2M": 0.2e6}.get(str(student.params), (student.params or 0.5) * before.parameters)  # type: ignore[operator]
    size = (lambda look: token_cost(look.anatomy)) if student.latency else (lambda look: look.parameters)
    goal = student.latency * token_cost(before.anatomy) if student.latency else goal
    assert size(left) <= goal
    met = lambda n: size(after(student._at(n, before), before)) <= goal  # noqa: E731
    notch = bisect.bisect_left(range(400), True, key=met)
    depth, width = DEPTH ** (-notch / 20), WIDTH ** (-notch / 20)
    assert steps[0].kind == "layers"
    assert len(left.anatomy.blocks) == round(12 * depth)
    (channels,) = {block.mlp.width for block in left.anatomy.blocks}
    assert 256 * width <= channels < 256 * width + 32  # in multiples of 32
    assert size(after(student._at(notch - 1, before), before)) > goal


def test_a_token_reads_the_blocks_the_head_and_of_experts_those_it_takes() -> None:
    dense = outlook("llama").anatomy
    blocks = sum(p.numel() for b in dense.blocks for p in b.module.parameters())
    assert token_cost(dense) == 3 * BLOCK_OVERHEAD + blocks + 512 * 64
    mixture = outlook("mixtral").anatomy  # 2 of 4 experts, 3 matrices of 64 x 64 each
    blocks = sum(p.numel() for b in mixture.blocks for p in b.module.parameters())
    assert token_cost(mixture) == 3 * BLOCK_OVERHEAD + blocks - 3 * 2 * 3 * 64 * 64 + 512 * 64


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": 3}, "layers 3 makes no smaller student: model.layers has 3 blocks"),
        ({"channels": 128}, "channels 128 makes no smaller student"),
        ({"heads": 3}, "heads 3 cannot be what stays of 4 query heads that read 2 KV heads.*possible: 2"),
        ({"kv_heads": 3}, "kv_heads 3 is no smaller divisor of the 2 KV heads"),
        ({"params": 0.05}, "params 0.05 is out of reach of a student"),
        ({"params": "7B"}, "params 7B is met by the model as it is"),
    ],
)
def test_what_cannot_be_built_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        before = outlook("llama")
        after(Student(**fields).resolve(before)[0], before)


def test_a_target_and_sizes_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="params and layers both say how small"):
        Student(params=0.5, layers=2)
    with pytest.raises(ValidationError, match="params and latency both"):
        Student(params=0.5, latency=0.5)


RUN = "--num-samples 4 --seq-len 32 --no-evaluate --max-steps 2 --batch-size 2"


def test_a_student_is_built_and_taught_by_what_it_is_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate of nothing it is the teacher's own blocks, the first and the last."""
    teacher, out = save_tiny("llama", tmp_path / "teacher"), tmp_path / "out"
    words = f"distill {teacher} --method features --student-layers 2 --lr 1e-12 {RUN} --output {out}"
    assert cli.main(words.split()) == 0, capsys.readouterr().err
    made, _ = load(out, dtype=torch.float32)
    base, _ = load(teacher, dtype=torch.float32)
    assert made.config.num_hidden_layers == 2
    for mine, own in ((0, 0), (1, 2)):
        for part in ("self_attn.q_proj", "mlp.up_proj"):
            weight = made.get_parameter(f"model.layers.{mine}.{part}.weight")
            torch.testing.assert_close(weight, base.get_parameter(f"model.layers.{own}.{part}.weight"))
    assert "student of 2 blocks" in capsys.readouterr().err


def test_finetune_builds_one_too_and_what_a_student_is_not_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.glue_data import write_glue

    write_glue(tmp_path / "glue", ["sst2"], train=16)
    model = save_tiny("llama", tmp_path / "model")
    words = f"finetune {model} --glue sst2 --data {tmp_path / 'glue'} --student-channels 64 {RUN}"
    assert cli.main([*words.split(), "--output", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    made, _ = load(tmp_path / "out")
    assert made.config.intermediate_size == 64 and made.config.num_labels == 2
    assert cli.main([*words.split(), "--student-layers", "9", "--plan"]) == 2
    assert "layers 9 makes no smaller student" in capsys.readouterr().err
    assert cli.main([*words.split(), "--student-layer", "2", "--plan"]) == 2
    assert "did you mean '--student-layers'?" in capsys.readouterr().err
