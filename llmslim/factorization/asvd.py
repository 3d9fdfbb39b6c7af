"""Singular value decomposition of weights scaled by the size of their inputs."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from llmslim.calibration.statistics import InputStats
from llmslim.factorization.factorizer import Updating


class ASVD(Updating):
    """ASVD: the SVD of W S, S diagonal, S_jj = (size of input j)^alpha (Yuan et al. 2023, arXiv:2312.05821).

    The size is the root mean square over the calibration tokens, as it arrives through the already factored part of
    the model; the paper takes the mean of |x|. Its search of a rank for each Linear by perplexity is left out:
    `allocation error` has that place.
    """

    kind: ClassVar[str] = "asvd"

    alpha: float = Field(0.5, gt=0, le=1, description="exponent of the inputs' size")

    def root(self, stats: InputStats | None) -> Tensor | None:
        if stats is None:
            return None
        size = (stats.hessian.diagonal() / max(1, stats.tokens)).sqrt()
        return (size / size.mean().clamp_min(1e-30)).clamp_min(1e-6) ** self.alpha
