"""How to load a checkpoint: a section of its card, which promises no more than was tried or is documented."""

from __future__ import annotations

from typing import Any

DOCUMENTED = "by its documentation; not tried here"


def auto_class(config: dict[str, Any]) -> str:
    """The class of transformers that loads such a model."""
    name = (config.get("architectures") or [""])[0]
    for ending, auto in (
        ("ForCausalLM", "AutoModelForCausalLM"),
        ("LMHeadModel", "AutoModelForCausalLM"),
        ("ForMaskedLM", "AutoModelForMaskedLM"),
        ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
    ):
        if name.endswith(ending):
            return auto
    return "AutoModel"


def loading(format_name: str, config: dict[str, Any]) -> str:
    """The section; FOLDER stands for where the checkpoint lies."""
    auto = auto_class(config)
    plugin = "import llmslim.plugin  # teaches transformers the format\n" if format_name == "llmslim" else ""
    packed = (
        ""
        if format_name in ("plain", "bitsandbytes")
        else ", which keeps the weights packed in memory and computes with them so"
    )
    needs = {
        "plain": "It is a standard checkpoint; with plain transformers and whatever else reads those:",
        "llmslim": "With transformers, after `pip install llmslim`:",
        "compressed-tensors": "With plain transformers (`pip install compressed-tensors`):",
        "bitsandbytes": "With plain transformers (`pip install bitsandbytes`):",
        "gptq": "With plain transformers (`pip install optimum gptqmodel`):",
    }
    return (
        f"## Load it\n\nWith llmslim{packed}:\n\n"
        '```python\nimport llmslim\n\nmodel, tokenizer = llmslim.load("FOLDER")\n```\n\n'
        f"{needs[format_name]}\n\n"
        f"```python\n{plugin}from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```'
        f"{_serving(format_name, config, auto)}"
    )


def _serving(format_name: str, config: dict[str, Any], auto: str) -> str:
    """What vLLM makes of it. evals/results/peers_load.json has what was tried, with vLLM 0.32.0 on a CPU."""
    if auto != "AutoModelForCausalLM":
        return ""
    told, options = _vllm(format_name, config), ""
    if format_name in ("compressed-tensors", "gptq") and told.startswith("4-bit"):
        options = " --dtype float16"
    return f"\n\nServed by vLLM ({told}):\n\n```\nvllm serve FOLDER{options}\n```" if told else ""


def _vllm(format_name: str, config: dict[str, Any]) -> str:
    """Where vLLM runs it, in words; empty if it does not or nothing says so."""
    if format_name == "plain":
        return f"a standard checkpoint, which it reads {DOCUMENTED}"
    packed = config.get("quantization_config") or {}
    if format_name == "gptq":
        bits, inputs = {packed.get("bits")}, False
    elif format_name == "compressed-tensors":
        groups = list((packed.get("config_groups") or {}).values())
        bits = {(group.get("weights") or {}).get("num_bits") for group in groups}
        inputs = any(group.get("input_activations") for group in groups)
    else:
        return ""
    if bits == {4}:
        return "4-bit checkpoints of this format ran in float16 on a CPU; on a GPU " + DOCUMENTED
    if inputs:
        return f"weights and inputs in 8 bits {DOCUMENTED}"
    if bits == {8} or format_name == "gptq":
        return f"on a GPU, {DOCUMENTED}; its CPU build takes 4 bits only"
    return ""  # compressed-tensors with 3 bits: versions of vLLM differ, and none was tried
