"""Perplexity of a GPTQ checkpoint, by unpacking it into the dense model: needs no GPTQ library.

    taskset -c 1 python evals/peers/gptq_perplexity.py --model smollm2-fp32 \\
        --quantized smollm2-gptq --data ../shared/data/Salesforce/wikitext

Protocol: WikiText-2 raw test, rows concatenated as they are, no BOS, non-overlapping windows, mean loss over
the predicted tokens of each, fp32. Without --quantized the dense model is judged. llmslim is not imported.

Layout: `qweight` int32 [in*bits/32, out], codes packed along `in`, little end first; `qzeros` int32
[in/g, out*bits/32]; `scales` [in/g, out]; `g_idx` int32 [in]. Format v1 stores the zero point less one.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def unpack(packed: Tensor, bits: int) -> Tensor:
    """[rows*bits/32, columns] int32 -> [rows, columns] codes; a 3-bit code may straddle two words."""
    words = packed.to(torch.int64) & 0xFFFFFFFF
    position = torch.arange(packed.shape[0] * 32)
    stream = (words[position // 32] >> (position % 32)[:, None]) & 1
    weights = 1 << torch.arange(bits)
    return (stream.view(-1, bits, packed.shape[1]) * weights[:, None]).sum(1)


def dequantize(tensors: dict[str, Tensor], name: str, bits: int, v1: bool) -> Tensor:
    """The weight [out, in] of one Linear."""
    codes = unpack(tensors[f"{name}.qweight"], bits)
    zeros = unpack(tensors[f"{name}.qzeros"].T.contiguous(), bits).T + int(v1)
    group = tensors[f"{name}.g_idx"].long()
    return ((codes - zeros[group]) * tensors[f"{name}.scales"].float()[group]).T


def load_quantized(model: Any, folder: str) -> int:
    """Put the checkpoint's weights into the dense model; returns how many Linears were packed."""
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    tensors: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    packed = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    v1 = config.get("checkpoint_format", "gptq") == "gptq"
    suffixes = (".qweight", ".qzeros", ".scales", ".g_idx")
    state = {key: value.float() for key, value in tensors.items() if not key.endswith(suffixes)}
    for name in packed:
        state[f"{name}.weight"] = dequantize(tensors, name, config["bits"], v1)
    missing, unexpected = model.load_state_dict(state, strict=False)
    untied = [key for key in missing if key != "lm_head.weight"]
    if untied or unexpected:
        raise ValueError(f"the checkpoint does not fit the model: missing {untied}, unexpected {unexpected}")
    return len(packed)


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, data: str, num_windows: int, seq_len: int) -> float:
    from datasets import load_dataset

    rows = load_dataset(data, "wikitext-2-raw-v1", split="test")["text"]
    ids = torch.tensor(tokenizer("".join(rows), add_special_tokens=False)["input_ids"])
    losses = []
    for window in ids[: num_windows * seq_len].view(num_windows, 1, seq_len):
        logits = model(window, use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]).item())
    return math.exp(sum(losses) / num_windows)


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the dense model")
    parser.add_argument("--quantized", help="folder of the GPTQ checkpoint")
    parser.add_argument("--data", required=True, help="Salesforce/wikitext, or a folder laid out like it")
    parser.add_argument("--num-windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    packed = load_quantized(model, args.quantized) if args.quantized else 0
    value = perplexity(model, tokenizer, args.data, args.num_windows, args.seq_len)
    print(
        json.dumps({"packed_linears": packed, "num_windows": args.num_windows, "perplexity": round(value, 3)})
    )


if __name__ == "__main__":
    main()
