"""Distil what the teacher has inside: hidden states, attention maps, and relations of the last attention."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from llmslim.distillation._loss import Distill


class Features(Distill):
    """Train a student to have what the teacher has inside, beside its distribution over tokens.

    - hidden: what each block of the student gives against what its block of the teacher gives (TinyBERT, Jiao et al.
      2019, arXiv:1909.10351), as a share of the latter's square, token by token. Where widths differ, each such
      block has a projection to the teacher's width: fitted by least squares, trained with the student, thrown away.
    - attention_maps: the scores that attention softmaxes, of the same blocks, head by head (TinyBERT): there must be
      as many. They take the memory of heads x tokens x tokens in each block.
    - attention: queries, keys and values of the last block, each in its relations among the tokens, so that heads and
      widths may differ (MiniLMv2, Wang et al. 2020, arXiv:2012.15828); their mean. They are taken as the projections
      give them: before rotary positions and norms of heads, without a causal mask.
    - distance, angle: how the samples of a batch (windows, sentences) lie to each other, by the means over their
      tokens of the last hidden states, behind the final norm (RKD, Park et al. 2019, arXiv:1904.05068).
    - token_distance, token_angle: the same of the tokens of a sample, in runs of 32: the word relations of CKD (Park et
      al. 2021, arXiv:2109.08359) in the last hidden states alone, all pairs and triplets weighing the same.

    Which block learns from which: `learned` takes those with the outputs most alike in the sum, in order, by linear CKA
    on the first windows (Kornblith et al. 2019, arXiv:1905.00414), before training. TinyBERT's loss of embeddings and
    CKD's relations between layers are left out.

    It is the loss of `response` with other weights; with the teacher in memory, whose logits cannot be cached here.
    """

    kind: ClassVar[str] = "features"
    verb: ClassVar[str] = "distill"

    hidden: float = Field(1.0, ge=0, description="weight of the hidden states")
    attention: float = Field(1.0, ge=0, description="weight of the last attention's relations")
