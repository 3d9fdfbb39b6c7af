"""How to load it: the card promises of vLLM what was tried or is documented, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from llmslim.report.loading import loading

LLAMA = {"architectures": ["LlamaForCausalLM"]}


def compressed(bits: int, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"weights": {"num_bits": bits}, "input_activations": inputs}
    return {**LLAMA, "quantization_config": {"config_groups": {"group_0": group}}}


@pytest.mark.parametrize(
    ("form", "config", "told"),
    [
        ("compressed-tensors", compressed(4), "float16 on a CPU"),
        (
            "compressed-tensors",
            compressed(8),
            "on a GPU, by its documentation; not tried here; its CPU build",
        ),
        (
            "compressed-tensors",
            compressed(8, {"num_bits": 8}),
            "weights and inputs in 8 bits by its documentation",
        ),
        ("compressed-tensors", compressed(3), None),
        ("gptq", {**LLAMA, "quantization_config": {"bits": 4}}, "float16 on a CPU"),
        ("gptq", {**LLAMA, "quantization_config": {"bits": 8}}, "its CPU build takes 4 bits only"),
        ("plain", LLAMA, "a standard checkpoint"),
        ("llmslim", LLAMA, None),
        ("bitsandbytes", LLAMA, None),
        ("plain", {"architectures": ["BertModel"]}, None),
    ],
)
def test_what_the_card_says_of_vllm(form: str, config: dict[str, Any], told: str | None) -> None:
    text = loading(form, config)
    assert 'llmslim.load("FOLDER")' in text
    if told is None:
        assert "vLLM" not in text and "vllm" not in text
    else:
        assert told in text and "vllm serve FOLDER" in text
    assert ("--dtype float16" in text) == (told == "float16 on a CPU")
