"""inspect(): what a model is, from its configuration alone; compressed checkpoints too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmslim.anatomy.inspect import summary
from llmslim.checkpoint.reader import plain_config, read_edits
from llmslim.edit import replay
from llmslim.loaders.models import find, skeleton
from llmslim.work import silent

if TYPE_CHECKING:
    from llmslim.recipe import Calibration
    from llmslim.work import Progress


def inspect(model: str, revision: str | None = None) -> dict[str, Any]:
    """The anatomy of a model as plain JSON: blocks, heads, widths, parameters and bytes by part.

    Reads no weights. Of a compressed checkpoint, parameters are those that its packed weights stand for, and
    bytes what they take.

    Args:
        model: a Hub id, a folder, a .gguf file, or "demo".
        revision: of a Hub model.

    Raises:
        UserError: there is no such model.
    """
    files = find(model, revision)
    form, edits = read_edits(files)
    whole = skeleton(plain_config(files))
    facts = summary(whole, files.dtype)
    if form is not None:
        replay(whole, edits)
        packed = summary(whole, files.dtype)
        facts |= {"stacks": packed["stacks"], "bytes": packed["bytes"], "unmatched": packed["unmatched"]}
        for part, count in facts["parts"].items():
            count["bytes"] = packed["parts"].get(part, {"bytes": 0})["bytes"]
    bits = 8 * facts["bytes"] / max(1, facts["parameters"])
    return {"spec": model, "format": form.name if form else None, "bits_per_weight": bits, **facts}


def sensitivity(
    model: str,
    calibration: Calibration,
    *,
    seed: int = 0,
    revision: str | None = None,
    device: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """What each head, group of channels and block is worth, on a text; reads the weights block by block.

    Args:
        model: a Hub id, a folder, a .gguf file, or "demo"; not one whose weights are packed.
        calibration: the text, and how much of it.
        device: the GPU if there is one when None.

    Returns:
        `blocks`, as `llmslim.pruning.sensitivity.sensitivity` returns them, with the shares of channels they name
        in `shares`, and the text's protocol and hash.

    Raises:
        UserError: there is no such model or text, or the weights are packed.
    """
    import torch

    from llmslim.loaders.heads import require_vocabulary
    from llmslim.loaders.models import compute_dtype, find_device
    from llmslim.loaders.texts import sample
    from llmslim.passes import PassOptions
    from llmslim.pruning.heads import PruneHeads
    from llmslim.pruning.sensitivity import SHARES
    from llmslim.pruning.sensitivity import sensitivity as measure
    from llmslim.survey import Look

    place = find_device(device)
    files = find(model, revision)
    text = sample(calibration.text, files.tokenizer(), calibration.num_samples, calibration.seq_len, seed)
    options = PassOptions(text.tokens, seed, place, compute_dtype(place, stored=files.dtype), files.dtype)
    look = Look(files, options, progress)
    require_vocabulary(text.tokens, look.anatomy.model, files.spec)
    PruneHeads(ratio=0.0).check_dense(look.anatomy)
    with torch.no_grad():
        blocks = measure(look)
    told = {"protocol": text.protocol, "data_hash": text.data_hash}
    return {"spec": model, "shares": list(SHARES), "calibration": told, "blocks": blocks}
