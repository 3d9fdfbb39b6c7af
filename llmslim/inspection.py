"""inspect(): what a model is, from its configuration alone; compressed checkpoints too."""

from __future__ import annotations

from typing import Any

from llmslim.anatomy.inspect import summary
from llmslim.checkpoint.reader import plain_config, read_edits
from llmslim.edit import replay
from llmslim.loaders.models import find, skeleton


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
    files = find(model, revision, metadata_only=True)
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
