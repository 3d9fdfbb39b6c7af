"""Prune a model: take out single weights, MLP channels, attention heads, experts or whole blocks.

What counts least for the output by the chosen importance goes, the rest is mended where the method can. Heads,
channels, experts and blocks make the model smaller and faster as it is; where a plain config can express the
result (the same widths everywhere), the checkpoint needs no llmslim to load. Verified and measured like any other.
"""
