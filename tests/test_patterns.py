"""Patterns of module names: one that matches nothing is refused, with the names that there are."""

from __future__ import annotations

from typing import Any

import pytest

from llmslim.anatomy import Anatomy
from llmslim.errors import UserError
from llmslim.step import build_step
from tests.tiny import meta_model

KINDS: dict[str, dict[str, Any]] = {
    "rtn": {"group_size": 32},
    "gptq": {"group_size": 32},
    "wanda": {},
    "svd": {"ratio": 0.3},
    "share": {"unique_blocks": 1},
    "bnb": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_matches_nothing_is_refused_with_the_nearest_name(kind: str) -> None:
    anatomy = Anatomy.of(meta_model("llama"))
    for name in ("exclude", "include"):
        step = build_step(kind, {**KINDS[kind], name: ("up_proj", "dwn_proj")})
        with pytest.raises(
            UserError, match=f"{name} 'dwn_proj': no such .*did you mean 'down_proj'.*o_proj, q_pr"
        ):
            step.check(anatomy)
    for pattern in ("mlp", "input_layernorm"):  # there, and neither is a matrix
        with pytest.raises(UserError, match=f"exclude '{pattern}'"):
            build_step(kind, {**KINDS[kind], "exclude": (pattern,)}).check(anatomy)


@pytest.mark.parametrize("kind", KINDS)
def test_what_matches_anything_is_taken(kind: str) -> None:
    patterns = ("down_proj", "*.k_proj", "model.layers.*.self_attn.o_proj", "lm_head", "embed_tokens")
    build_step(kind, {**KINDS[kind], "exclude": patterns}).check(Anatomy.of(meta_model("llama")))


def test_experts_are_known_before_they_are_modules() -> None:
    anatomy = Anatomy.of(meta_model("qwen3_moe"))
    patterns = ("experts.0.*", "experts.*.down", "mlp.gate")  # the last is the router
    build_step("rtn", {"group_size": 32, "exclude": patterns}).check(anatomy)
    with pytest.raises(UserError, match="exclude 'experts': no such"):
        build_step("rtn", {"group_size": 32, "exclude": ("experts",)}).check(anatomy)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"overrides": {"*.nosuch_proj": {"bits": 8}}}, r"overrides '\*.nosuch_proj'"),
        ({"overrides": {"up_proj": {"bits": 8}}, "exclude": ("up_proj",)}, "overrides 'up_proj'"),
        ({"overrides": {"lm_head": {"bits": 8}}}, "overrides 'lm_head'"),
        ({"overrides": {"lm_head": {"bits": 8}, "*.1.*.o_proj": {"bits": 3}}, "embeddings_bits": 4}, ""),
    ],
)
def test_an_override_is_of_a_weight_that_is_quantized(fields: dict[str, Any], problem: str) -> None:
    step, anatomy = build_step("rtn", {"group_size": 32, **fields}), Anatomy.of(meta_model("llama"))
    if not problem:
        step.check(anatomy)
        return
    with pytest.raises(UserError, match=f"{problem}: no such weight among those quantized.*down_proj"):
        step.check(anatomy)
