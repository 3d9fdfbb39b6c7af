"""Calibration: texts on their way through a model, one block at a time, and the statistics they leave."""
