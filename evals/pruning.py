"""Quality of pruning SmolLM2-135M: single weights, MLP channels, heads, layers and the width of the residual.

    python evals/pruning.py                           all variants: hours on one core
    python evals/pruning.py --variants 'single/*'     some of them, by pattern; --list names them
    python evals/pruning.py --plot                    draw evals/results/pruning.svg from the results, and stop

Each variant is a recipe that runs in a fresh process (32 x 512 calibration tokens of WikiText-2 valid); the saved
checkpoint is judged in another: perplexity in float32 over the first 16 windows of 512 tokens of WikiText-2 test
(rows concatenated as they are, no BOS). Nothing is trained.

A variant that is in the results file with the same options is not run again unless --again.
"""

from __future__ import annotations

import json
import shutil
import sys
from argparse import Namespace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import record
import render

Steps = list[dict[str, dict[str, Any]]]
SHARES = (10, 20, 30)  # percent of the parameters of the blocks
MLP_SHARE, ATTENTION_SHARE = 0.75, 0.25  # of the parameters of a block of SmolLM2-135M
HEADS = {"1-of-3": ("query", 1 / 3), "group": ("group", 1 / 3), "2-groups": ("group", 2 / 3)}
CHOICES: dict[str, dict[str, Any]] = {  # of channels and heads
    "obs-refit": {"criterion": "obs"},
    "output-refit": {"criterion": "output"},
    "output": {"criterion": "output", "refit": False},
    "magnitude-refit": {"criterion": "magnitude"},
    "magnitude": {"criterion": "magnitude", "refit": False},
    "taylor-refit": {"criterion": "taylor"},
    "random-refit": {"criterion": "random"},
    "random": {"criterion": "random", "refit": False},
}
LAYERS: dict[str, dict[str, Any]] = {
    "influence-refit": {"criterion": "influence"},
    "influence": {"criterion": "influence", "refit": False},
    "angular-refit": {"criterion": "angular"},
    "random": {"criterion": "random", "refit": False},
}


def variants() -> dict[str, Steps]:
    """Name -> steps. A name is what goes / how much / by which choice."""
    return {"base": [], **_single(), **_channels(), **_structured()}


def _single() -> dict[str, Steps]:
    found: dict[str, Steps] = {}
    for method in ("sparsegpt", "wanda", "magnitude", "random", "taylor", "snip", "grasp"):
        found[f"single/50%/{method}"] = [{method: {"sparsity": 0.5}}]
    for threshold in ("row", "global"):
        found[f"single/50%/magnitude-{threshold}"] = [{"magnitude": {"threshold": threshold}}]
    for allocation in ("owl", "error"):
        for method in ("sparsegpt", "wanda"):
            found[f"single/50%/{method}-{allocation}"] = [{method: {"layer_sparsity": allocation}}]
    for pattern in ("2:4", "4:8"):
        for method in ("sparsegpt", "wanda", "magnitude"):
            found[f"single/{pattern}/{method}"] = [{method: {"pattern": pattern}}]
    found["single/50%/sparsegpt-3-rounds"] = [{"sparsegpt": {"sparsity": 0.5, "rounds": 3}}]
    found["single/50%/gptq-4bit"] = [{"gptq": {"bits": 4, "group_size": 64, "sparsity": 0.5}}]
    found["single/50%/sparsegpt-then-gptq-4bit"] = [
        {"sparsegpt": {}},
        {"gptq": {"bits": 4, "group_size": 64}},
    ]
    return found


def _channels() -> dict[str, Steps]:
    """A quarter of the channels, 18.7% of the blocks' parameters."""
    found = {
        f"channels/25%-of-them/{name}": [{"mlp": {"ratio": 0.25, **choice}}]
        for name, choice in CHOICES.items()
    }
    found["channels/25%-of-them/output-refit-3-rounds"] = [
        {"mlp": {"ratio": 0.25, "criterion": "output", "rounds": 3}}
    ]
    found["channels/25%-of-them/obs-refit-sensitivity"] = [
        {"mlp": {"ratio": 0.25, "allocation": "sensitivity"}}
    ]
    return found


def _structured() -> dict[str, Steps]:
    found: dict[str, Steps] = {}
    for share in SHARES:
        channels = {"ratio": round(share / 100 / MLP_SHARE, 4), "multiple_of": 1}
        for name in ("output-refit", "output", "random"):
            found[f"channels/{share}%/{name}"] = [{"mlp": {**channels, **CHOICES[name]}}]
        for heads, (unit, ratio) in HEADS.items():
            rest = share / 100 - ATTENTION_SHARE * ratio * (0.75 if unit == "query" else 1)  # k and v stay
            if rest < 0.01:
                continue
            rest_of = {"ratio": round(rest / MLP_SHARE, 4), "multiple_of": 1}
            for name in ("output-refit", "output", "random") if heads == "group" else ("output-refit",):
                head = {"unit": unit, "ratio": round(ratio, 4), **CHOICES[name]}
                found[f"heads+channels/{share}%/{heads}-{name}"] = [
                    {"heads": head},
                    {"mlp": {**rest_of, **CHOICES[name]}},
                ]
        for basis in ("channels", "pca"):
            found[f"width/{share}%/{basis}"] = [
                {"width": {"ratio": share / 100, "multiple_of": 1, "basis": basis}}
            ]
        for name, choice in LAYERS.items():
            found[f"layers/{share}%/{name}"] = [{"layers": {"ratio": share / 100, **choice}}]
    for share in (20, 30):  # a tenth of the blocks, and channels of those that stay
        rest = (share / 100 - 0.1) / 0.9 / MLP_SHARE
        found[f"layers+channels/{share}%/output-refit"] = [
            {"layers": {"ratio": 0.1}},
            {"mlp": {"ratio": round(rest, 4), "multiple_of": 1, **CHOICES["output-refit"]}},
        ]
    found["width/10%/pca-refit"] = [
        {"width": {"ratio": 0.1, "multiple_of": 1, "basis": "pca", "refit": True}}
    ]
    found["layers/10%/perplexity-refit"] = [{"layers": {"ratio": 0.1, "criterion": "perplexity"}}]
    for heads, (unit, ratio) in HEADS.items():
        for name in ("obs-refit", "output", "random"):
            head = {"unit": unit, "ratio": round(ratio, 4), **CHOICES[name]}
            found[f"heads/{heads}/{name}"] = [{"heads": head}]
    return found


def measure(name: str, options: Namespace) -> dict[str, Any]:
    """Prune one variant and judge it; `base` is judged as it is."""
    folder = options.work / name.replace("/", "-").replace("%", "").replace(":", "-")
    prefix = f"{Path(options.data).absolute()}/" if options.data else ""
    text = f"{prefix}Salesforce/wikitext:wikitext-2-raw-v1"
    if name == "base":
        return {
            "name": name,
            "options": settings(options),
            "quality": judge(options.model, f"{text}:test", options),
        }
    recipe = {
        "steps": variants()[name],
        "calibration": {
            "text": f"{text}:validation",
            "num_samples": options.num_samples,
            "seq_len": options.seq_len,
        },
        "evaluation": None,
        "seed": options.seed,
    }
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / f"{folder.name}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    report, cost = record.quantized(record.llmslim("compress", options.model, str(path)), folder)
    quality = judge(str(folder), f"{text}:test", options)
    shutil.rmtree(folder)
    path.unlink()
    return {
        "name": name,
        "options": settings(options),
        **cost,
        **record.outcome(report),
        "steps": variants()[name],
        "blocks_left": blocks_left(report),
        "quality": quality,
    }


def blocks_left(report: dict[str, Any]) -> float:
    """Bytes in the result's blocks, as a share of those of the base's in the same 16-bit type."""
    size = report["size"]
    return size["result"]["block_bytes"] / (2 * size["base"]["block_parameters"])


def judge(model: str, text: str, options: Namespace) -> dict[str, Any]:
    words = [
        "--perplexity",
        text,
        "--seq-len",
        "512",
        "--windows",
        str(options.windows),
        "--dtype",
        "float32",
        "--json",
    ]
    figures: dict[str, Any] = json.loads(record.run(record.llmslim("evaluate", model, *words)).stdout)
    return record.pick(figures, "perplexity", "perplexity_stderr", "windows", "seq_len", "data_hash", "dtype")


def curves(result: dict[str, Any], path: Path) -> None:
    """Perplexity against what is left of the blocks, one panel per thing that goes, one line per choice."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in result["rows"]:
        what, _, choice = row["name"].partition("/")
        if (
            what in ("channels", "heads", "heads+channels", "layers", "layers+channels", "width")
            and "25%-of-them" not in choice
        ):
            choice = (
                choice.split("/")[1].removeprefix("group-").removeprefix("1-of-3-").removeprefix("2-groups-")
            )
            line = points.setdefault(what, {}).setdefault(choice, [])
            line.append((100 * (1 - row["blocks_left"]), row["quality"]["perplexity"]))
    base = next(row for row in result["rows"] if row["name"] == "base")["quality"]["perplexity"]
    figure, panels = plt.subplots(
        1, len(points), figsize=(4 * len(points), 4), sharey=True, layout="constrained", squeeze=False
    )
    for panel, (what, choices) in zip(panels[0], points.items(), strict=True):
        for choice, line in choices.items():
            style = "--" if "refit" not in choice else "-"
            best: dict[float, float] = {}
            for x, y in line:  # of several mixes at one size, the better
                best[round(x)] = min(y, best.get(round(x), y))
            panel.plot(*zip(*sorted(best.items()), strict=True), style, marker=".", label=choice)
        panel.axhline(base, color="grey", linewidth=0.8)
        panel.set(title=what, xlabel="% of the blocks' parameters removed", yscale="log")
        panel.legend(fontsize="small")
    panels[0][0].set_ylabel("WikiText-2 perplexity (grey: unpruned)")
    figure.savefig(path, metadata={"Date": None})


def settings(options: Namespace) -> dict[str, Any]:
    return {
        name: getattr(options, name)
        for name in ("model", "num_samples", "seq_len", "windows", "seed", "threads")
    }


def main() -> None:
    made = record.sweep(__doc__ or "", "pruning")
    made.add_argument("--plot", action="store_true", help="draw the results file, and stop")
    made.add_argument("--model", default="demo")
    options = record.parse(made)
    if options.plot:
        curves(json.loads(options.output.read_text()), options.output.with_suffix(".svg"))
        return
    order = list(variants())
    chosen = [name for name in order if any(fnmatch(name, pattern) for pattern in options.variants)]
    if options.list or not chosen:
        sys.exit("\n".join(order))
    result = record.opened(options)
    done = {row["name"] for row in result["rows"] if row["options"] == settings(options)}
    for name in chosen:
        if options.again or name not in done:
            record.put(result, measure(name, options), options.output)
    result["rows"].sort(key=lambda row: order.index(row["name"]) if row["name"] in order else len(order))
    record.write(result, options.output)
    print(render.pruning(result))


if __name__ == "__main__":
    main()
