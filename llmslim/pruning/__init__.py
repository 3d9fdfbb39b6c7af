"""Prune a model: take out heads, channels, experts, layers or single weights.

What matters least is chosen by what it adds to a layer's output on a calibration text, and the weights that stay
are refitted to make good what they can. The result is saved, verified in a fresh process and measured against the
base.
"""
