"""Losses as pure functions of logits, hidden states, attention scores and embeddings of samples.

Those of logits are taken over a few tokens at a time (`llmslim.training.logits`), also where there are no more of them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from llmslim.calibration.objectives import IGNORED
from llmslim.training.logits import LazyLogits, Logits, Part, summed

if TYPE_CHECKING:
    from llmslim.training.forward import Scores

Divergence = Literal["forward", "reverse", "js"]


def divergence(
    student: Logits,
    teacher: Logits,
    temperature: float = 1.0,
    kind: Divergence = "forward",
    beta: float = 0.5,
) -> Tensor:
    """Mean over tokens of a divergence * temperature**2, in nats (Hinton et al. 2015, arXiv:1503.02531).

    With P the teacher's distribution, Q the student's and M = beta P + (1 - beta) Q:

    - forward: KL(P || Q), which covers all that the teacher finds likely.
    - reverse: KL(Q || P), which keeps to what the teacher finds most likely.
    - js: beta KL(P || M) + (1 - beta) KL(Q || M) (generalized Jensen-Shannon; Agarwal et al. 2023,
      arXiv:2306.13649), at most ln 2; divided by beta it goes to forward with beta to 0, and divided by 1 - beta to
      reverse with beta to 1.

    Args:
        student, teacher: logits [..., vocabulary]; gradients flow to the student's. Where one vocabulary is longer,
            it is by padding, which is left out.
        temperature: both are divided by it. Its square keeps the size of gradients.
    """
    return summed(student, [apart(teacher, temperature, kind, beta)])


def apart(teacher: Logits, temperature: float = 1.0, kind: Divergence = "forward", beta: float = 0.5) -> Part:
    """`divergence` as a part of a loss."""
    rows = teacher.rows() if isinstance(teacher, LazyLogits) else teacher.detach().flatten(0, -2)
    how = partial(_divergence, temperature=temperature, kind=kind, beta=beta)
    return Part(temperature**2 / len(rows), how, (rows,))


def _divergence(
    student: Tensor, teacher: Tensor, temperature: float, kind: Divergence, beta: float
) -> Tensor:
    common = min(student.shape[-1], teacher.shape[-1])
    student, teacher = student[..., :common].float(), teacher[..., :common].float()
    if temperature != 1:  # a division is as long as the softmax
        student, teacher = student / temperature, teacher / temperature
    q, p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return _between(p, q, kind, beta)


def _between(p: Tensor, q: Tensor, kind: Divergence, beta: float) -> Tensor:
    """Sum of the divergences between rows of log probabilities, p the teacher's."""
    if kind == "forward":
        return _kl(p, q)
    if kind == "reverse":
        return _kl(q, p)
    m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def likeliest(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """A distribution [..., vocabulary] made coarser: its k likeliest tokens, and all others as one.

    Returns:
        ids int64 [..., k], log probabilities float32 [..., k], and the log of what is left float32 [...]; None when
        nothing is.
    """
    log_probs = F.log_softmax(logits.float() / temperature, -1)
    top, ids = log_probs.topk(k, -1)
    return ids, top, _rest(log_probs, ids)


def coarse_divergence(
    student: Logits,
    ids: Tensor,
    log_probs: Tensor,
    tail: Tensor | None,
    temperature: float = 1.0,
    kind: Divergence = "forward",
    beta: float = 0.5,
) -> Tensor:
    """`divergence` from a teacher of which `likeliest` is known, with the student made coarser in the same way.

    Never more than the divergence of the whole distributions, and equal where the tokens kept are all there are.

    Args:
        student: logits [..., vocabulary], gradients flow to them.
        ids, log_probs, tail: of the teacher at this temperature; normalized anew after they were rounded.
    """
    return summed(student, [coarsely_apart(ids, log_probs, tail, temperature, kind, beta)])


def coarsely_apart(
    ids: Tensor,
    log_probs: Tensor,
    tail: Tensor | None,
    temperature: float = 1.0,
    kind: Divergence = "forward",
    beta: float = 0.5,
) -> Part:
    """`coarse_divergence` as a part of a loss."""
    known = log_probs if tail is None else torch.cat([log_probs, tail.unsqueeze(-1)], -1)
    targets = F.log_softmax(known.detach().float(), -1).flatten(0, -2)
    how = partial(_coarse, tail=tail is not None, temperature=temperature, kind=kind, beta=beta)
    return Part(temperature**2 / len(targets), how, (ids.flatten(0, -2), targets))


def _coarse(
    student: Tensor, ids: Tensor, p: Tensor, tail: bool, temperature: float, kind: Divergence, beta: float
) -> Tensor:
    log_probs = F.log_softmax(student.float() / temperature, -1)
    q = log_probs.gather(-1, ids)
    rest = _rest(log_probs, ids) if tail else None
    return _between(p, q if rest is None else torch.cat([q, rest.unsqueeze(-1)], -1), kind, beta)


def _rest(log_probs: Tensor, ids: Tensor) -> Tensor | None:
    """Log of the probability of all tokens but these; None when these are all."""
    if ids.shape[-1] == log_probs.shape[-1]:
        return None
    return log_probs.scatter(-1, ids, -math.inf).logsumexp(-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Sum of KL(p || q) over rows of log probabilities."""
    return F.kl_div(q, p, reduction="sum", log_target=True)


def next_token(logits: Logits, tokens: Tensor) -> Tensor:
    """Mean -log p of each next token, in nats; logits [batch, seq, vocabulary], tokens int64 [batch, seq]."""
    return summed(logits, [labelled(following(tokens))])


def following(tokens: Tensor) -> Tensor:
    """The next of each token, int64 [batch, seq]; the last ones' are not asked for."""
    return F.pad(tokens[:, 1:], (0, 1), value=IGNORED)


def labelled(labels: Tensor) -> Part:
    """Mean -log p of labels, int64 [...], as a part of a loss; IGNORED ones do not count."""
    return Part(1 / int((labels != IGNORED).sum()), _cross_entropy, (labels.flatten(),))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


def hidden_states(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of ||student - teacher||^2 / ||teacher||^2; [..., hidden], gradients flow to the student's.

    Relative, as the residual streams of families, and tokens of one, differ in size by orders of magnitude.
    """
    target = teacher.detach().float()
    error = (student.float() - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp_min(1e-12)).mean()


def self_relations(student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Mean over heads and tokens of KL(R_teacher || R_student), R = softmax(X X^T / sqrt(head_dim)), in nats.

    MiniLM's relations of queries, of keys or of values among themselves (Wang et al. 2020, arXiv:2012.15828).

    Args:
        student, teacher: X of all heads [batch, seq, width]; widths may differ, gradients flow to the student's.
        heads: relation heads, into which both widths are split.
        mask: bool [batch, seq], which tokens are no padding; all when None.
    """
    p, q = (_log_relations(x.float(), heads, mask) for x in (teacher.detach(), student))
    if mask is not None:  # [tokens, heads, seq]; padding has the same p and q, so it adds nothing
        p, q = (x.transpose(1, 2)[mask] for x in (p, q))
    return _kl(p, q) / p.shape[:-1].numel()


def _log_relations(x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [batch, heads, seq, head_dim]
    relations = x @ x.mT / x.shape[-1] ** 0.5
    if mask is not None:  # not -inf: what is certainly 0 has no logarithm to compare
        relations = relations.masked_fill(~mask[:, None, None], -1e4)
    return F.log_softmax(relations, -1)


def attention_scores(student: Scores, teacher: Scores, mask: Tensor | None = None) -> Tensor:
    """Mean square of the differences of attention scores, over heads and pairs of tokens of which one sees the other.

    TinyBERT's attention maps, before the softmax (Jiao et al. 2019, arXiv:1909.10351).

    Args:
        student, teacher: of as many heads; gradients flow to the student's.
        mask: bool [batch, seq], which tokens are no padding; all when None.
    """
    allowed = student.allowed & teacher.allowed
    if mask is not None:
        allowed = allowed & mask[:, None, :, None] & mask[:, None, None, :]
    error = (student.values - teacher.values.detach()).square()
    allowed = allowed.expand_as(error)
    return error.masked_fill(~allowed, 0.0).sum() / allowed.sum().clamp_min(1)


def distances(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Huber loss between the distances of samples, each divided by their mean (Park et al. 2019, arXiv:1904.05068).

    Mean over pairs within a group; 0 where no group has two samples.

    Args:
        student, teacher: [..., samples, width], each [samples, width] a group; widths may differ, gradients flow to the
            student's.
        mask: bool [..., samples], which of them there are; all when None.
    """
    count = student.shape[-2]
    first, second = torch.triu_indices(count, count, 1, device=student.device)
    there = _there(student, mask)
    pairs = there[:, first] & there[:, second]
    wanted, found = (_relative(x, first, second, pairs) for x in (teacher.detach(), student))
    return _mean(F.smooth_l1_loss(found, wanted, reduction="none"), pairs)


def angles(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Huber loss between the cosines of the angles that triplets of samples make (arXiv:1904.05068).

    Mean over triplets within a group; 0 where no group has three samples. Arguments as of `distances`.
    """
    wanted, found = (_cosines(x.float().flatten(0, -3)) for x in (teacher.detach()[None], student[None]))
    there = _there(student, mask)
    same = torch.eye(student.shape[-2], dtype=torch.bool, device=student.device)
    triplets = ~(same[:, :, None] | same[:, None, :] | same[None, :, :])
    triplets = triplets & there[:, :, None, None] & there[:, None, :, None] & there[:, None, None, :]
    return _mean(F.smooth_l1_loss(found, wanted, reduction="none"), triplets)


def _there(x: Tensor, mask: Tensor | None) -> Tensor:
    """Which samples there are: bool [groups, samples]."""
    kept = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
    return kept.reshape(-1, x.shape[-2])


def _relative(x: Tensor, first: Tensor, second: Tensor, pairs: Tensor) -> Tensor:
    """Distances of pairs over their mean in the group: [groups, pairs]."""
    rows = x.float().reshape(-1, *x.shape[-2:])
    found = (rows[:, first] - rows[:, second]).norm(dim=-1)
    mean = (found * pairs).sum(-1, keepdim=True) / pairs.sum(-1, keepdim=True).clamp_min(1)
    return found / mean.clamp_min(1e-12)


def _cosines(x: Tensor) -> Tensor:
    """[groups, j, i, k]: cosine of the angle at sample j between those to i and to k."""
    to = F.normalize(x[:, None] - x[:, :, None], dim=-1)
    return to @ to.mT


def _mean(losses: Tensor, counted: Tensor) -> Tensor:
    return losses.masked_fill(~counted, 0.0).sum() / counted.sum().clamp_min(1)
