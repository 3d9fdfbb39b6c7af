"""A needle in a haystack: is a number found again in a long text that a quantized KV cache holds?

WikiText-2 test is the hay. "The magic number is 48213." stands in it at a depth (the share of the hay that comes before
it), and the text ends in "The magic number is ", so small a question that SmolLM2-135M answers it with the full cache.
It is read in chunks of at most 128 tokens, so that all but the newest 128 and the first 4 are read quantized. An answer
is exact where each of its digits is the likeliest given those before: it is the greedy one.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

from kv_kinds import CHUNK, cache_of, demo, wikitext

LENGTHS = (512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NUMBERS = (48213, 70956)


def needle(kind: str, options: Namespace) -> dict[str, Any]:
    """Grids [length][depth]: the share of exact answers, and the mean log-probability of a digit of them."""
    import torch

    from llmslim.loaders.texts import sample

    model, tokenizer = demo("float32")
    hay = sample(f"{wikitext(options)}:test", tokenizer, 1, max(LENGTHS)).tokens[0]

    def ids(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text).input_ids)

    def read(tokens: torch.Tensor, cache: Any) -> None:
        for part in tokens.split(CHUNK) if len(tokens) else ():
            model(input_ids=part[None], past_key_values=cache, use_cache=True, logits_to_keep=1)

    exact = torch.zeros(len(LENGTHS), len(DEPTHS))
    likely = torch.zeros(len(LENGTHS), len(DEPTHS))
    with torch.no_grad():
        for row, length in enumerate(LENGTHS):
            for number in NUMBERS:
                fact, question = (
                    ids(f"\n\nThe magic number is {number}.\n\n"),
                    ids("\n\nThe magic number is "),
                )
                answer = torch.tensor(tokenizer.convert_tokens_to_ids(list(str(number))))  # a token per digit
                text = hay[: length - len(fact) - len(question) - len(answer)]
                before, cache = 0, cache_of(kind, model, options)
                for column, depth in enumerate(DEPTHS):
                    place = round(depth * len(text))
                    read(text[before:place], cache)  # what all deeper needles have before them is read once
                    before, own = place, copy.deepcopy(cache)
                    read(torch.cat([fact, text[place:], question[:-1]]), own)
                    last = torch.cat([question[-1:], answer[:-1]])
                    logits = model(input_ids=last[None], past_key_values=own, use_cache=True).logits[0]
                    found = logits.log_softmax(-1)
                    exact[row, column] += bool((found.argmax(-1) == answer).all()) / len(NUMBERS)
                    likely[row, column] += found.gather(1, answer[:, None]).mean() / len(NUMBERS)
    return {
        "lengths": LENGTHS,
        "depths": DEPTHS,
        "numbers": NUMBERS,
        "exact": [[round(one, 4) for one in row] for row in exact.tolist()],
        "logprob": [[round(one, 4) for one in row] for row in likely.tolist()],
    }
