"""Phi-3: one matrix for q, k and v, one for gate and up."""

from llmslim.anatomy.family import Family

FAMILY = Family(qkv=("qkv_proj",), gate_up=("gate_up_proj",))
