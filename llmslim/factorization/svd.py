"""Plain singular value decomposition of the weights."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from llmslim.calibration.statistics import InputStats
from llmslim.factorization.factorizer import Updating


class SVD(Updating):
    """Plain SVD: the closest weight of lower rank, min ||W - u v||^2 (Eckart & Young 1936); needs no calibration.

    All inputs count alike, which those of a transformer do not: the floor that the other two must beat. With `update`
    the inputs settle the second factor.
    """

    kind: ClassVar[str] = "svd"
    weighs_inputs: ClassVar[bool] = False

    def root(self, stats: InputStats | None) -> Tensor | None:
        return None
