"""GPT-NeoX and Pythia: one matrix for q, k and v whose rows go head by head, [head, (q, k, v), head_dim]."""

from llmslim.anatomy.family import Family

FAMILY = Family(
    qkv=("query_key_value",),
    qkv_layout="per_head",
    o=("attention.dense",),
    up=("dense_h_to_4h",),
    down=("dense_4h_to_h",),
)
