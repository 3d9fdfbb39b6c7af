"""The `model-index` of a card: measured results in the form that the Hub reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

TASK = {"type": "text-generation", "name": "Text Generation"}
CLASSIFICATION = {"type": "text-classification", "name": "Text Classification"}


def model_index(report: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """One entry of the card's `model-index`; empty when nothing finite was measured.

    The specification is that of `huggingface_hub.model_index_to_eval_results`. A perplexity is given with those of
    the base and with KL divergence and agreement in the same result, since alone it says little.
    """
    results = [
        *_perplexity(report["quality"] or {}),
        *_tasks(report.get("tasks") or {}),
        *_glue(report.get("glue") or {}),
    ]
    return [{"name": name, "results": results}] if results else []


def _perplexity(quality: dict[str, Any]) -> list[dict[str, Any]]:
    if "perplexity" not in quality:
        return []
    figures = [
        ("perplexity", "Perplexity", quality["perplexity"]["value"]),
        ("perplexity", "Perplexity of the base", quality["base_perplexity"]["value"]),
        ("kl_divergence", "KL divergence from the base, nats per token", quality["kl"]["value"]),
        (
            "top1_agreement",
            "Agreement with the base on the likeliest token",
            quality["top1_agreement"]["value"],
        ),
    ]
    metrics = [
        {"type": kind, "name": label, "value": value}
        for kind, label, value in figures
        if math.isfinite(value)
    ]
    if not metrics:
        return []
    dataset = _dataset(quality["perplexity"].get("text", ""))
    return [{"task": dict(TASK), "dataset": dataset, "metrics": metrics}]


def _tasks(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The chief score of each task of lm-eval, of the result and of the base."""
    results = []
    for name, task in record.get("tasks", {}).items():
        found = task["metrics"].get(task["main"]) or {}
        sides = ((task["main"], found.get("value")), (f"{task['main']} of the base", found.get("base")))
        metrics = [
            {"type": task["main"], "name": label, "value": value}
            for label, value in sides
            if value is not None and math.isfinite(value)
        ]
        if metrics:
            results.append({"task": dict(TASK), "dataset": {"name": name, "type": name}, "metrics": metrics})
    return results


def _glue(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of each of GLUE's tasks, of the result and of the base where it was scored."""
    some = f" (the first {record['subset']} examples)" if record.get("subset") else ""
    return [
        {
            "task": dict(CLASSIFICATION),
            "dataset": {
                "name": f"GLUE {name}{some}",
                "type": "nyu-mll/glue",
                "config": name,
                "split": "validation",
            },
            "metrics": [
                {"type": metric.removesuffix("_mismatched"), "name": f"{metric}{of}", "value": found[side]}
                for metric, found in task["metrics"].items()
                for side, of in (("value", ""), ("base", " of the base"))
                if side in found
            ],
        }
        for name, task in record.get("tasks", {}).items()
        if task["metrics"]
    ]


def _dataset(spec: str) -> dict[str, str]:
    """A text NAME[:CONFIG[:SPLIT]] as a data set of the Hub; of a path the last two parts, which often name one."""
    path, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    parts = Path(path).parts[-2:] if path not in ("", "builtin") else ("python documentation",)
    if parts[0] == Path.home().name:  # of a user, not of a data set's owner: this goes up to the Hub
        parts = parts[1:]
    name = "/".join(part for part in parts if part not in ("..", ".", "/")) or "text"
    made = {"name": name, "type": name.replace(" ", "-")}
    if config and path != "builtin":
        made["config"] = config
    if split:
        made["split"] = split
    return made
