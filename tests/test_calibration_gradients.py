"""Gradients that are used up as they come, against plain autograd over everything at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from llmslim.anatomy import Anatomy, Experts
from llmslim.calibration.gradients import (
    accumulate,
    channel_taylor,
    grasp,
    group_taylor,
    hessian_gradient,
    mean_gradient,
    norm,
    snip,
    taylor,
)
from tests.tiny import ENCODERS, FAMILIES, tiny_config, tiny_model

MASK = 4  # id of the tiny tokenizer's mask token


def windows(count: int = 3, length: int = 16) -> Tensor:
    return torch.randint(5, 512, (count, length), generator=torch.Generator().manual_seed(3))


def linear_weights(model: PreTrainedModel) -> list[str]:
    return [f"{name}.weight" for block in Anatomy.of(model).blocks for name in block.linears()]


def mean_loss(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The next token's negative log-likelihood, by hand, over the whole batch."""
    log_p = model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    return -log_p.gather(2, tokens[:, 1:, None]).mean()


def check_untouched(model: PreTrainedModel, before: dict[str, Tensor], required: dict[str, bool]) -> None:
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_and_is_left_as_it_was(family: str, headless: bool) -> None:
    model = tiny_model(family)
    if headless and family != "t5":
        model = model.base_model
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    model.train()
    model.get_submodule(Anatomy.of(model).blocks[0].name).eval()
    training = [module.training for module in model.modules()]
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = list(required)
    scores = accumulate(model, windows(), dict.fromkeys(names, taylor), seed=7, mask_token=MASK)
    again = accumulate(model, windows(), dict.fromkeys(names, taylor), seed=7, mask_token=MASK)
    assert list(scores) == names
    for name, score in scores.items():
        assert score.shape == before[name].shape and score.isfinite().all() and bool(score.any()), name
        assert torch.equal(score, again[name])
    check_untouched(model, before, required)
    assert [module.training for module in model.modules()] == training


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_mean_gradient_is_that_of_the_whole_batch(family: str) -> None:
    model, tokens = tiny_model(family), windows()
    names = [name for name, _ in model.named_parameters()]
    expected = torch.autograd.grad(mean_loss(model, tokens), [model.get_parameter(name) for name in names])
    with torch.no_grad():  # the caller's mode does not matter
        got = mean_gradient(model, tokens, names)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(
            snip(model.get_parameter(name), got[name]),
            (model.get_parameter(name) * gradient).abs(),
            rtol=1e-3,
            atol=1e-6,
        )


def test_taylor_takes_the_absolute_value_per_window() -> None:
    model, tokens = tiny_model("llama"), windows()
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    each = [
        (weight * torch.autograd.grad(mean_loss(model, window[None]), weight)[0]).detach()
        for window in tokens
    ]
    got = accumulate(model, tokens, {name: taylor})[name]
    torch.testing.assert_close(got, torch.stack(each).abs().sum(0), rtol=1e-3, atol=1e-7)
    assert float(got.sum()) > 1.2 * float(torch.stack(each).sum(0).abs().sum())  # windows do cancel otherwise


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_of_a_head_is_the_gradient_of_a_gate_on_each_head(family: str) -> None:
    """Michel et al.: dL / d gate, with the gates put where the heads' outputs enter o."""
    model, tokens = tiny_model(family), windows()
    attention = Anatomy.of(model).blocks[-1].attention
    name = f"{attention.o.name}.weight"
    got = accumulate(model, tokens, {name: group_taylor(attention.o, attention.head_dim)}, mask_token=MASK)[
        name
    ]
    assert got.shape == (attention.num_heads,)

    gates = torch.ones(attention.num_heads, requires_grad=True)
    expected = []

    def gate(module, args):  # in front of o; `rows` of o are its inputs, head by head
        return (args[0].index_select(-1, attention.o.rows) * gates.repeat_interleave(attention.head_dim),)

    def note(gradient: Tensor) -> None:
        expected.append(gradient.abs())

    gates.register_hook(note)
    attention.o.module.register_forward_pre_hook(gate)
    accumulate(model, tokens, {name: taylor}, mask_token=MASK)
    torch.testing.assert_close(got, torch.stack(expected).sum(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_channel_taylor_sums_each_channel_of_down(family: str) -> None:
    model, tokens = tiny_model(family), windows(1)
    mlp = Anatomy.of(model).blocks[0].mlp
    assert mlp is not None
    fused = isinstance(mlp, Experts)
    name = str(mlp.down) if fused else f"{mlp.down.name}.weight"
    products = accumulate(model, tokens, {name: lambda weight, gradient: weight * gradient}, mask_token=MASK)[
        name
    ]
    got = accumulate(model, tokens, {name: channel_taylor(mlp)}, mask_token=MASK)[name]
    assert got.shape == ((mlp.num_experts, mlp.width) if fused else (mlp.width,))
    outputs = -2 if fused or family != "gpt2" else -1  # Conv1D is [in, out]
    torch.testing.assert_close(got, products.sum(outputs).abs())


def test_removing_the_lowest_channels_costs_less_than_removing_the_highest() -> None:
    model, tokens = tiny_model("llama"), windows(6, 32)
    mlp = Anatomy.of(model).blocks[1].mlp
    weight = mlp.down.module.weight
    order = accumulate(model, tokens, {f"{mlp.down.name}.weight": channel_taylor(mlp)})[
        f"{mlp.down.name}.weight"
    ].argsort()

    @torch.no_grad()
    def change(channels: Tensor) -> float:
        kept, base = weight.clone(), float(mean_loss(model, tokens))
        weight[:, channels] = 0
        changed = abs(float(mean_loss(model, tokens)) - base)
        weight.copy_(kept)
        return changed

    assert change(order[:1]) < change(order[-1:])
    lowest = sum(change(order[i : i + 1]) for i in range(16))
    highest = sum(change(order[-1 - i :][:1]) for i in range(16))
    assert 3 * lowest < highest


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hessian_gradient_is_that_of_a_double_backward(family: str) -> None:
    model, tokens = tiny_model(family, attn_implementation="eager"), windows()
    names = linear_weights(model)
    weights = [model.get_parameter(name) for name in names]
    gradients = torch.autograd.grad(mean_loss(model, tokens), weights, create_graph=True)
    half_square = sum((gradient**2).sum() for gradient in gradients) / 2
    expected = dict(zip(names, torch.autograd.grad(half_square, weights), strict=True))  # H g
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    storage = [weight.data_ptr() for weight in weights]
    seen: list[tuple[int, int]] = []
    got = hessian_gradient(model, tokens, names, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 9) for done in range(1, 10)]
    for name in names:
        assert norm([got[name] - expected[name]]) < 1e-2 * norm([expected[name]]), name
    check_untouched(model, before, required)
    assert storage == [weight.data_ptr() for weight in weights]


def test_grasp_tells_how_the_gradient_shrinks() -> None:
    """||g||^2 after weights lose a small share of themselves = before + 2 * share * the sum of their scores."""
    model, tokens = tiny_model("llama", attn_implementation="eager"), windows()
    names = linear_weights(model)
    product = hessian_gradient(model, tokens, names)
    scores = {name: grasp(model.get_parameter(name).detach(), product[name]) for name in names}
    threshold = torch.cat([score.flatten() for score in scores.values()]).quantile(0.999)
    before, share = norm(mean_gradient(model, tokens, names).values()) ** 2, 1e-3
    predicted = 0.0
    with torch.no_grad():
        for name, score in scores.items():
            removed = score > threshold  # what GraSP removes: the gradient grows
            predicted += 2 * share * float(score[removed].sum())
            model.get_parameter(name)[removed] *= 1 - share
    grown = norm(mean_gradient(model, tokens, names).values()) ** 2 - before
    assert grown > 0 and math.isclose(grown, predicted, rel_tol=0.05)


def test_tied_weights_have_the_gradient_of_all_their_uses() -> None:
    model, tokens = tiny_model("qwen2"), windows()
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    expected = torch.autograd.grad(mean_loss(model, tokens), model.get_parameter(embedding))[0]
    got = mean_gradient(model, tokens, [head, embedding])
    assert list(got) == [head, embedding] and torch.equal(got[head], got[embedding])
    torch.testing.assert_close(got[head], expected, rtol=1e-3, atol=1e-6)
    before = model.get_parameter(head)
    moved = hessian_gradient(model, tokens, [head, embedding])
    assert torch.equal(moved[head], moved[embedding]) and model.get_parameter(embedding) is before


def test_what_has_no_influence_scores_zero() -> None:
    model, tokens = tiny_model("llama"), windows()
    mlp = Anatomy.of(model).blocks[0].mlp
    with torch.no_grad():
        mlp.down.module.weight[:, 5] = 0  # closes channel 5 behind gate and up
    name = f"{mlp.down.name}.weight"
    up = mlp.up.module
    names = [f"{mlp.up.name}.weight", f"{mlp.gate.name}.weight"]
    scores = accumulate(model, tokens, {**dict.fromkeys(names, taylor), name: channel_taylor(mlp)})
    for each in names:
        assert not scores[each][5].any() and bool(scores[each][:5].any())
    assert scores[name][5] == 0 and bool(scores[name][6] > 0)
    assert up.weight[5].any()


def test_a_parameter_that_no_window_reaches_scores_zero() -> None:
    model = tiny_model("bert").base_model.__class__(tiny_config("bert"), add_pooling_layer=True).eval()
    scores = accumulate(model, windows(), {"pooler.dense.weight": taylor})
    assert scores["pooler.dense.weight"].shape == (64, 64) and not scores["pooler.dense.weight"].any()


def test_a_headless_models_squared_gradients_are_gauss_newtons_diagonal() -> None:
    """E over r of (d<r, h> / dw)^2 = sum over outputs of (dh / dw)^2."""
    model, tokens = tiny_model("bert").base_model, windows(1, 4)
    name = "encoder.layer.2.output.dense.bias"
    weight = model.get_parameter(name)
    outputs = model(input_ids=tokens)[0].flatten()
    expected = sum(torch.autograd.grad(output, weight, retain_graph=True)[0] ** 2 for output in outputs)
    got = accumulate(model, tokens.expand(600, -1), {name: lambda _, gradient: gradient**2})[name] / 600
    torch.testing.assert_close(got, expected, rtol=0.35, atol=0)
    assert math.isclose(float(got.sum()), float(expected.sum()), rel_tol=0.05)


@pytest.mark.parametrize("family", ENCODERS)
def test_masked_models_are_asked_for_15_percent_by_seed(family: str) -> None:
    model, tokens, seen = tiny_model(family), windows(2, 40), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    name = linear_weights(model)[0]
    for seed in (0, 0, 1):
        accumulate(model, tokens, {name: taylor}, seed=seed, mask_token=MASK)
    assert [int((x == MASK).sum()) for x in seen] == [6] * 6
    masked = [x == MASK for x in seen]
    assert torch.equal(masked[0], masked[2]) and not torch.equal(masked[0], masked[4])
    assert not torch.equal(masked[0], masked[1])
    for x, window in zip(seen, [*tokens, *tokens, *tokens], strict=True):
        assert torch.equal(x[x != MASK], window[x != MASK])
    seen.clear()
    accumulate(model, tokens, {name: taylor})  # no mask token known: random tokens
    assert (
        4 <= int((seen[0] != tokens[0]).sum()) <= 6 and len(set(seen[0][seen[0] != tokens[0]].tolist())) > 1
    )


def test_a_classifier_is_taken_by_its_output() -> None:
    config = tiny_config("roberta", num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    name = "classifier.out_proj.weight"
    assert accumulate(model, windows(), {name: taylor})[name].shape == (3, 64)


def test_gradients_are_freed_at_once() -> None:
    """While one gradient is used no other is there."""
    model = tiny_model("llama")
    names = [name for name, _ in model.named_parameters()]
    held: list[int] = []

    def look(weight: Tensor, gradient: Tensor) -> Tensor:
        held.append(sum(parameter.grad is not None for parameter in model.parameters()))
        return gradient.sum()

    accumulate(model, windows(2), dict.fromkeys(names, look))
    assert len(held) == 2 * len(names) and max(held) == 0


def test_a_failed_backward_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(weight: Tensor, gradient: Tensor) -> Tensor:
        raise KeyError("reduce")

    with pytest.raises(KeyError, match="reduce"):
        accumulate(model, windows(), {"model.layers.1.mlp.up_proj.weight": fail})
    check_untouched(model, before, required)


def test_only_float32_is_differentiated() -> None:
    model = tiny_model("llama").bfloat16()
    with pytest.raises(ValueError, match="float32"):
        accumulate(model, windows(), {"model.layers.1.mlp.up_proj.weight": taylor})
