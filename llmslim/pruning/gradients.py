"""Pruning of single weights by gradients of the loss on a text: taylor, snip and grasp."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from llmslim.anatomy import Anatomy, Experts
from llmslim.anatomy.parts import is_conv1d
from llmslim.calibration.gradients import (
    Reduce,
    accumulate,
    grasp,
    hessian_gradient,
    mean_gradient,
    snip,
    taylor,
)
from llmslim.errors import UserError
from llmslim.masks import choose
from llmslim.pruning.allocation import Histogram
from llmslim.pruning.amount import check_unshared
from llmslim.pruning.weights import ThresholdPruner
from llmslim.sparse import pack_mask, unpack_mask
from llmslim.step import StepRecord, Survey

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmslim.calibration.statistics import InputStats


class GradientPruner(ThresholdPruner):
    """A step whose scores take gradients of the whole uncompressed model. Subclasses define `scores`.

    The model is loaded in float32 for it, and what stays is settled before the first block is pruned: the survey
    holds a bit per weight. The weights that stay are not changed.
    """

    @property
    def among(self) -> Literal["row", "layer", "global"]:
        """By default one threshold for the whole model, as in the papers, where nothing else says how much goes."""
        free = (
            self.pattern == "unstructured" and self.layer_sparsity == "uniform" and self.target_size is None
        )
        return self.threshold or ("global" if free else "layer")

    def check(self, anatomy: Anatomy) -> None:
        check_unshared(anatomy, self.kind)
        super().check(anatomy)

    @property
    def needs_calibration(self) -> bool:
        return True

    @property
    def needs_survey(self) -> bool:
        return True

    @property
    def survey_copies(self) -> int:
        return 2  # the model and its scores

    def scores(self, model: PreTrainedModel, names: Iterable[str], look: Survey) -> dict[str, Tensor]:
        """Parameter -> what each of its weights is worth, in its shape; the highest stay.

        Args:
            model: whole, in float32.
        """
        raise TypeError(f"{type(self).__name__} does not define scores()")

    def disk_bytes(self, anatomy: Anatomy, tokens: int) -> int:
        return sum(parameter.numel() for parameter in anatomy.model.parameters()) // 8  # the masks

    def survey(self, look: Survey) -> dict[str, Tensor]:
        """The mask of each Linear by name, `pack_mask` of bool [out, in]; empty where no gradient arrived."""
        shares = super().sparsities(look) if self.layer_sparsity != "uniform" else {}
        places = self._places(look.anatomy)
        parameters = dict.fromkeys(parameter for parameter, _ in places.values())  # each once, in order
        of_parameters = self.scores(look.loaded(), parameters, look)
        scores = {name: _view(of_parameters[parameter], part) for name, (parameter, part) in places.items()}
        for name, score in scores.items():
            if bool(score.isnan().any()):
                raise UserError(
                    f"{name} has weights, or gradients on this text, that are NaN or infinite; --exclude it or mend "
                    "the model."
                )
        reached = [name for name, score in scores.items() if bool(score[score.isfinite()].any())]
        if self.among == "global":
            histogram = Histogram()
            for name in reached:
                histogram.add(name, scores[name])
            shares = histogram.sparsities(self.sparsity)
        masks = {}
        for name in reached:
            mask = choose(scores.pop(name), shares.get(name, self.sparsity), self.pattern, self.scope)
            masks[name] = pack_mask(mask)
        return masks | {name: torch.empty(0, dtype=torch.uint8) for name in scores}

    def share(self, name: str, record: StepRecord) -> float:
        return self.sparsity  # the survey has masks

    def prune(
        self, name: str, weight: Tensor, sparsity: float, stats: InputStats | None, record: StepRecord
    ) -> tuple[Tensor, Tensor]:
        bitmap = record.survey[name]
        if not bitmap.numel():
            record.note(name, "no gradient reached it: pruned by magnitude")
            return weight, choose(weight.abs(), sparsity, self.pattern, self.scope)
        return weight, unpack_mask(bitmap.to(weight.device), weight.shape[1])

    def _places(self, anatomy: Anatomy) -> dict[str, tuple[str, int | bool]]:
        """Linear -> the parameter of its weight, and the expert if it is fused, else whether it is transposed."""
        modules = dict(anatomy.model.named_modules())
        places: dict[str, tuple[str, int | bool]] = {}
        for block in anatomy.blocks:
            for name in self.targets(block):
                if name in modules:
                    places[name] = f"{name}.weight", is_conv1d(modules[name])
                    continue
                experts = block.mlp
                assert (
                    isinstance(experts, Experts) and experts.gate_up is not None and experts.down is not None
                )
                _, index, part = name.rsplit(".", 2)
                places[name] = experts.gate_up if part == "gate_up" else experts.down, int(index)
        return places


def _view(scores: Tensor, part: int | bool) -> Tensor:
    """[out, in] of one Linear, from the scores of the parameter that holds it."""
    if scores.ndim == 3:
        return scores[int(part)]
    return scores.T if part else scores


class Taylor(GradientPruner):
    """Taylor: the weights of least sum over windows of |w g| go (Molchanov et al. 2019, arXiv:1906.10771).

    g is the gradient of a window's loss; |w g| is what the loss changes by when w goes, to first order. It is taken
    without the paper's square, per window, so that windows do not cancel.
    """

    kind: ClassVar[str] = "taylor"

    def scores(self, model: PreTrainedModel, names: Iterable[str], look: Survey) -> dict[str, Tensor]:
        reduce: dict[str, Reduce] = dict.fromkeys(names, taylor)
        return accumulate(model, look.tokens, reduce, look.seed, look.progressed, look.mask_token)


class SNIP(GradientPruner):
    """SNIP: the weights of least |w g| go, g the gradient of the mean loss (Lee et al. 2019, arXiv:1810.02340).

    The paper prunes before training; of a trained model g is small, and what is left of it is largely of the text.
    """

    kind: ClassVar[str] = "snip"

    def scores(self, model: PreTrainedModel, names: Iterable[str], look: Survey) -> dict[str, Tensor]:
        found = mean_gradient(model, look.tokens, names, look.seed, look.progressed, look.mask_token)
        for name, gradient in found.items():
            found[name] = snip(model.get_parameter(name).detach(), gradient)
        return found


class GraSP(GradientPruner):
    """GraSP: the weights of highest -w (H g) go, so that gradients grow (Wang et al. 2020, arXiv:2002.07376).

    The paper prunes before training, to keep gradients flowing. H g is a finite difference of gradients, in three
    runs over the text; of a mixture of experts it is unreliable, since a step along g sends tokens to other experts.
    Weights that are zero go first.
    """

    kind: ClassVar[str] = "grasp"

    @property
    def survey_copies(self) -> int:
        return 5  # the model, the model a step further, the direction, and the gradients of two runs

    def scores(self, model: PreTrainedModel, names: Iterable[str], look: Survey) -> dict[str, Tensor]:
        found = hessian_gradient(model, look.tokens, names, look.seed, look.progressed, look.mask_token)
        for name, product in found.items():
            weight = model.get_parameter(name).detach()
            found[name] = grasp(weight, product).neg_().masked_fill_(weight == 0, -torch.inf)
        return found
