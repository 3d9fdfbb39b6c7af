"""The pictures of `kv_cache.py --plot`: caches along a text and by its length, and needles that are found."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

Rows = dict[str, dict[str, Any]]


def rows_of(result: dict[str, Any], what: str) -> Rows:
    """Kind of cache -> its row, of what was measured."""
    named = ((row["name"].partition("/"), row) for row in result["rows"])
    return {kind: row for (first, _, kind), row in named if first == what}


def curves(result: dict[str, Any], path: Path) -> None:
    """Three panels: KL divergence along the text, bytes and time per token by length; a line per kind of cache."""
    plt = _pyplot()
    along = {kind: row for kind, row in rows_of(result, "quality").items() if "kl_by_position" in row}
    lengths = rows_of(result, "length")
    kinds = list(lengths) or list(along)
    if not kinds:
        return
    colours = {kind: f"C{number}" for number, kind in enumerate(kinds)}
    figure, (kl, memory, time) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for kind in kinds:
        if kind in along:
            values = along[kind]["kl_by_position"]
            ends = [(number + 1) * 2048 // len(values) for number in range(len(values))]
            shown = [(end, value) for end, value in zip(ends, values, strict=True) if value > 0]
            kl.plot(*zip(*shown, strict=True), marker=".", color=colours[kind], label=kind)
        if kind in lengths:
            row = lengths[kind]
            held = [count / 1e6 for count in row["bytes"]]
            memory.plot(row["lengths"], held, marker=".", color=colours[kind], label=kind)
            time.plot(row["lengths"], row["ms"], marker=".", color=colours[kind])
    if lengths:
        row = next(iter(lengths.values()))
        memory.plot(row["lengths"], [count / 1e6 for count in row["full_bytes"]], "k.-", label="full")
        usual = [
            statistics.median(one["full_ms"][index] for one in lengths.values())
            for index in range(len(row["lengths"]))
        ]
        time.plot(row["lengths"], usual, "k.-")
    kl.set(
        title="KL from the full cache",
        xlabel="tokens read so far",
        ylabel="nats, mean of 256 tokens",
        yscale="log",
    )
    memory.set(title="Memory of the cache", xlabel="tokens in the cache", ylabel="MB", ylim=(0, None))
    time.set(title="Decoding", xlabel="tokens in the cache", ylabel="ms per token, one core", ylim=(0, None))
    for panel in (kl, memory, time):
        panel.grid(color="#dddddd", linewidth=0.5)
    handles, names = (memory if lengths else kl).get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    _save(figure, path)


def heat_maps(result: dict[str, Any], path: Path) -> None:
    """One panel per kind of cache: how likely a right digit is by depth and length, and how many answers are exact."""
    plt = _pyplot()
    found = rows_of(result, "needle")
    if not found:
        return
    columns = min(3, len(found))
    lines = math.ceil(len(found) / columns)
    figure, panels = plt.subplots(
        lines,
        columns,
        figsize=(4 * columns, 0.6 + 2.6 * lines),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    image = None
    for panel, (kind, row) in zip(panels.flat, found.items(), strict=False):
        likely = [[math.exp(one) for one in line] for line in zip(*row["logprob"], strict=True)]  # by depth
        image = panel.imshow(likely, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        asked = len(row["numbers"])
        for x, line in enumerate(row["exact"]):
            for y, share in enumerate(line):
                colour = "white" if likely[y][x] > 0.6 else "black"
                answers = f"{round(share * asked)}/{asked}"
                panel.text(x, y, answers, ha="center", va="center", fontsize="small", color=colour)
        panel.set_xticks(range(len(row["lengths"])), [f"{length:,}" for length in row["lengths"]])
        panel.set_yticks(range(len(row["depths"])), [f"{depth:.0%}" for depth in row["depths"]])
        panel.set_title(kind)
    for panel in panels.flat[len(found) :]:
        panel.set_axis_off()
    figure.supxlabel("tokens of the text", fontsize="medium")
    figure.supylabel("depth of the number in it", fontsize="medium")
    figure.colorbar(image, ax=panels, label="probability of a right digit")
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "llmslim"  # the same figures, the same bytes
    return plt


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
