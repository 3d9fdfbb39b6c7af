"""Distil how samples lie to each other."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from llmslim.distillation._loss import Distill


class Relations(Distill):
    """Train a student to set the windows of a batch in the same distances and angles to each other.

    RKD (Park et al. 2019, arXiv:1904.05068) on the means over a window of the last hidden states, behind the final
    norm: made for embeddings of texts, so for encoders above all. Widths may differ, nothing is projected. The last
    batch of an epoch gives no angle with less than three windows, and no distance with one. It is `response` with other
    weights: token_distance and token_angle relate the tokens of a window, too, as `features` tells.
    """

    kind: ClassVar[str] = "relations"
    verb: ClassVar[str] = "distill"

    distance: float = Field(25.0, ge=0, description="weight of the distances between samples")
    angle: float = Field(50.0, ge=0, description="weight of the angles between three samples")
