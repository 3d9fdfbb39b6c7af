"""ModernBERT: one matrix for q, k and v, one for gate and up; Wo is the name of both output matrices."""

from llmslim.anatomy.family import Family

FAMILY = Family(qkv=("Wqkv",), o=("attn.Wo",), gate_up=("Wi",), down=("mlp.Wo",))
