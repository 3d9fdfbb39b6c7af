"""Low-rank adapters by peft, merged when they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from llmslim.anatomy import Anatomy
from llmslim.anatomy.match import nearest
from llmslim.anatomy.parts import is_conv1d, is_linear
from llmslim.errors import UserError
from llmslim.sparse import SparseLinear
from llmslim.step import matches
from llmslim.ties import shared_modules
from llmslim.training.objective import ObjectiveStep
from llmslim.training.step import LOST, Finish

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoRA(ObjectiveStep):
    """Train low-rank adapters beside frozen Linears, dense, sparse or packed, and merge them.

    y = W x + (alpha / rank) B A x (Hu et al. 2021, arXiv:2106.09685); over packed weights that is QLoRA (Dettmers
    et al. 2023, arXiv:2305.14314). Merging into dense weights is exact; of sparse ones the adapter is masked while
    it trains. Packed weights are rounded anew to the grid that they have, which loses most of what is smaller than
    half a step: how much is noted. Weights that blocks share get no adapters (their corrections do). No adapters are
    kept beside: the result is a checkpoint like its source.
    """

    kind: ClassVar[str] = "lora"
    verb: ClassVar[str] = "recover"

    lr: float = Field(2e-4, gt=0, description="peak learning rate of AdamW; cosine to 0 at the end")
    rank: int = Field(16, ge=1, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="adapters count alpha / rank times")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's inputs dropped in training")
    target_modules: tuple[str, ...] = Field(
        (),
        description="modules that get adapters, by name: 'q_proj'; all Linears of the blocks when not given",
    )

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        _installed()
        known = _linears(anatomy)
        missing = [pattern for pattern in self.target_modules if not self._named(known, (pattern,))]
        if missing or not known:
            leaves = sorted({name.rpartition(".")[2] for name in known})
            raise UserError(
                f"target_modules {', '.join(map(repr, missing))}: no such Linear in the blocks; there are "
                f"{', '.join(leaves) or 'none'}."
            )

    @staticmethod
    def _named(known: dict[str, nn.Module], patterns: tuple[str, ...]) -> list[str]:
        return [name for name in known if not patterns or matches(name, patterns)]

    @contextmanager
    def training(self, model: PreTrainedModel) -> Iterator[tuple[list[nn.Parameter], Finish]]:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners import lora

        known = _linears(Anatomy(model))
        targets = self._named(known, self.target_modules)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=list(targets),
            fan_in_fan_out=any(is_conv1d(known[name]) for name in targets),
        )
        packed = {type(known[name]) for name in targets if hasattr(known[name], "quantized")}
        config._register_custom_module(
            {**dict.fromkeys(packed, lora.Linear), SparseLinear: _masked(lora.Linear)}
        )
        inject_adapter_in_model(config, model)
        adapters: dict[str, Any] = {name: model.get_submodule(name) for name in targets}
        parameters = [p for name, p in model.named_parameters() if ".lora_" in name]
        yield parameters, lambda: _merged(adapters)


def _merged(adapters: dict[str, Any]) -> dict[str, Tensor]:
    """The weights with what the adapters add, by the names of the checkpoint."""
    merged: dict[str, Tensor] = {}
    lost = wanted = 0.0
    for name, adapter in adapters.items():
        base, delta = adapter.get_base_layer(), adapter.get_delta_weight("default")
        if not hasattr(base, "quantized"):
            mask = base.mask if isinstance(base, SparseLinear) else 1
            merged[f"{name}.weight"] = base.weight + delta * mask
            continue
        before = base.quantized()
        after = replace(before, codes=_codes(before, before.dequantize() + delta))
        lost += float((after.dequantize() - before.dequantize() - delta).square().sum())
        wanted += float(delta.square().sum())
        base.store(after)
        merged[f"{name}.weight_packed"] = base.weight_packed
    if wanted:
        merged[LOST] = torch.tensor((lost / wanted) ** 0.5)
    return merged


def _codes(grid: Any, weight: Tensor) -> Tensor:
    """The nearest codes, uint8 [out, in], of a weight on the grid that a packed one has."""
    rows, groups = grid.scale.shape
    scale = grid.scale.reshape(rows, 1, groups, 1)
    zero = (
        grid.scheme.midpoint
        if grid.zero_point is None
        else grid.zero_point.float().reshape(rows, 1, groups, 1)
    )
    parts = weight.reshape(rows, -1, groups, weight.shape[1] // groups)
    codes = (parts / scale + zero).round_().clamp_(0, grid.scheme.max_code)
    return codes.to(torch.uint8).reshape(weight.shape)


def _masked(linear: Any) -> Any:
    """peft's Linear whose adapter, too, reaches only the weights that a `SparseLinear` keeps."""

    class MaskedLinear(linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            base, delta = self.get_base_layer(), self.get_delta_weight("default")
            return base(x) + F.linear(self.lora_dropout["default"](x), delta * base.mask)

    return MaskedLinear


def _linears(anatomy: Anatomy) -> dict[str, nn.Module]:
    """Every Linear of the blocks, dense or packed, by its dotted name; none whose weight several blocks use.

    An adapter of one block cannot be merged into what others use as well.
    """
    shared = shared_modules(anatomy.model)
    used = {*shared, *shared.values()}
    return {
        f"{block.name}.{name}": module
        for block in anatomy.blocks
        for name, module in block.module.named_modules()
        if (is_linear(module) or (hasattr(module, "quantized") and hasattr(module, "in_features")))
        and not nearest(f"{block.name}.{name}", used)
    }


def _installed() -> None:
    import importlib.util

    if importlib.util.find_spec("peft") is None:
        raise UserError("recover --method lora needs peft: pip install 'llmslim[train]'.")
