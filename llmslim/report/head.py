"""The head of a model card: what the Hub would reject in it."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml


def card_problem(text: str) -> str | None:
    """What the Hub would reject in the head of a card, in words; None when nothing is known to be wrong."""
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if found is None:
        return "it does not begin with YAML between two lines of ---"
    try:
        head = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return f"its YAML cannot be read ({str(error).splitlines()[0]})"
    if not isinstance(head, dict):
        return "its YAML is not a mapping of fields"
    licenses = head.get("license", "other")
    for name in licenses if isinstance(licenses, list) else [licenses]:
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
            return f"license {name!r} is no identifier such as apache-2.0 or other"
    for key in ("tags", "base_model"):
        values = head.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str):
                return f"{key} holds {value!r}, which is not text"
            if key == "base_model" and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
                return f"base_model {value!r} is no name of a model on the Hub"
    return _index_problem(head.get("model-index", []))


def _index_problem(index: Any) -> str | None:
    try:
        for model in index:
            if not isinstance(model["name"], str):
                return f"model-index has the name {model['name']!r}, which is not text"
            for result in model["results"]:
                assert result["task"]["type"] and result["dataset"]["name"] and result["dataset"]["type"]
                for metric in result["metrics"]:
                    if not math.isfinite(metric["value"]):
                        return (
                            f"the {metric['type']} of its model-index is {metric['value']}, no finite number"
                        )
    except (KeyError, TypeError, AssertionError):
        return (
            "an entry of model-index lacks its name, task type, dataset name and type, or a metric's number"
        )
    return None
