"""Tiny random models of every supported family, a real small tokenizer, and inputs for them; no download.

Three blocks, hidden 64, four heads of 16 (two KV heads where the family has them), MLP width 128, vocabulary
512: every width is divisible by 32. Weights, biases and norms are all random, so nothing hides behind a zero
or a one, and scaled so that logits have a standard deviation of about 1.5.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:  # a child that must not have llmslim imports this
    from llmslim.anatomy import Attention

SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
PAD, BOS, EOS = 0, 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class TinyFamily:
    """How to build one family: the auto class of its usual task and what its config needs to be tiny."""

    auto_class: Any
    config: dict[str, Any] = field(default_factory=dict)


_SHARED = {"vocab_size": 512, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_USUAL = _SHARED | {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
}
_GROUPED = _USUAL | {"num_key_value_heads": 2}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_GEMMA = _GROUPED | _SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16}
_MOE = _GROUPED | {"num_experts_per_tok": 2}

FAMILIES: dict[str, TinyFamily] = {
    "llama": TinyFamily(AutoModelForCausalLM, _GROUPED),
    "mistral": TinyFamily(AutoModelForCausalLM, _GROUPED | {"sliding_window": 8}),
    "qwen2": TinyFamily(AutoModelForCausalLM, _GROUPED | {"tie_word_embeddings": True}),
    "qwen3": TinyFamily(AutoModelForCausalLM, _GROUPED | {"head_dim": 32}),
    "gemma2": TinyFamily(AutoModelForCausalLM, _GEMMA),
    "gemma3_text": TinyFamily(AutoModelForCausalLM, _GEMMA),
    "phi3": TinyFamily(AutoModelForCausalLM, _GROUPED),
    "gpt2": TinyFamily(
        AutoModelForCausalLM,
        _SHARED | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 128, "n_positions": 512},
    ),
    "opt": TinyFamily(AutoModelForCausalLM, _USUAL | {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gpt_neox": TinyFamily(AutoModelForCausalLM, _USUAL),
    "mixtral": TinyFamily(AutoModelForCausalLM, _MOE | {"num_local_experts": 4, "intermediate_size": 64}),
    "qwen3_moe": TinyFamily(
        AutoModelForCausalLM,
        _MOE | {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16, "mlp_only_layers": [1]},
    ),
    "bert": TinyFamily(AutoModelForMaskedLM, _USUAL),
    "roberta": TinyFamily(AutoModelForMaskedLM, _USUAL),
    "distilbert": TinyFamily(
        AutoModelForMaskedLM,
        _SHARED | {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 512},
    ),
    "modernbert": TinyFamily(
        AutoModelForMaskedLM,
        _USUAL
        | {"cls_token_id": BOS, "sep_token_id": EOS, "local_attention": 8, "global_attn_every_n_layers": 2},
    ),
    "t5": TinyFamily(
        AutoModelForSeq2SeqLM,
        _SHARED
        | {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 3, "num_decoder_layers": 3}
        | {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": PAD, "tie_word_embeddings": False},
    ),
}
DECODERS = [name for name, family in FAMILIES.items() if family.auto_class is AutoModelForCausalLM]
ENCODERS = [name for name, family in FAMILIES.items() if family.auto_class is AutoModelForMaskedLM]


def tiny_config(family: str, **config_overrides: Any) -> PreTrainedConfig:
    """The config of a tiny model; `family` is a key of FAMILIES, which is the `model_type`."""
    return AutoConfig.for_model(family, **(FAMILIES[family].config | config_overrides))


def head_rows(attention: Attention, role: str, head: int) -> Tensor:
    """The rows [head_dim] of one head: a query head for "q" and "o", a KV head for "k" and "v"."""
    return getattr(attention, role).rows[head * attention.head_dim : (head + 1) * attention.head_dim]


def meta_model(family: str, **config_overrides: Any) -> PreTrainedModel:
    """The same model on the meta device: shapes, no weights."""
    with torch.device("meta"):
        config = tiny_config(family, **config_overrides)
        return FAMILIES[family].auto_class.from_config(config, dtype=torch.float32).eval()


def tiny_model(family: str, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """A random model in fp32 and eval mode; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        config = tiny_config(family, **config_overrides)
        model = FAMILIES[family].auto_class.from_config(config, dtype=torch.float32).eval()
    randomize(model, seed)
    if model.can_generate():
        model.generation_config = GenerationConfig(
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
            max_new_tokens=16,
        )
    return model


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Matrices: normal with std 1.5 / sqrt(fan_in). Vectors (norms, biases): noise of std 0.1 is added."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter in seen:  # tied
                continue
            seen.add(parameter)
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(noise, alpha=0.1)
            else:
                fan_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[-1]
                parameter.copy_(noise * 1.5 / fan_in**0.5)


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[name] for name in sorted(topics)[:40]], trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens, trained on Python's own documentation.

    Ids 0 to 4 are pad, bos, eos, unk, mask. `tokenizer(text)` adds no special tokens. It has a chat template.
    """
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), model_max_length=512, **SPECIAL
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(family: str, folder: str | Path, seed: int = 0, **config_overrides: Any) -> Path:
    """Write a tiny model as a Hugging Face folder: config, weights, tokenizer, generation config."""
    tiny_model(family, seed, **config_overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def example_inputs(model: PreTrainedModel, batch: int = 2, seq: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids [batch, seq] (no special ones) as keyword arguments of `model`; full attention mask.

    An encoder-decoder gets `decoder_input_ids` of the same shape too.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens() -> Tensor:
        return torch.randint(len(SPECIAL), model.config.vocab_size, (batch, seq), generator=generator)

    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(batch, seq, dtype=torch.long)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens()
    return inputs
