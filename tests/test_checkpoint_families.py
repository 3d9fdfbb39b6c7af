"""Every family, compressed, saved and loaded by another process, gives the logits of the model in memory."""

import json

import pytest
import torch

from llmslim.quantization.rtn import RTN
from tests.checkpoints import dense_logits_of, load_elsewhere, logits_of, make
from tests.tiny import FAMILIES, save_tiny

EVERYWHERE = {"sym4": ("auto", {"bits": 4, "group_size": 32})}
WITH_TABLES = {
    "asym5": ("llmslim", {"bits": 5, "group_size": "channel", "symmetric": False, "embeddings_bits": 8})
}
EXTRA = dict.fromkeys(("qwen2", "gemma2", "gemma3_text", "gpt2", "opt", "mixtral", "bert"), WITH_TABLES) | {
    "llama": WITH_TABLES | {
        "sym3": ("compressed-tensors", {"bits": 3, "group_size": "channel"}),
        "sym8": ("compressed-tensors", {"bits": 8, "group_size": "tensor"}),
        "mixed": ("auto", {"bits": 4, "group_size": 32, "overrides": {"*.down_proj": {"bits": 8}},
                                         "exclude": ("*.0.self_attn.q_proj",)}),
        "gptq3": ("gptq", {"bits": 3, "group_size": 32, "scale_dtype": "float16"}),
        "gptq4": ("gptq", {"bits": 4, "group_size": "channel", "symmetric": False, "scale_dtype": "float16"}),
        "gptq8": ("gptq", {"bits": 8, "group_size": 64, "scale_dtype": "float16", "exclude": ("down_proj",)}),
    },
    "t5": WITH_TABLES | {"gptq2": ("gptq", {"bits": 2, "group_size": 32, "scale_dtype": "float16"})},
}  # fmt: skip
# Conv1D; experts; models whose _init_weights needs dense weights: compressed-tensors does not load these
OWN = ("gpt2", "mixtral", "qwen3_moe", "t5", "modernbert")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """ "family-scheme" -> (folder, logits in memory, those with the same weights dense)."""
    root = tmp_path_factory.mktemp("families")
    result = {}
    for family in FAMILIES:
        source = save_tiny(family, root / family)
        for scheme, (form, fields) in (EVERYWHERE | EXTRA.get(family, {})).items():
            folder = root / f"{family}-{scheme}"
            model = make(source, folder, RTN(**fields), form)
            result[folder.name] = folder, logits_of(model), dense_logits_of(model)
    return result


def method(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]


def test_auto_is_a_standard_format_where_one_can_hold_the_result(made):
    for family in FAMILIES:
        assert method(made[f"{family}-sym4"][0]) == ("llmslim" if family in OWN else "compressed-tensors"), (
            family
        )


def test_llmslim_loads_every_format_with_equal_logits(made, tmp_path):
    loaded = load_elsewhere("llmslim", {name: folder for name, (folder, *_) in made.items()}, tmp_path)
    wrong = [name for name, (_, logits, _) in made.items() if not torch.equal(loaded[name], logits)]
    assert not wrong


def test_plugin_lets_from_pretrained_load_ours(made, tmp_path):
    ours = {name: made[name][0] for name in ("llama-asym5", "gpt2-sym4", "mixtral-asym5", "t5-asym5")}
    loaded = load_elsewhere("plugin", ours, tmp_path)
    assert not [name for name in ours if not torch.equal(loaded[name], made[name][1])]


def test_plain_transformers_loads_compressed_tensors(made, tmp_path):
    standard = {name: folder for name, (folder, *_) in made.items() if method(folder) == "compressed-tensors"}
    assert len(standard) == len(FAMILIES) - len(OWN) + 3
    loaded = load_elsewhere("transformers", standard, tmp_path)
    for name in standard:
        logits = made[name][2]
        torch.testing.assert_close(
            loaded[name], logits, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
