"""GPT-2: Conv1D weights [in, out], and q, k and v side by side in one of them."""

from llmslim.anatomy.family import Family

FAMILY = Family(qkv=("attn.c_attn",), o=("attn.c_proj",), up=("mlp.c_fc",), down=("mlp.c_proj",))
