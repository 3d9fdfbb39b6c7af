"""Prune a model: take out single weights, MLP channels, attention heads or whole blocks.

What counts least for the output by the chosen importance goes, the rest is mended where the method can. Without
channels, heads and blocks a model is smaller and faster as it is, and where a plain config can say so (the same
widths in every block) the checkpoint needs no llmslim to load. Zeroed single weights make the file smaller and
nothing faster.
"""
