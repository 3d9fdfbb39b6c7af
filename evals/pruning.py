"""Quality of pruning SmolLM2-135M: single weights, MLP channels, heads, layers and the width of the residual.

    python evals/pruning.py                           all variants: hours on one core
    python evals/pruning.py --variants 'single/*'     some of them, by pattern; --list names them
    python evals/pruning.py --plot                    draw evals/results/pruning.svg from the results, and stop

Calibration: 32 x 512 tokens of WikiText-2 valid; nothing is trained. See variants.py for how a variant is judged.

A variant that is in the results file with the same options is not run again unless --again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import record
import tables
import variants
from variants import Steps

HIGHEST = 1000  # perplexity that is drawn
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


def recipes() -> dict[str, Steps]:
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
    columns = 3
    figure, panels = plt.subplots(
        -(-len(points) // columns), columns, figsize=(12, 8), sharey=True, sharex=True, layout="constrained"
    )
    for panel, (what, choices) in zip(panels.flat, points.items(), strict=False):
        for choice, line in choices.items():
            style = "--" if "refit" not in choice else "-"
            best: dict[float, float] = {}
            for x, y in line:  # of several mixes at one size, the better
                best[round(x)] = min(y, best.get(round(x), y))
            panel.plot(*zip(*sorted(best.items()), strict=True), style, marker=".", label=choice)
        panel.axhline(base, color="grey", linewidth=0.8)
        panel.set(title=what, yscale="log", ylim=(30, HIGHEST), xlim=(0, 32))
        panel.legend(fontsize="small")
    figure.supxlabel("% of the blocks' parameters removed")
    figure.supylabel(f"WikiText-2 perplexity, up to {HIGHEST} (grey: unpruned)")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    made = variants.parser(__doc__ or "", "pruning")
    made.add_argument("--plot", action="store_true", help="draw the results file, and stop")
    options = record.parse(made)
    if options.plot:
        curves(json.loads(options.output.read_text()), options.output.with_suffix(".svg"))
        return
    variants.run(options, recipes(), tables.pruning)


if __name__ == "__main__":
    main()
