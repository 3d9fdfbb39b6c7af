"""Logits that are never whole: losses and gradients are those of whole logits, of every family, and memory is flat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from llmslim.distillation.response import Response
from llmslim.edit import put
from llmslim.prepare import prepare
from llmslim.quantization.grid import Scheme, round_to_nearest
from llmslim.quantization.packed import PackedEmbedding
from llmslim.recipe import Calibration, Recipe
from llmslim.recovery.full import Full
from llmslim.training import logits, losses
from llmslim.training.cached import TeacherCache
from llmslim.training.forward import products_in, run
from llmslim.training.head import Parted
from llmslim.training.logits import LazyLogits, in_parts
from llmslim.training.objective import Masking
from tests.tiny import _GROUPED, FAMILIES, randomize, save_tiny, tiny_model

ALL = [family for family in FAMILIES if family != "t5"]
SCALED = {
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
}
"""Families that scale their logits; gemma2 caps them."""


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logits of 24 tokens at a time, distributions of 10."""
    monkeypatch.setattr(logits, "AT_ONCE", 24 * 512)
    monkeypatch.setattr(logits, "CHUNK", 10)
    yield


def model_of(family: str, seed: int = 0) -> Any:
    if family not in SCALED:
        return tiny_model(family, seed)
    config = AutoConfig.for_model(family, **_GROUPED, **SCALED[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model, seed)
    return model


def windows(batch: int = 3, seq: int = 17) -> Tensor:
    return torch.randint(5, 512, (batch, seq), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, [*named.values()], allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def require_same(model: nn.Module, found: Tensor, wanted: Tensor, near: float = 1e-6) -> None:
    """Equal losses and equal gradients of every parameter, up to a share of the largest."""
    torch.testing.assert_close(found, wanted)
    mine, its = gradients(model, found), gradients(model, wanted)
    assert mine.keys() == its.keys() and mine
    largest = max(
        float(gradient.abs().max()) for gradient in its.values()
    )  # biases of keys have none but noise
    for name in mine:
        torch.testing.assert_close(
            mine[name],
            its[name],
            rtol=1e-4,
            atol=near * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def naive(step: Any, model: nn.Module, taught: nn.Module, tokens: Tensor) -> Tensor:
    """The loss of `Response`, of whole logits, with autograd's own gradient."""
    student, teacher = run(model, tokens).logits, run(taught, tokens).logits
    p, q = ((x / step.temperature).log_softmax(-1) for x in (teacher.detach(), student))
    m = (step.beta * p.exp() + (1 - step.beta) * q.exp()).log()
    sides = {
        "forward": p.exp() * (p - q),
        "reverse": q.exp() * (q - p),
        "js": step.beta * p.exp() * (p - m) + (1 - step.beta) * q.exp() * (q - m),
    }
    apart = sides[step.divergence].sum(-1).mean() * step.temperature**2
    labels = nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return step.response * (step.alpha * apart + (1 - step.alpha) * labels)


@pytest.mark.parametrize("family", [*ALL, *SCALED])
def test_loss_and_gradients_are_those_of_whole_logits(family: str) -> None:
    model, teacher, tokens = model_of(family), model_of(family, 1), windows()
    step = Response(divergence="js", beta=0.3, temperature=2.0, alpha=0.6, response=0.7)
    loss, _ = step.criterion(model, teacher, tokens)
    parted = Parted(model, tokens)
    assert parted.body is not model
    assert isinstance(parted.logits(run(parted.body, tokens)), LazyLogits)
    require_same(
        model,
        loss(model, tokens),
        naive(step, model, teacher, tokens),
    )


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_each_divergence_also_with_labels(kind: Any) -> None:
    model, teacher, tokens = model_of("gemma2"), model_of("qwen2", 1), windows()
    for alpha in (1.0, 0.4):
        step = Response(divergence=kind, temperature=1.5, alpha=alpha)
        loss, _ = step.criterion(model, teacher, tokens)
        require_same(model, loss(model, tokens), naive(step, model, teacher, tokens))


@pytest.mark.parametrize("family", ["qwen2", "phi3", "granite"])
def test_next_tokens(family: str) -> None:
    model, tokens = model_of(family), windows()
    loss, _ = Full(objective="next_token").criterion(model, None, tokens)
    wanted = run(model, tokens).logits[:, :-1].flatten(0, 1)
    require_same(model, loss(model, tokens), nn.functional.cross_entropy(wanted, tokens[:, 1:].flatten()))
    with torch.no_grad():
        torch.testing.assert_close(loss(model, tokens), loss(model, tokens))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_masked_tokens(family: str) -> None:
    """As the model's own loss has them, window by window."""
    model, tokens, asking = model_of(family), windows(), Masking(4, 512)
    loss, _ = Full(objective="masked_token").criterion(model, asking, tokens)
    torch.manual_seed(3)
    found = loss(model, tokens)
    torch.manual_seed(3)
    hidden, labels = asking.of(tokens)
    assert int((labels != -100).sum()) == 3 * 3 and bool((hidden[labels != -100] == 4).all())
    assert torch.equal(torch.where(labels == -100, hidden, labels), tokens)
    each = [model(x[None], labels=y[None]).loss for x, y in zip(hidden, labels, strict=True)]
    require_same(model, found, torch.stack(each).mean())


def with_lora_head(model: Any) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=4, target_modules=["lm_head", "q_proj"]), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def with_packed_head(model: Any) -> Any:
    scheme = Scheme(bits=4, group_size=32, symmetric=False)
    table = PackedEmbedding.from_quantized(
        round_to_nearest(model.model.embed_tokens.weight.detach(), scheme), torch.float32
    )
    put(model, "model.embed_tokens", table)
    put(model, "lm_head", table.tie_head())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and "embed" not in name and "head" not in name)
    return model


def with_bias(model: Any) -> Any:
    model.lm_head.bias = nn.Parameter(torch.randn(512))
    return model


def with_head_alone(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    return model


@pytest.mark.parametrize("change", [with_lora_head, with_packed_head, with_bias, with_head_alone])
def test_heads_of_all_kinds(change: Any) -> None:
    model, teacher, tokens = change(tiny_model("llama")), tiny_model("llama", 1), windows()
    step = Response(alpha=0.5)
    loss, _ = step.criterion(model, teacher, tokens)
    require_same(
        model,
        loss(model, tokens),
        naive(step, model, teacher, tokens),
        near=3e-5,  # packed products of few rows go another way than those of many
    )


def test_products_in_half_the_digits_reach_a_trained_head() -> None:
    model, tokens = model_of("qwen2"), windows()
    loss, _ = Full(objective="next_token").criterion(model, None, tokens)
    wanted = gradients(model, loss(model, tokens))
    with products_in(torch.bfloat16, "cpu"):
        found = gradients(model, loss(model, tokens))
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert nn.functional.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0) > 0.98, name


def test_a_model_whose_tokens_mix_behind_the_body_is_run_whole() -> None:
    model, teacher, tokens = model_of("llama"), model_of("llama", 1), windows()

    class Mixing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.cumsum(-2))

    head = Mixing(64, 512, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    parted = Parted(model, tokens)
    assert parted.body is model and isinstance(parted.logits(run(model, tokens)), Tensor)
    step = Response()
    loss, _ = step.criterion(model, teacher, tokens)
    require_same(
        model,
        loss(model, tokens),
        naive(step, model, teacher, tokens),
    )


def test_logits_in_parts_are_the_logits() -> None:
    model, tokens = model_of("gemma2"), windows()
    parted = Parted(model, tokens)
    with torch.no_grad():
        wanted = run(model, tokens).logits.flatten(0, 1)
        parts = list(in_parts(parted.logits(run(parted.body, tokens)).rows()))
    assert [len(part) for part in parts] == [24, 24, 3]
    torch.testing.assert_close(torch.cat(parts), wanted)
    whole = [losses.likeliest(wanted, 5)[0], torch.cat([losses.likeliest(part, 5)[0] for part in parts])]
    assert torch.equal(*whole)


class Largest(TorchDispatchMode):
    """The most values that a tensor made inside has."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for one in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(one, Tensor):
                self.values = max(self.values, one.numel())
        return output


@pytest.mark.parametrize("what", ["distill", "labels", "next_token", "cached", "masked", "write"])
def test_no_tensor_grows_with_tokens_and_vocabulary(what: str, tmp_path: Any) -> None:
    """Vocabulary 4096 on 256 tokens: logits of 16 at a time, whatever is learned; the head itself is the largest."""
    few = {"vocab_size": 4096, "num_hidden_layers": 1, "tie_word_embeddings": True}
    family = "bert" if what == "masked" else "llama"
    model, teacher, tokens = tiny_model(family, **few), tiny_model(family, 1, **few), windows(8, 32)
    logits.AT_ONCE = 16 * 4096  # restored by the fixture
    cache = TeacherCache(tmp_path, tokens)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    steps: dict[str, tuple[Any, Any]] = {
        "distill": (Response(), teacher),
        "labels": (Response(alpha=0.5, divergence="js"), teacher),
        "next_token": (Full(objective="next_token"), None),
        "masked": (Full(objective="masked_token"), Masking(4, 4096)),
        "cached": (Response(), cache),
    }
    if what in ("cached", "write"):
        with Largest() as seen:
            cache.write(teacher, 8, 1.0, lambda done, total: None)
        assert seen.values <= 64 * 4096  # the head
    if what == "write":
        return
    step, other = steps[what]
    loss, _ = step.criterion(model, other, tokens)
    with Largest() as seen:
        loss(model, tokens).backward()
    assert seen.values <= 64 * 4096  # the head
    assert all(
        p.grad is not None
        for name, p in model.named_parameters()
        if p.requires_grad and "norm" in name.lower()
    )


def test_the_plan_counts_no_whole_logits(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What more windows at once take does not hang on the vocabulary."""
    monkeypatch.setattr("llmslim.plan.resident_bytes", lambda: 0)
    text = {"calibration": Calibration(num_samples=8, seq_len=64), "evaluation": None}

    def peak(folder: Any, batch: int) -> int:
        step = Full(objective="next_token", batch_size=batch)
        return prepare(str(folder), Recipe(steps=(step,), **text)).plan.peak_memory

    small, large = (save_tiny("llama", tmp_path / str(n), vocab_size=n) for n in (512, 8192))
    assert peak(large, 8) - peak(large, 4) == peak(small, 8) - peak(small, 4) > 0
