"""MiniLM (BERT, 6 layers) as a classifier on GLUE: teachers, 3-layer students with and without them, quantized ones.

    python evals/glue.py [--variants 'mrpc/*']    --list names the variants

Of each task: `teacher` is all of MiniLM fine-tuned; `labels` and `taught` are every second block of it, fine-tuned in
the same way by the labels alone and by the teacher beside (classes, hidden states, attention relations), on SST-2 for
the same time; `maps` and `tokens` are taught by attention maps, or by how tokens lie to each other, besides; `8bit`
(rtn) and `4bit` (gptq, calibrated on 256 x 32 tokens of the task's own sentences) are the taught student, quantized.
`decoder` is SmolLM2-135M fine-tuned, once over the sentences, and `by-decoder` all of MiniLM fine-tuned by its classes:
a teacher of another family with other tokens. `r-drop` is all of MiniLM, each sentence read twice with its own dropout,
and `chosen` the one of its checkpoints, of every 50 or 100 steps, that does best on the validation data it is then
judged on, as most published figures are made (of MRPC the running mean of the weights, `ema`). Four tasks are done from
three seeds, students from their seed's teacher. Judged on GLUE's validation data in float32. Models stay in --work,
from where later variants take them; one that is not there is made. Matrix products of the training are bfloat16 where
the CPU is fast at them, weights float32.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import record
import tables
import variants
from pruning_encoder import TASKS, minilm, sentences

TRAINING: dict[str, dict[str, Any]] = {  # of the teacher; a student has twice the learning rate
    "sst2": {"lr": 3e-5, "epochs": 3, "batch_size": 32, "max_length": 64},
    "mrpc": {"lr": 5e-5, "epochs": 4, "batch_size": 16},
    "rte": {"lr": 5e-5, "epochs": 4, "batch_size": 16},
    "cola": {"lr": 5e-5, "epochs": 3, "batch_size": 32, "max_length": 64},
    "stsb": {"lr": 5e-5, "epochs": 3, "batch_size": 16},
}
SCHOOLING: dict[str, dict[str, Any]] = {  # of single models, where it is not the teacher's
    "sst2/labels": {"epochs": 1},
    "sst2/taught": {"epochs": 0.5},  # which takes as long: the teacher runs beside
    "sst2/chosen": {"epochs": 1, "save_steps": 100},  # the checkpoints that are chosen from
    "mrpc/chosen": {"epochs": 5, "save_steps": 50, "ema": 0.99},
}
DECODER = {"lr": 6e-5, "epochs": 1, "batch_size": 96, "max_length": 64, "warmup": 0.06, "save_steps": 200}
BY_DECODER = {"lr": 2e-5, "epochs": 3, "alpha": 0.9, "temperature": 2.0, "hidden": 0.0, "attention": 0.0}
WHOLE: dict[str, dict[str, Any]] = {  # all of MiniLM by the labels: what is not as for the teacher
    "teacher": {},
    "r-drop": {"lr": 5e-5, "epochs": 2, "warmup": 0.1, "r_drop": 1.0},
    "chosen": {"lr": 5e-5, "warmup": 0.1, "choose_on_validation": True},
}
STUDENT = [0, 2, 4]  # the blocks that go; those that stay learn from their own place in the teacher
BESIDE: dict[str, dict[str, float]] = {  # what more the teacher shows
    "maps": {"attention_maps": 1.0},
    "tokens": {"token_distance": 1.0, "token_angle": 2.0},
}
ALONE = ("sst2/decoder", "sst2/by-decoder", "sst2/r-drop", "sst2/chosen", "mrpc/chosen")
MINUTES = ("mrpc", "rte", "cola", "stsb")  # trained within minutes: from more seeds than one
KINDS = ("teacher", "labels", "taught", *BESIDE, "8bit", "4bit")


def steps_of(name: str, options: Namespace) -> tuple[str, list[dict[str, Any]]]:
    """The model that a variant starts from (the name of another variant, a path or demo), and its steps."""
    task, kind = name.split("/")
    learn = {**TRAINING[task], "glue": task, "data": options.data, "precision": record.fast_type()}
    if kind in WHOLE:
        return minilm(), [{"finetune": {**learn, **WHOLE[kind], **SCHOOLING.get(name, {})}}]
    if kind == "decoder":
        return "demo", [{"finetune": {**learn, **DECODER}}]
    if kind == "by-decoder":
        teacher = str(place(f"{task}/decoder", options))
        return minilm(), [{"finetune": {**learn, **BY_DECODER, "teacher": teacher}}]
    if kind in ("8bit", "4bit"):
        bits = {"rtn": {"bits": 8}} if kind == "8bit" else {"gptq": {"bits": 4, "group_size": 64}}
        return f"{task}/taught", [bits]
    learn = {**learn, "lr": 2 * learn["lr"], **SCHOOLING.get(name, {})}
    learn |= BESIDE.get(kind, {})
    if kind != "labels":
        learn["teacher"] = str(place(f"{task}/teacher", options))
    return f"{task}/teacher", [{"layers": {"drop": STUDENT}}, {"finetune": learn}]


def place(name: str, options: Namespace) -> Path:
    return options.work / name.replace("/", "-")


def made(name: str, options: Namespace) -> dict[str, Any]:
    """Make the model of a variant, and before it what it is made from if that is not there; what it cost."""
    source, steps = steps_of(name, options)
    starts = (minilm(), "demo")
    task, kind = name.split("/")
    needs = f"{task}/decoder" if kind == "by-decoder" else source
    if needs not in starts and not place(needs, options).is_dir():  # a student is made from its teacher
        made(needs, options)
    options.work.mkdir(parents=True, exist_ok=True)
    text, recipe = options.work / f"{task}.jsonl", options.work / f"{name.replace('/', '-')}.yaml"
    seen = sentences(options.data, "train", {task: TASKS[task]}, 4000)
    text.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in seen))
    calibration = {"text": str(text), "num_samples": options.num_samples, "seq_len": options.seq_len}
    whole = {"steps": steps, "calibration": calibration, "evaluation": None, "seed": options.seed}
    recipe.write_text(json.dumps(whole))  # JSON is YAML
    start = source if source in starts else str(place(source, options))
    report, cost = record.quantized(record.llmslim("compress", start, str(recipe)), place(name, options))
    return {**cost, **record.outcome(report), "steps": steps}


def measure(name: str, options: Namespace) -> dict[str, Any]:
    """Make a variant and judge it."""
    task, kind = name.split("/")
    row = made(name, options)
    words = [
        "--glue",
        task,
        "--dtype",
        "float32",
        "--json",
        *(["--data", options.data] if options.data else []),
    ]
    done = record.run(record.llmslim("evaluate", str(place(name, options)), *words))
    figures = json.loads(done.stdout)
    return {
        "name": name,
        "task": task,
        "kind": kind,
        "options": variants.settings(options),
        **row,
        "protocol": figures["protocol"],
        **figures["tasks"][task],
    }


def main() -> None:
    parser = variants.parser(__doc__ or "", "glue")
    parser.set_defaults(model=minilm() if "--list" not in sys.argv else "", num_samples=256, seq_len=32)
    options = record.parse(parser)
    names = [*(f"{task}/{kind}" for task in TRAINING for kind in KINDS), *ALONE]
    repeated = [name for name in names if name.split("/")[0] in MINUTES and name.split("/")[1] not in BESIDE]
    variants.each(options, names + variants.again(repeated), measure, tables.glue)


if __name__ == "__main__":
    main()
