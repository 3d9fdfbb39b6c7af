"""What training wins back of SmolLM2-135M, after quantization, pruning and sharing, in a number of minutes.

    python evals/recovery.py [--variants '3-bit/*']    --list names the variants

Compressed on 32 x 512 tokens of WikiText-2 valid; trained on up to 448 windows of 512 tokens of the same split, or in
rows with `@c4` of C4, as many as the minutes allow, on --threads cores. See variants.py for how a variant is judged;
the same is done with documents of C4 that none is trained on. A row is what was compressed / how it was trained;
`untrained` is where its training began. `float` is the model as it was, trained in the same way: what a text alone does
to it; it is the teacher of the rows `corrected` (teacher correction, Minitron, arXiv:2408.11796), whose minutes are
those of the teacher besides. Rows `-few` have 64 windows to train on, seen several times, as by a user with little
text; `once`: one time.
"""

from __future__ import annotations

from argparse import Namespace
from fnmatch import fnmatch
from typing import Any

import record
import tables
import variants
from quantization import texts
from variants import Steps

WINDOWS = 448  # to train on
QAT = {"bits": 2, "group_size": 64, "symmetric": False}
W8A8 = {"bits": 8, "group_size": "channel", "activation_bits": 8}
STARTS: dict[str, Steps] = {
    "float": [],
    "3-bit": [{"gptq": {"bits": 3, "group_size": 64, "symmetric": False}}],
    "pruned-20%": [{"mlp": {"ratio": round(0.2 / 0.75, 4), "multiple_of": 1}}],
    "shared-half": [{"share": {"unique_blocks": 15}}],
    "shared-half+deltas": [{"share": {"unique_blocks": 15, "delta_rank": 64}}],
    "2-bit-gptq": [{"gptq": QAT}],
    "2-bit-qat": [{"qat": {**QAT, "epochs": 4}}],
    "w8a8-rtn": [{"rtn": W8A8}],
    "w8a8-qat-token": [{"qat": {**W8A8, "epochs": 2}}],
    "w8a8-qat-learned": [{"qat": {**W8A8, "epochs": 2, "activation_scale": "learned"}}],
}
TEXTS = {"2-bit-qat": 64}  # windows to compress on, where it is not --num-samples
SCALES: dict[str, Any] = {"lr": 3e-4, "batch_size": 1}
MERGED: dict[str, Any] = {"lr": 1e-3, "batch_size": 1, "objective": "next_token"}
BESIDE: dict[str, Any] = {**MERGED, "save_adapter": True}
FULL: dict[str, Any] = {"lr": 1e-4, "batch_size": 1}
LABELS: dict[str, Any] = {**FULL, "alpha": 0.5}  # beside the teacher
NEXT_TOKEN = {"full": {**FULL, "objective": "next_token"}}
FEW = 64  # windows of rows `-few`, a tenth of which is held out: what does best on it is kept
TRAININGS: dict[str, dict[str, tuple[float, dict[str, Any]]]] = {  # start -> name -> minutes, step
    "float": {"next-token": (10, NEXT_TOKEN), "next-token@c4": (10, NEXT_TOKEN)},
    "3-bit": {
        "scales@c4": (20, {"scales": {**SCALES, "lr": 1e-3}}),
        "qlora@c4": (20, {"lora": {**BESIDE, "objective": "distill"}}),
        "qlora-next-token": (15, {"lora": BESIDE}),
        "qlora-next-token-merged": (15, {"lora": MERGED}),
        "qlora-next-token-rounded": (15, {"lora": {**MERGED, "rounding": "nearest"}}),
    },
    "pruned-20%": {
        "distill@c4": (10, {"response": FULL}),
        "features@c4": (10, {"features": {**FULL, "hidden": 10, "attention": 0}}),
        "distill+labels": (10, {"response": LABELS}),
        "distill+labels@c4": (30, {"response": LABELS}),
        "distill+labels-corrected": (20, {"response": LABELS}),
        "distill+labels-few": (20, {"response": LABELS}),
        "next-token-few": (20, NEXT_TOKEN),
        "next-token-once-few": (5, {"full": {**NEXT_TOKEN["full"], "epochs": 1}}),
        "next-token": (10, NEXT_TOKEN),
        "next-token-30": (30, NEXT_TOKEN),
        "next-token@c4": (30, NEXT_TOKEN),
    },
    "shared-half": {"distill+labels": (5, {"response": LABELS})},
    "shared-half+deltas": {"distill+labels": (5, {"response": LABELS})},
    "2-bit-gptq": {},
    "w8a8-rtn": {},
    "w8a8-qat-token": {},
    "w8a8-qat-learned": {},
    "2-bit-qat": {"scales": (12, {"scales": SCALES})},
}
REPEATED = (  # with where their training began
    *("3-bit/untrained", "3-bit/qlora-next-token", "shared-half*/*", "2-bit-qat/*"),
    *("pruned-20%/untrained", "pruned-20%/*labels@c4", "pruned-20%/*token@c4"),
)
CORRECTION = "float/next-token"  # makes the teacher of the rows `-corrected`


def names() -> list[str]:
    rows = [f"{start}/{name}" for start in STARTS for name in ("untrained", *TRAININGS[start])]
    repeated = [row for row in rows if any(fnmatch(row, pattern) for pattern in REPEATED)]
    rows += variants.again(repeated)
    return ["base", *(row for row in rows if row != "float/untrained")]  # which is the base


def measure(name: str, options: Namespace) -> dict[str, Any]:
    """One row; the start is made when it is not in the work folder, and stays there."""
    c4 = texts(options.data, options.work)
    if name == "base":
        return variants.measure(name, [], options, elsewhere=c4["c4-test"])
    start, _, training = name.partition("/")
    asked = options
    options = Namespace(**{**vars(options), "num_samples": TEXTS.get(start, options.num_samples)})
    folder = options.work / start.replace("%", "")
    if training == "untrained":
        row = variants.measure(name, STARTS[start], options, keep=folder, elsewhere=c4["c4-test"])
        return {**row, "options": variants.settings(asked), "compressed_on": options.num_samples}
    if STARTS[start] and not folder.is_dir():
        variants.measure(name, STARTS[start], options, keep=folder)
    minutes, step = TRAININGS[start][training]
    kind, fields = next(iter(step.items()))
    corrected, teacher = training.endswith("-corrected"), options.work / "teacher"
    if corrected and not teacher.is_dir():
        measure(CORRECTION, asked)
    fields = {"epochs": 1000, **fields, "max_minutes": minutes}
    few = training.endswith("-few")
    fields |= {"validation": 0.1} if few else {}
    if fields.get("objective") != "next_token":
        fields["teacher"] = str(teacher) if corrected else options.model
    begun = str(folder) if STARTS[start] else options.model
    trained = Namespace(**{**vars(options), "model": begun, "num_samples": FEW if few else WINDOWS})
    return {
        **variants.measure(
            name,
            [{kind: fields}],
            trained,
            keep=teacher if name == CORRECTION else None,
            text=c4["c4"] if training.endswith("@c4") else None,
            elsewhere=c4["c4-test"],
        ),
        "options": variants.settings(asked),
        "minutes": minutes + (TRAININGS["float"]["next-token"][0] if corrected else 0),
    }


def main() -> None:
    options = record.parse(variants.parser(__doc__ or "", "recovery"))
    variants.each(options, names(), measure, tables.recovery)


if __name__ == "__main__":
    main()
