"""Losses as pure functions of logits; chunked over tokens, so that no second copy of all logits is made."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # tokens whose distributions are held at a time


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over tokens of KL(teacher || student) * temperature**2, in nats (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        student, teacher: logits [..., vocabulary]; gradients flow to the student's.
        temperature: both are divided by it. Its square keeps the size of gradients.
    """
    rows = student.reshape(-1, student.shape[-1])
    targets = teacher.detach().reshape(-1, teacher.shape[-1])
    total = rows.new_zeros((), dtype=torch.float32)
    for some, target in zip(rows.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(_divergence, some, target, temperature, use_reentrant=False)
    return total * (temperature**2 / len(rows))


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    target = F.log_softmax(teacher.float() / temperature, -1)
    return F.kl_div(
        F.log_softmax(student.float() / temperature, -1), target, reduction="sum", log_target=True
    )


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean -log p of each next token, in nats; logits [batch, seq, vocabulary], tokens int64 [batch, seq]."""
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    targets = tokens[:, 1:].reshape(-1)
    total = rows.new_zeros((), dtype=torch.float32)
    for some, target in zip(rows.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(_cross_entropy, some, target, use_reentrant=False)
    return total / len(rows)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")
