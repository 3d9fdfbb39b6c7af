"""What a family calls its parts: the usual names, and how a family that breaks with them says so.

`Family()` holds the names that most transformers use, so most families need no file. One that differs has
`families/<model_type>.py` with `FAMILY = Family(...)`, naming only what differs; its name is how it is found.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Names = tuple[str, ...]

# fmt: off
TESTED = (
    "bert", "distilbert", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "mixtral",
    "modernbert", "opt", "phi3", "qwen2", "qwen3", "qwen3_moe", "roberta", "t5",
)  # fmt: on
"""Families whose anatomy tests/test_anatomy.py proves; others with the usual names are read as well."""

ATTENTION_ROLES = ("q", "k", "v", "qkv", "o", "position_bias")
MLP_ROLES = ("gate", "up", "gate_up", "down")
EXPERT_ROLES = ("experts", "router", "shared_gate")
SITES = ("attention", "cross_attention", "mlp", "experts", "shared_mlp")


@dataclass(frozen=True)
class Family:
    """The names of the parts inside a block, as ends of dotted paths; where several fit, the longest wins.

    Attributes:
        q, k, v, o: the attention's matrices when they are separate.
        qkv: one matrix for q, k and v; its rows are all of q, then k, then v ("stacked"), or for each head
            its q, k and v ("per_head"), as `qkv_layout` says.
        position_bias: a table with one column per head that is added to the attention scores.
        gate, up, down: the matrices of the MLP, `down(act(gate(x)) * up(x))`, or `down(act(up(x)))`.
        gate_up: one matrix whose rows are all of gate (the half that goes through `act`), then up.
        experts: the module with parameters `gate_up_proj` [E, 2I, H] (gate, then up), `down_proj` [E, H, I].
        router, shared_gate: what chooses the experts and what weighs the shared one; never compressed.
        cross, shared: a step on the path to cross-attention, or to the expert that all tokens share.
        head_dim: what the attention module calls the width of one head.
    """

    q: Names = ("q_proj", "query", "q_lin", "q")
    k: Names = ("k_proj", "key", "k_lin", "k")
    v: Names = ("v_proj", "value", "v_lin", "v")
    o: Names = ("o_proj", "out_proj", "out_lin", "o", "attention.output.dense", "crossattention.output.dense")
    qkv: Names = ()
    qkv_layout: Literal["stacked", "per_head"] = "stacked"
    position_bias: Names = ("relative_attention_bias",)
    gate: Names = ("gate_proj", "wi_0")
    up: Names = ("up_proj", "fc1", "lin1", "wi_1", "wi", "intermediate.dense")
    gate_up: Names = ()
    down: Names = ("down_proj", "fc2", "lin2", "wo", "output.dense")
    experts: Names = ("experts",)
    router: Names = ("gate", "router")
    shared_gate: Names = ("shared_expert_gate",)
    cross: Names = ("EncDecAttention", "encoder_attn", "crossattention")
    shared: Names = ("shared_expert", "shared_experts")
    head_dim: Names = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")

    @cached_property
    def _roles(self) -> dict[str, str]:
        """Name -> role; of a name that several roles have, the last by the alphabet."""
        roles = sorted((*ATTENTION_ROLES, *MLP_ROLES, *EXPERT_ROLES))
        return {name: role for role in roles for name in getattr(self, role)}

    def role_of(self, path: str) -> tuple[str, str] | None:
        """(site, role) of the module at `path` inside a block, or None.

        The site is one of SITES.
        """
        steps = path.split(".")
        ends = (".".join(steps[start:]) for start in range(len(steps)))  # the longest first
        role = next((self._roles[end] for end in ends if end in self._roles), None)
        if role is None:
            return None
        if role in ATTENTION_ROLES:
            return "cross_attention" if any(step in self.cross for step in steps) else "attention", role
        if role in EXPERT_ROLES:
            return "experts", role
        return "shared_mlp" if any(step in self.shared for step in steps) else "mlp", role


def family_of(model_type: str) -> Family:
    """The family's own file if it has one, else the usual names."""
    module = f"llmslim.anatomy.families.{model_type}"
    if model_type.isidentifier() and importlib.util.find_spec(module):
        return importlib.import_module(module).FAMILY
    return Family()
