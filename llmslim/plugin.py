"""`import llmslim.plugin` lets plain `from_pretrained` of transformers load llmslim checkpoints."""

from llmslim.checkpoint import plugin

__all__ = ["plugin"]
