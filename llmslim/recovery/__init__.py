"""Recover a compressed model by training it a little.

Against the uncompressed model's distribution over tokens (the default, which needs no labels), or on the text
itself. Scales and norms alone, low-rank adapters that are merged, or all weights of a dense model. What is packed
stays packed and what is pruned stays pruned. Give more text than for calibration, and your own:
--calibration TEXT --num-samples 256.
"""
