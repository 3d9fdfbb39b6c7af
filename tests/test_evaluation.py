"""Perplexity, divergence and the benchmark, against independent references."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from llmslim.errors import UserError
from llmslim.evaluation import scores as scores_module
from llmslim.evaluation.benchmark import benchmark, disk_bytes
from llmslim.evaluation.divergence import compare
from llmslim.evaluation.perplexity import perplexity
from llmslim.evaluation.scores import Estimate, TokenScores, token_kl
from llmslim.loaders.texts import TextSample

VOCAB = 97


def tiny_llama(seed: int, vocab: int = VOCAB) -> LlamaForCausalLM:
    """Random weights, large enough that its predictions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


def random_text(windows: int = 5, seq_len: int = 24) -> TextSample:
    generator = torch.Generator().manual_seed(0)
    return TextSample(torch.randint(VOCAB, (windows, seq_len), generator=generator))


def exact_log_p(model: PreTrainedModel, text: TextSample) -> torch.Tensor:
    """log p [windows, seq_len - 1, vocab] in float64 from one plain batched forward."""
    with torch.no_grad():
        return model(text.tokens).logits[:, :-1].double().log_softmax(-1)


def test_perplexity_equals_the_models_own_loss():
    model, text = tiny_llama(0), random_text()
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in text.tokens]
    result = perplexity(model, text)
    assert result.nll == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert result.value == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)


def test_standard_error_is_over_windows_and_by_the_delta_method():
    model, text = tiny_llama(0), random_text()
    nll = -exact_log_p(model, text).gather(-1, text.tokens[:, 1:, None]).squeeze(-1).mean(1)
    spread = math.sqrt(float(((nll - nll.mean()) ** 2).sum()) / (4 * 5))
    result = perplexity(model, text)
    assert result.nll_stderr == pytest.approx(spread, rel=1e-4)
    assert result.stderr == pytest.approx(result.value * spread, rel=1e-4)
    assert perplexity(model, random_text(windows=1)).stderr is None


def test_standard_error_predicts_the_spread_of_the_figure():
    """Over many drawings of 20 windows, the mean moves as much as one drawing's standard error says."""
    generator = torch.Generator().manual_seed(0)
    drawings = [Estimate.of((3 + torch.randn(20, generator=generator)).tolist()) for _ in range(400)]
    spread = torch.tensor([d.value for d in drawings]).std()
    assert float(spread) == pytest.approx(sum(d.stderr for d in drawings) / 400, rel=0.1)


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    model = tiny_llama(0)
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, random_text())
    assert result.value == pytest.approx(VOCAB, rel=1e-6)
    assert result.nll_stderr == pytest.approx(0, abs=1e-6)


def test_perplexity_reports_its_protocol(tmp_path):
    text = random_text()
    seen = []
    result = perplexity(tiny_llama(0), text, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]
    record = json.loads(json.dumps(result.to_dict()))
    expected = {"windows": 5, "seq_len": 24, "stride": 24, "tokens": 115, "bos": None, "join": ""}
    assert {key: record[key] for key in expected} == expected
    assert record["data_hash"] == text.data_hash and record["protocol"] == text.protocol


def test_divergence_against_float64():
    torch.manual_seed(0)
    base, other = 3 * torch.randn(50, 1000), 3 * torch.randn(50, 1000)
    near = base + 0.01 * torch.randn(50, 1000)
    for logits in (other, near):
        kl, same = token_kl(base, logits)
        log_p, log_q = base.double().log_softmax(-1), logits.double().log_softmax(-1)
        exact = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(kl.double(), exact, rtol=1e-4, atol=1e-6)
        assert torch.equal(same, base.argmax(-1) == logits.argmax(-1))
    assert token_kl(base, base)[0].abs().max() == 0 and token_kl(base, base)[1].all()


def test_divergence_in_closed_form():
    """KL is not symmetric: of (p, 1-p) from the uniform pair it is log 2 - H(p), the other way round not."""
    p = 0.9
    base, uniform = torch.tensor([[math.log(p), math.log(1 - p)]]), torch.zeros(1, 2)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert float(token_kl(base, uniform)[0]) == pytest.approx(math.log(2) - entropy, rel=1e-5)
    reverse = -math.log(2) - 0.5 * (math.log(p) + math.log(1 - p))
    assert float(token_kl(uniform, base)[0]) == pytest.approx(reverse, rel=1e-5)


def test_compare_against_float64():
    model, base, text = tiny_llama(1), tiny_llama(0), random_text()
    log_p, log_q = exact_log_p(base, text), exact_log_p(model, text)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double()
    increase = (log_p - log_q).gather(-1, text.tokens[:, 1:, None]).squeeze(-1)
    result = compare(model, base, text)
    references = {"kl": kl, "top1_agreement": same, "nll_increase": increase}
    for name, per_token in references.items():
        means, estimate = per_token.mean(1), getattr(result, name)
        assert estimate.value == pytest.approx(float(means.mean()), rel=1e-4)
        assert estimate.stderr == pytest.approx(float(means.std()) / math.sqrt(5), rel=1e-3)
    assert result.perplexity == perplexity(model, text)
    assert result.base_perplexity == perplexity(base, text)
    json.dumps(result.to_dict())


def test_compare_with_itself_is_nothing():
    model, text = tiny_llama(0), random_text()
    result = compare(model, model, text)
    assert result.kl == Estimate(0, 0) and result.top1_agreement == Estimate(1, 0)


@dataclass(frozen=True)
class HeadLogits:
    """Logits that are computed when asked for: hidden [seq_len, hidden_size] through the head."""

    hidden: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]

    def __getitem__(self, positions: slice, /) -> torch.Tensor:
        return self.head(self.hidden[positions])


def test_scores_of_hidden_states_in_slices(monkeypatch):
    """A streamed run's scores equal the whole model's, and it never makes a window's logits in one piece."""
    model, base, text = tiny_llama(1), tiny_llama(0), random_text()
    monkeypatch.setattr(scores_module, "CHUNK_ELEMENTS", 5 * VOCAB)
    rows_made = []

    def lazily(model: LlamaForCausalLM, window: torch.Tensor) -> HeadLogits:
        def head(hidden: torch.Tensor) -> torch.Tensor:
            rows_made.append(len(hidden))
            return model.lm_head(hidden)

        return HeadLogits(model.model(window[None]).last_hidden_state[0], head)

    streamed = TokenScores()
    with torch.no_grad():
        for window in text.tokens:
            streamed.add(window, lazily(model, window), lazily(base, window))
    whole = compare(model, base, text)
    assert streamed.result().nll.value == pytest.approx(whole.perplexity.nll, rel=1e-5)
    assert streamed.result().kl.value == pytest.approx(whole.kl.value, rel=1e-5)
    assert max(rows_made) == 5


def test_bf16_logits_are_scored_in_fp32():
    torch.manual_seed(0)
    logits, tokens = (10 * torch.randn(24, VOCAB)).bfloat16(), random_text().tokens[0]
    scores = TokenScores()
    scores.add(tokens, logits)
    exact = -logits[:-1].double().log_softmax(-1).gather(-1, tokens[1:, None]).mean()
    assert scores.result().nll.value == pytest.approx(float(exact), rel=1e-6)


def test_models_without_perplexity_are_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertForMaskedLM(BertConfig(vocab_size=VOCAB, **sizes))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    )
    headless = LlamaModel(LlamaConfig(vocab_size=VOCAB, **sizes))
    for model, reason in ((bert, "an encoder,"), (t5, "encoder-decoder"), (headless, "without a language")):
        with pytest.raises(UserError, match=reason):
            perplexity(model, random_text())
        with pytest.raises(UserError, match=reason):
            compare(tiny_llama(0), model, random_text())


def test_other_vocabulary_is_refused():
    with pytest.raises(UserError, match="vocabulary of 128 tokens and the model of 97"):
        compare(tiny_llama(0), tiny_llama(0, vocab=128), random_text())


def test_benchmark_counts_its_steps(byte_tokenizer):
    model, lengths = tiny_llama(0, vocab=300), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    result = benchmark(model, byte_tokenizer, prompt_len=40, new_tokens=3, repeats=2)
    assert lengths == [40, 1] + 2 * [40, 1, 1, 1]
    for phase in ("prefill", "decode"):
        assert 0 < result[phase]["min"] <= result[phase]["tokens_per_second"] <= result[phase]["max"]
    assert result["threads"] == torch.get_num_threads() and result["dtype"] == "float32"
    json.dumps(result)


def test_benchmark_tells_a_slower_model(byte_tokenizer):
    """A block that waits 50 ms shows as about 50 ms per decoded token, and once per prefill."""
    model = tiny_llama(0, vocab=300)
    fast = benchmark(model, byte_tokenizer, prompt_len=32, new_tokens=8)
    model.model.layers[0].register_forward_hook(lambda *_: time.sleep(0.05))
    slow = benchmark(model, byte_tokenizer, prompt_len=32, new_tokens=8)
    for phase, tokens in (("decode", 1), ("prefill", 32)):
        added = tokens / slow[phase]["tokens_per_second"] - tokens / fast[phase]["tokens_per_second"]
        assert added == pytest.approx(0.05, abs=0.03)


def test_benchmark_of_an_encoder_has_no_decode(byte_tokenizer):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    result = benchmark(BertForMaskedLM(BertConfig(vocab_size=300, **sizes)), byte_tokenizer, prompt_len=32)
    assert result["decode"] is None and result["prefill"]["tokens_per_second"] > 0


def test_peak_memory_sees_an_allocation():
    """In a process of its own, where nothing was ever larger."""
    code = """
from llmslim.evaluation.benchmark import peak_memory_mb
before = peak_memory_mb()
held = b"x" * int(before * 1e6)
del held
print(before, peak_memory_mb())
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(float, printed.split())
    assert 50 < before < 2000
    assert 0.8 * before < after - before < 1.1 * before


def test_logits_that_are_not_numbers_are_refused():
    model = tiny_llama(0)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        perplexity(model, random_text())


def test_a_hopeless_model_has_infinite_perplexity():
    logits = torch.zeros(24, VOCAB)
    logits[:, 0] = 1e4
    scores = TokenScores()
    scores.add(torch.ones(24, dtype=torch.long), logits)
    assert scores.result().nll.value == 1e4 and scores.result().nll.exp().value == math.inf


def test_disk_bytes(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "sub" / "b").write_bytes(b"123")
    assert disk_bytes(tmp_path) == 8


@pytest.fixture
def byte_tokenizer():
    """One token per byte, built here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)
