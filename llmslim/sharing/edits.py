"""The edit of sharing: a Linear that uses the weight of one in another block, plus a correction of its own."""

from __future__ import annotations

from typing import ClassVar, cast

from pydantic import Field
from torch import Tensor, nn

from llmslim.anatomy.parts import features, is_linear
from llmslim.edit import Edit, replace_module
from llmslim.lowrank import LowRankLinear, empty_linear
from llmslim.ties import counterpart, share, shared_modules


class ShareLinear(Edit):
    """Replace the Linear (or Conv1D) at `module` by one that shares its weight, its own bias kept.

    Attributes:
        source: name of the module whose weight it uses; None where it is the one that the others use.
        rank: of the low-rank correction beside it; 0 for none.
    """

    kind: ClassVar[str] = "share_linear"
    module: str
    source: str | None = None
    rank: int = Field(0, ge=0)

    def apply(self, model: nn.Module) -> None:
        linear = model.get_submodule(self.module)
        if not is_linear(linear):
            raise ValueError(f"{self.module} is no dense Linear")
        out_features, in_features = features(linear)
        if self.rank > min(out_features, in_features):
            raise ValueError(
                f"a correction of {self.module} has at most rank {min(out_features, in_features)}"
            )
        dtype = cast(Tensor, linear.weight).dtype
        base = empty_linear(in_features, out_features, dtype, "meta")
        base.bias = cast(nn.Parameter, linear.bias)
        if self.source is not None:
            self._check_source(model, base)
            share(base, self.source)
        whole = (
            LowRankLinear(in_features, out_features, self.rank, dtype, "meta", base) if self.rank else base
        )
        replace_module(model, self.module, whole)

    def _check_source(self, model: nn.Module, base: nn.Linear) -> None:
        source = model.get_submodule(cast(str, self.source))
        if not isinstance(source, nn.Linear) or features(source) != features(base):
            raise ValueError(f"{self.source} is no Linear of the shape of {self.module}")
        if self.source == self.module or counterpart(cast(str, self.source), shared_modules(model)):
            raise ValueError(f"{self.source} has no weight of its own to share")
