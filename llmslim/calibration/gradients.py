"""Gradients of a loaded model's loss, used up as they come: memory is the weights, one gradient, and the sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmslim.anatomy import MLP, Experts
from llmslim.anatomy.parts import Projection
from llmslim.calibration.objectives import objective_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Reduce = Callable[[Tensor, Tensor], Tensor]
"""A weight and its gradient, of one shape -> what is summed, of any shape; of a zero gradient it must be zero."""

Progress = Callable[[int, int], None]  # windows done, windows in all

PROBE = 1e-6  # a trial step along the gradient, relative to the norm of the weights
CHANGE = 1e-2  # how far a finite difference may change the gradient, relative to its norm


def accumulate(
    model: PreTrainedModel,
    tokens: Tensor,
    reduce: dict[str, Reduce],
    seed: int = 0,
    progress: Progress | None = None,
    mask_token: int | None = None,
) -> dict[str, Tensor]:
    """Sum reduce(weight, gradient) over windows, one backward per window, each gradient freed as soon as it is used.

    The gradient is that of the window's loss, a mean over its tokens (see `objectives.objective_of`). The model is
    in eval mode meanwhile, and afterwards as it was, except that every `.grad` is None.

    Args:
        model: whole, its reduced parameters in float32.
        tokens: int64 [windows, seq].
        reduce: by dotted name of a parameter; a tied one has the gradient of all its uses, under each of its names.
        seed: of what is random in the loss of masked language models and of models without a head.
        mask_token: id of the tokenizer's mask token, for a masked language model.

    Returns:
        The sums over windows by the same names; divided by `len(tokens)` they are means.

    Raises:
        ValueError: a parameter is not in float32.
    """
    sums: dict[str, Tensor] = {}
    objective = objective_of(model, mask_token)
    with _listening(model, reduce, sums):
        for index, window in enumerate(tokens):
            generator = torch.Generator().manual_seed(seed + index)
            loss = objective(window[None].to(model.device), generator)
            if loss.requires_grad:  # not if no reduced parameter has a part in it
                loss.backward()
            del loss
            if progress:
                progress(index + 1, len(tokens))
    for name in reduce.keys() - sums.keys():  # no window reached it: an expert without tokens, a pooler
        weight = model.get_parameter(name).detach()
        sums[name] = reduce[name](weight, torch.zeros_like(weight))
    return {name: sums[name] for name in reduce}


@contextmanager
def _listening(model: PreTrainedModel, reduce: dict[str, Reduce], sums: dict[str, Tensor]) -> Iterator[None]:
    """Have every backward add to `sums`; only the parameters of `reduce` get gradients meanwhile."""
    wanted: dict[nn.Parameter, list[str]] = {}  # tied names share a parameter, which has one gradient
    for name in reduce:
        parameter = model.get_parameter(name)
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is in {parameter.dtype}: gradients are taken of a model in float32")
        wanted.setdefault(parameter, []).append(name)

    @torch.no_grad()
    def use(parameter: Tensor) -> None:
        weight, gradient = parameter.detach(), parameter.grad
        assert isinstance(parameter, nn.Parameter) and gradient is not None
        parameter.grad = None
        for name in wanted[parameter]:
            value = reduce[name](weight, gradient)
            sums[name] = sums[name].add_(value) if name in sums else value.clone()

    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = {module: module.training for module in model.modules()}
    model.eval()
    model.zero_grad(set_to_none=True)
    for parameter in required:
        parameter.requires_grad_(parameter in wanted)
    hooks = [parameter.register_post_accumulate_grad_hook(use) for parameter in wanted]
    try:
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, was in required.items():
            parameter.requires_grad_(was)
            parameter.grad = None  # of a backward that broke off
        for module, was in training.items():
            module.training = was


def mean_gradient(
    model: PreTrainedModel,
    tokens: Tensor,
    names: Iterable[str],
    seed: int = 0,
    progress: Progress | None = None,
    mask_token: int | None = None,
) -> dict[str, Tensor]:
    """The gradient of the mean loss over all windows, float32 in the shape of each named parameter.

    Takes the memory of these parameters once more. Arguments as of `accumulate`.
    """
    share = 1.0 / len(tokens)
    reduce: dict[str, Reduce] = dict.fromkeys(names, lambda weight, gradient: gradient * share)
    return accumulate(model, tokens, reduce, seed, progress, mask_token)


def hessian_gradient(
    model: PreTrainedModel,
    tokens: Tensor,
    names: Iterable[str],
    seed: int = 0,
    progress: Progress | None = None,
    mask_token: int | None = None,
) -> dict[str, Tensor]:
    """H g by finite difference: g the mean gradient of the named parameters, H the Hessian of the mean loss in them.

    H g = (g(w + eps g) - g(w - eps g)) / (2 eps): three runs over the windows instead of a double backward, which
    would hold a graph of the gradient and which fused attention does not offer. A trained model is so sharp along g
    that no fixed share of ||w|| / ||g|| will do (at 1e-2 of it nothing is right): eps is such that the gradient of
    the first window changes by a hundredth of its norm, which a trial step tells. So both the bend of the loss and
    the rounding of float32 stay below 1e-2 of H g (against double backward: 0.1 to 0.5% on SmolLM2-135M). Where a
    mixture of experts sends a token elsewhere within the step, the difference has a jump of the loss in it.

    Takes the memory of the named parameters three times more. The weights are put aside, not computed back, so they
    are the same afterwards bit for bit. Arguments as of `accumulate`; `progress` counts all three runs.
    """
    names = list(names)
    runs = iter(range(3))

    def gradient() -> dict[str, Tensor]:
        before = next(runs) * len(tokens)
        report = (lambda done, total: progress(before + done, 3 * total)) if progress else None
        return mean_gradient(model, tokens, names, seed, report, mask_token)

    direction = gradient()
    if norm(direction.values()) == 0:
        return direction
    eps = _step(model, tokens[:1], direction, seed, mask_token)
    with _moved(model, direction, eps):
        result = gradient()
    with _moved(model, direction, -eps):
        for name, behind in gradient().items():
            result[name].sub_(behind).div_(2 * eps)
    return result


def _step(
    model: PreTrainedModel, window: Tensor, direction: dict[str, Tensor], seed: int, mask_token: int | None
) -> float:
    """How far to go along `direction` so that the window's gradient changes by CHANGE of its norm."""
    weights = norm(model.get_parameter(name).detach() for name in direction)
    trial = PROBE * (weights or 1.0) / norm(direction.values())
    here = mean_gradient(model, window, direction, seed, None, mask_token)
    length = norm(here.values())
    with _moved(model, direction, trial):
        there = mean_gradient(model, window, direction, seed, None, mask_token)
    change = norm(there[name].sub_(here[name]) for name in direction) / (length or 1.0)
    return trial * CHANGE / max(change, 1e-6)  # a change below that is rounding


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of tensors as one vector."""
    return float(torch.stack([torch.linalg.vector_norm(tensor).double() for tensor in tensors]).norm())


@contextmanager
def _moved(model: PreTrainedModel, direction: dict[str, Tensor], eps: float) -> Iterator[None]:
    """The model at w + eps * direction, for a while."""
    moves = {model.get_parameter(name): step for name, step in direction.items()}  # a tied one moves once
    kept = {parameter: parameter.data for parameter in moves}
    try:
        for parameter, step in moves.items():
            parameter.data = torch.add(kept[parameter], step, alpha=eps)
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w g|, the first-order change of a window's loss when a single weight is set to 0; a `Reduce` to sum up.

    Keep the highest. Molchanov et al. 2019, arXiv:1906.10771, without their square: |.| per window, so that
    windows that a weight helps and windows that it harms do not cancel.
    """
    return (weight * gradient).abs()


def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w g| of the mean gradient (`mean_gradient`). Keep the highest. Lee et al. 2019, arXiv:1810.02340."""
    return (weight * gradient).abs()


def grasp(weight: Tensor, hessian_gradient: Tensor) -> Tensor:
    """-w (H g), how removing a weight changes the gradient's squared norm, to first order and up to a factor of 2.

    Remove the HIGHEST, keep the lowest (the opposite of the other scores): a high score is a weight without which
    the gradient grows, a low one a weight that the flow of gradients needs. Wang et al. 2020, arXiv:2002.07376,
    algorithm 1 (mask = S < tau), without the temperature that it divides an untrained network's logits by.
    """
    return -weight * hessian_gradient


def unit_taylor(units: Tensor, dim: int) -> Reduce:
    """A `Reduce` that gives |sum w g| of each unit of rows along `dim` of a weight: [...] per window.

    For the inputs of `o` or `down` that is the derivative of the window's loss by a gate on what flows through
    them, exactly: closing the gate (removing the rows) changes the loss so much to first order. Molchanov et al.
    2019, arXiv:1906.10771.

    Args:
        units: int64 [..., width], the rows of each unit.
    """

    def reduce(weight: Tensor, gradient: Tensor) -> Tensor:
        influence = (weight * gradient).sum(1 - dim)
        return influence[units.to(weight.device)].sum(-1).abs()

    return reduce


def group_taylor(projection: Projection, size: int = 1) -> Reduce:
    """`unit_taylor` of each run of `size` rows of a projection: [rows / size] per window.

    Runs of `head_dim` rows of an attention's `o` give |dL / d gate| of each query head: Michel et al. 2019,
    arXiv:1905.10650, without their division by the norm over a layer's heads.
    """
    return unit_taylor(projection.rows.view(-1, size), projection.dim)


def channel_taylor(mlp: MLP | Experts) -> Reduce:
    """A `Reduce` for the weight of `mlp.down`: [width], the importance of each channel.

    Of fused experts, for their parameter `mlp.down`: [experts, width].
    """
    if isinstance(mlp, Experts):
        return lambda weight, gradient: (weight * gradient).sum(1).abs()
    return group_taylor(mlp.down)
