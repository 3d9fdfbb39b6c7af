"""Round to nearest: the data-free floor of weight quantization."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from llmslim.calibration.statistics import InputStats
from llmslim.quantization.grid import (
    QuantizedWeight,
    Scheme,
    round_to_grid,
    round_to_nearest,
    search_grid,
)
from llmslim.quantization.quantizer import Quantizer
from llmslim.step import StepRecord


class RTN(Quantizer):
    """Round to nearest: every weight goes to the closest point of its group's grid; needs no calibration.

    The grid of a group just covers its smallest and largest weight. With `search` its range is shrunk where that
    lowers the squared error of the weights, which is not the error that matters: without the inputs' statistics,
    clipping the largest weights cost more than it gained on the demo model (see evals/results).
    """

    kind: ClassVar[str] = "rtn"

    search: bool = Field(
        False, description="search the scale of least squared error instead of covering the range"
    )

    def quantize(
        self, name: str, weight: Tensor, scheme: Scheme, stats: InputStats | None, record: StepRecord
    ) -> QuantizedWeight:
        if self.search:
            return round_to_grid(weight, *search_grid(weight, scheme), scheme)
        return round_to_nearest(weight, scheme)
