"""Linears with a product of two narrow matrices in their place, or beside their weight; and how it is found."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmslim.calibration.factor import rising_cholesky


class LowRankLinear(nn.Module):
    """y = u(v(x)) + b, or y = base(x) + u(v(x)) with a `base`; x [..., in] -> y [..., out].

    Attributes:
        v: Linear [rank, in], without bias.
        u: Linear [out, rank]; has the bias when there is no base.
        base: what the product is added to: a Linear, dense or packed, often shared with other blocks; or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        base: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.base = base
        self.v = empty_linear(in_features, rank, dtype, device)
        self.u = empty_linear(rank, out_features, dtype, device)

    @classmethod
    def of(cls, factors: Factors, dtype: torch.dtype, base: nn.Module | None = None) -> LowRankLinear:
        """The module with these factors."""
        (out_features, rank), in_features = factors.u.shape, factors.v.shape[1]
        module = cls(in_features, out_features, rank, dtype, "meta", base)
        module.u.weight = nn.Parameter(factors.u.to(dtype).contiguous(), requires_grad=False)
        module.v.weight = nn.Parameter(factors.v.to(dtype).contiguous(), requires_grad=False)
        return module

    @property
    def bias_owner(self) -> nn.Module:
        """The part that adds the bias."""
        return self.u if self.base is None else self.base

    @property
    def weight(self) -> Tensor:
        """That of `u`, for models (T5) that look at a Linear's type; the product itself is nowhere."""
        return self.u.weight

    def forward(self, x: Tensor) -> Tensor:
        product = self.u(self.v(x))
        return product if self.base is None else self.base(x) + product

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def empty_linear(
    in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str | None
) -> nn.Linear:
    """A Linear without bias, and without drawing random weights."""
    linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device="meta")
    return linear if device == "meta" else linear.to_empty(device=device or "cpu")


class Factors(NamedTuple):
    """W ~ u v: u float32 [out, rank], v float32 [rank, in]."""

    u: Tensor
    v: Tensor


class Decomposition(NamedTuple):
    """The outputs of a weight, ordered by what they are worth.

    Attributes:
        directions: orthonormal columns [out, n], n = min(out, in), the most powerful first.
        powers: sum of squares of the outputs along each [n]; without those of the first r, what rank r loses.
    """

    directions: Tensor
    powers: Tensor

    def factors(self, weight: Tensor, rank: int) -> Factors:
        """The best approximation of that rank: the projection of the weight on its first directions.

        With W S = U Sigma V^T the truncation is U_r Sigma_r V_r^T S^-1 = U_r (U_r^T W): S need not be inverted.
        """
        u = self.directions[:, :rank]
        return balanced(u, u.T @ weight)


def decompose(weight: Tensor, root: Tensor | None = None) -> Decomposition:
    """Singular value decomposition of W S.

    Args:
        weight: W, float32 [out, in].
        root: S, with S S^T what the squared error of an input is weighed by: [in, in] (X^T X = S S^T makes the
            truncation loss the error of the outputs), [in] for a diagonal one, or None for the identity.
    """
    weighted = weight if root is None else weight * root if root.ndim == 1 else weight @ root
    directions, values, _ = torch.linalg.svd(weighted, full_matrices=False)
    return Decomposition(directions, values.square())


def refit_second(weight: Tensor, v: Tensor, hessian: Tensor, damping: float = 1e-6) -> Factors:
    """The u of least ||(W - u v) X||^2 for a given v: W H v^T (v H v^T)^-1.

    Args:
        weight: W, float32 [out, in].
        v: float32 [rank, in].
        hessian: H = X^T X, float32 [in, in].
        damping: of v H v^T, x its mean diagonal; raised tenfold until the factorization succeeds.
    """
    reach = v.double() @ hessian.double()
    inner = reach @ v.double().T
    lower, _ = rising_cholesky(inner, damping * inner.diagonal().mean())
    u = torch.cholesky_solve(reach @ weight.double().T, lower).T
    return balanced(u.float(), v)


def balanced(u: Tensor, v: Tensor) -> Factors:
    """The same product with rows of v and columns of u of equal norm: kind to 16-bit types and to quantizers."""
    ratio = (v.norm(dim=1).clamp_min(1e-30) / u.norm(dim=0).clamp_min(1e-30)).sqrt()
    return Factors(u * ratio, v / ratio.unsqueeze(-1))


def worthwhile(out_features: int, in_features: int) -> int:
    """The largest rank with which two factors have fewer weights than one matrix; 0 if none has."""
    return (out_features * in_features - 1) // (out_features + in_features)
