"""The type that training computes products in, and where attention stays in float32."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llmslim.training.forward import SHORT, products_in


@pytest.mark.parametrize("mask", [False, True])
def test_short_attention_is_of_float32_where_gradients_come_back(mask: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 9, 8).requires_grad_() for _ in range(3))
    added = torch.randn(2, 1, 9, 9) if mask else None
    wanted = F.scaled_dot_product_attention(query, key, value, added)
    slope = torch.randn(2, 3, 9, 8).bfloat16()
    gradients = torch.autograd.grad(wanted, (query, key, value), slope.float())
    with products_in(torch.bfloat16, "cpu"):
        held = None if added is None else added.bfloat16()
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=held)
        assert (query @ key.mT).dtype == torch.bfloat16
    assert found.dtype == torch.bfloat16
    if not mask:  # a mask is rounded before it comes here
        torch.testing.assert_close(found, wanted.bfloat16(), rtol=0, atol=0)
        for one, other in zip(torch.autograd.grad(found, (query, key, value), slope), gradients, strict=True):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)


def test_short_attention_takes_its_arguments_as_the_function_does() -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 9, 8).bfloat16().requires_grad_()
    key, value = (torch.randn(2, 2, 9, 8).bfloat16().requires_grad_() for _ in range(2))
    seen = torch.ones(9, 9, dtype=torch.bool).tril(2)
    hidden = torch.zeros(9, 9).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    wanted = F.scaled_dot_product_attention(*(t.float() for t in (query, key, value)), seen, enable_gqa=True)
    with products_in(torch.bfloat16, "cpu"):
        for found in (
            F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True),
            F.scaled_dot_product_attention(query, key, value, hidden.bfloat16(), enable_gqa=True),
            F.scaled_dot_product_attention(
                query=query, key=key, value=value, attn_mask=seen, enable_gqa=True
            ),
        ):
            torch.testing.assert_close(found, wanted.bfloat16(), rtol=0, atol=0)
        causal = F.scaled_dot_product_attention(query, query, query, None, 0.0, True)
    wide = query.float()
    wanted = F.scaled_dot_product_attention(wide, wide, wide, is_causal=True)
    torch.testing.assert_close(causal, wanted.bfloat16(), rtol=0, atol=0)


def test_long_attention_and_that_of_teachers_is_of_the_type() -> None:
    torch.manual_seed(0)
    for length, learns in ((SHORT, True), (9, False)):
        query, key, value = (torch.randn(1, 1, length, 8).bfloat16() for _ in range(3))
        wanted = F.scaled_dot_product_attention(query, key, value)
        with products_in(torch.bfloat16, "cpu"), torch.set_grad_enabled(learns):
            found = F.scaled_dot_product_attention(query, key, value)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_float32_is_left_alone() -> None:
    values = torch.randn(3, 3)
    with products_in(torch.float32, "cpu"):
        assert (values @ values).dtype == torch.float32
