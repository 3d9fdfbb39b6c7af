"""Write a Llama of random weights, one block at a time: memory holds a block, whatever the size of the model.

    python evals/random_llama.py FOLDER [--blocks 22]

bfloat16, one safetensors file per block; weights are normal with a standard deviation of 0.02, norms are one.
The defaults are TinyLlama's 1.1B shape. The tokenizer is the small one of the tests: its 512 ids are enough
for a text to be read, and the model knows nothing anyhow.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.tiny import tiny_tokenizer

STD = 0.02


def block_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of one block, named below it."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    head = hidden // config.num_attention_heads
    keys = head * (config.num_key_value_heads or config.num_attention_heads)
    return {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def parts(config: LlamaConfig) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes, file by file."""
    table = (config.vocab_size, config.hidden_size)
    blocks = [
        {f"model.layers.{index}.{name}": shape for name, shape in block_shapes(config).items()}
        for index in range(config.num_hidden_layers)
    ]
    outer = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "model.norm.weight": (config.hidden_size,),
    }
    return [outer, *blocks]


def write(folder: Path, config: LlamaConfig, seed: int) -> int:
    """Write the model; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    files: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(parts(config)):
        tensors = {
            name: torch.randn(shape, generator=generator).mul_(STD).bfloat16()
            if len(shape) == 2
            else torch.ones(shape, dtype=torch.bfloat16)
            for name, shape in shapes.items()
        }
        name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return total


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path)
    made.add_argument("--blocks", type=int, default=22)
    made.add_argument("--hidden", type=int, default=2048)
    made.add_argument("--intermediate", type=int, default=5632)
    made.add_argument("--heads", type=int, default=32)
    made.add_argument("--kv-heads", type=int, default=4)
    made.add_argument("--vocabulary", type=int, default=32000)
    made.add_argument("--seed", type=int, default=0)
    options = made.parse_args()
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.blocks,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    print(json.dumps({"bytes": write(options.folder, config, options.seed)}))


if __name__ == "__main__":
    main()
