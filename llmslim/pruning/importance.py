"""How much a part of a matrix's inputs matters, and the best weights for the inputs that stay.

All functions are pure. A matrix W [out, in] reads inputs X [tokens, in], of which only H = X^T X is known. Its
inputs come in units that are kept or removed as one (a channel, a head, a group of heads), given as `units`
int64 [pools, size, width]: the `width` columns of each unit. From every pool equally many units are removed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmslim.calibration.factor import rising_cholesky
from llmslim.calibration.statistics import InputStats, output_power
from llmslim.errors import UserError


def output_increase(weight: Tensor, hessian: Tensor, units: Tensor) -> Tensor:
    """||W_S X_S||^2 of each unit S: the squared output error when it alone is removed and nothing refitted.

    It is tr(W_S H_SS W_S^T), for single channels H_jj ||W_j||^2 (the criterion of Wanda and FLAP, summed).

    Args:
        weight: float [out, in].
        hessian: X^T X [in, in].

    Returns:
        [pools, size].
    """
    flat = units.reshape(-1, units.shape[-1])
    if flat.shape[1] == 1:
        columns = flat[:, 0]
        scores = hessian.diagonal()[columns] * weight[:, columns].square().sum(0)
    else:
        scores = torch.stack([output_power(weight[:, unit], hessian[unit][:, unit]) for unit in flat])
    return scores.view(units.shape[:2])


def refit_increase(weight: Tensor, inverse: Tensor, units: Tensor) -> Tensor:
    """The same error when all inputs that stay are refitted: tr(W_S [H^-1]_SS^-1 W_S^T).

    The group form of the optimal brain surgeon (Hassibi & Stork 1993; Kurtic et al. 2023, arXiv:2302.04089).

    Args:
        weight: float [out, in], optimal for these inputs.
        inverse: of the (damped) Hessian, [in, in].

    Returns:
        [pools, size].
    """
    flat = units.reshape(-1, units.shape[-1])
    if flat.shape[1] == 1:
        columns = flat[:, 0]
        scores = weight[:, columns].square().sum(0) / inverse.diagonal()[columns]
    else:
        blocks = inverse[flat[:, :, None], flat[:, None, :]]
        parts = weight[:, flat].permute(1, 2, 0)  # [units, width, out]
        scores = (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))
    return scores.view(units.shape[:2])


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + lambda I in float64, lambda = `damping` x its mean diagonal."""
    result = hessian.double()
    result.diagonal().add_(_ridge(hessian, damping))
    return result


def cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor of a float64 matrix.

    Where rounding leaves it without one, as of too little text, that of the matrix with more damping: 1e-8 of the mean
    diagonal, raised tenfold until there is a factor.

    Raises:
        UserError: it is not finite.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        return lower
    if not bool(matrix.isfinite().all()):
        raise UserError(
            "The model has NaN or infinite weights, or states on this text: mend it before it is pruned."
        )
    return rising_cholesky(matrix, 1e-8 * matrix.diagonal().mean())[0]


def _ridge(hessian: Tensor, damping: float) -> Tensor:
    """lambda in float64; 1 where no input was ever but zero: any weight will do."""
    ridge = damping * hessian.diagonal().double().mean()
    return ridge if ridge > 0 else torch.ones_like(ridge)


def keep_best(scores: Tensor, remove: int) -> Tensor:
    """bool [pools, size]: all but the `remove` lowest of each pool."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    return keep.scatter_(1, scores.argsort(dim=1, stable=True)[:, :remove], False)


def eliminate(weight: Tensor, hessian: Tensor, units: Tensor, remove: int, at_once: int = 1) -> Tensor:
    """Which units stay when the cheapest is removed again and again, each time with all others refitted.

    After a removal of S the other weights take over, W -= W_S ([H^-1]_SS)^-1 [H^-1]_S, and the inverse loses S by
    its Schur complement, so that every decision is made on what the earlier ones left.

    Args:
        hessian: damped.
        remove: units to remove from every pool.
        at_once: of a single pool, how many are removed between two looks.

    Returns:
        bool [pools, size], on the CPU.
    """
    pools, size, _ = units.shape
    inverse = torch.cholesky_inverse(cholesky(hessian.double())).to(weight.dtype)
    # what is decided is on the CPU, as `units` are: such indices are taken on every device, others on their own alone
    keep = torch.ones(pools, size, dtype=torch.bool)
    place = torch.arange(weight.shape[1])  # where a column stands in what is left
    while (left := remove - (size - int(keep.sum(1).max()))) > 0:
        open_ = keep & (keep.sum(1, keepdim=True) > size - remove)
        open_units = open_.nonzero()
        scores = refit_increase(weight, inverse, place[units[open_]][None])[0].cpu()
        chosen = open_units[scores.argsort(stable=True)[: min(at_once, left) if pools == 1 else 1]]
        keep[chosen[:, 0], chosen[:, 1]] = False
        gone = place[units[chosen[:, 0], chosen[:, 1]].reshape(-1)]
        stays = torch.ones(weight.shape[1], dtype=torch.bool)
        stays[gone] = False
        weight, inverse = _without(weight, inverse, gone, stays)
        place = (stays.cumsum(0) - 1)[place]
    return keep


def refit(weight: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    """The weights for the inputs that stay which come closest to the old outputs.

    min_W' ||W X - W'_S X_S||^2 + lambda ||W' - W||^2, whose answer is W_S + W_R H_RS (H_SS + lambda I)^-1 for the
    inputs R removed and S kept.

    Args:
        weight: float [out, in].
        hessian: damped, H + lambda I.
        keep: int64 [kept], the columns that stay.

    Returns:
        [out, kept], of the weight's dtype.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[keep] = False
    columns = hessian[:, keep].double()
    lower = cholesky(columns[keep])
    moved = torch.cholesky_solve(columns[gone].T @ weight[:, gone].T.double(), lower).T
    return (weight[:, keep] + moved).to(weight.dtype)


def moments(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(T^T X [out, in], X^T X [in, in]) over chunks [..., out] and [..., in], in float32."""
    hessian = InputStats.of(inputs).hessian
    cross = torch.zeros(outputs[0].shape[-1], len(hessian), device=hessian.device)
    for wanted, given in zip(outputs, inputs, strict=True):
        cross.addmm_(wanted.flatten(0, -2).float().T, given.flatten(0, -2).float())
    return cross, hessian


def least_squares(cross: Tensor, hessian: Tensor, damping: float, prior: Tensor | None = None) -> Tensor:
    """min_W ||T - X W^T||^2 + lambda ||W - W_0||^2, lambda = `damping` x the mean diagonal of H.

    Its answer is (T^T X + lambda W_0) (H + lambda I)^-1.

    Args:
        cross: T^T X [out, in], T the outputs wanted.
        hessian: H = X^T X [in, in].
        prior: W_0 [out, in], what is pulled to; 0 when None.

    Returns:
        float32 [out, in].
    """
    wanted = cross.double()
    if prior is not None:
        wanted = wanted + _ridge(hessian, damping) * prior.double()
    return torch.cholesky_solve(wanted.T, cholesky(damped(hessian, damping))).T.float()


def allocate(scores: list[Tensor], remove: int, least: list[int]) -> list[int]:
    """How many rounds of removal each block gets when the cheapest of all blocks come first.

    Args:
        scores: per block [rounds], what each further round costs; made ascending here.
        remove: rounds in all.
        least: per block, rounds that must stay.

    Returns:
        Rounds to remove, per block.
    """
    costs = [score.sort().values[: len(score) - stay] for score, stay in zip(scores, least, strict=True)]
    owner = torch.cat([torch.full((len(cost),), index) for index, cost in enumerate(costs)])
    chosen = owner[torch.cat(costs).argsort(stable=True)[:remove]]
    return torch.bincount(chosen, minlength=len(scores)).tolist()


def _without(weight: Tensor, inverse: Tensor, gone: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and inverse Hessian of the inputs that stay, after they took over from those gone."""
    rows = inverse[gone]
    solved = torch.linalg.solve(rows[:, gone], rows[:, stays])
    weight = weight[:, stays] - weight[:, gone] @ solved
    return weight, inverse[stays][:, stays].addmm_(rows[:, stays].T, solved, alpha=-1)
