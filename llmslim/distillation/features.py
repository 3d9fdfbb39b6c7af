"""Distil what the teacher has inside: hidden states, and relations of the last attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.distillation._beside import BesideResponse
from llmslim.training.inside import InsideFields

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

    from llmslim.training.loop import Loss

SAMPLE = 4096  # tokens that projections are fitted to before training


class Features(InsideFields, BesideResponse):
    """Train a student to have the teacher's hidden states, and the relations of its last attention.

    - hidden: what each block of the student gives against what its block of the teacher gives (TinyBERT, Jiao et al.
      2019, arXiv:1909.10351), as a share of the latter's square, token by token. Where widths differ, each such
      block has a projection to the teacher's width: fitted by least squares, trained with the student, thrown away.
    - attention: queries, keys and values of the last block, each in its relations among the tokens, so that heads and
      widths may differ (MiniLMv2, Wang et al. 2020, arXiv:2012.15828); their mean. They are taken as the projections
      give them: before rotary positions and norms of heads, without a causal mask.

    Which block learns from which: `learned` takes those with the outputs most alike in the sum, in order, by linear CKA
    on the first windows (Kornblith et al. 2019, arXiv:1905.00414), before training.

    TinyBERT's attention maps (which fast attention does not give) and embeddings are left out.
    """

    kind: ClassVar[str] = "features"
    verb: ClassVar[str] = "distill"

    @model_validator(mode="after")
    def _something_inside(self) -> Self:
        if not self.hidden and not self.attention:
            raise ValueError(
                "hidden and attention are both 0, which leaves nothing inside; use method response"
            )
        return self

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if self.attention:
            self.heads([anatomy.blocks[-1].attention])

    def criterion(
        self, model: PreTrainedModel, teacher: PreTrainedModel | None, tokens: Tensor
    ) -> tuple[Loss, list[nn.Parameter]]:
        assert teacher is not None
        some = tokens[: max(1, SAMPLE // tokens.shape[1])].to(model.device)
        inside = self.comparison(model, teacher, some)
        loss = self.beside(teacher, inside.modules, lambda found, wanted: inside.value(found, wanted, None))
        return loss, list(inside.projections.parameters())
