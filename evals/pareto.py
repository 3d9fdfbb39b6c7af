"""The standing picture: bytes on disk against WikiText-2 perplexity, all methods and recipes measured so far.

python evals/pareto.py             draw evals/results/pareto.svg
python evals/pareto.py --list      print the points of the front, smallest first

A results file joins by having rows of the demo model with `size.bytes_on_disk` and, in `quality` or
`quality.wikitext`, a perplexity by the protocol that all share: float32, the first 16 windows of 512 tokens of
WikiText-2 test, the same tokens by their hash. Other rows and files are passed over.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import record
import variants

RESULTS = record.ROOT / "evals" / "results"
PROTOCOL = {
    "windows": 16,
    "seq_len": 512,
    "dtype": "float32",
    "data_hash": "5969b80f2c6119f549aac9eef74d5acc95d5c985c7f50c6e65b0167cfb1f3ff0",
}
LARGEST = 500.0  # perplexities above are drawn at the edge
BASE = "base, 16 bits"
WIDTH, HEIGHT, LINE = 9.5, 6.0, 13  # inches, inches, points between two labels


class Point(NamedTuple):
    """One measured row; `source` is the stem of its results file."""

    source: str
    name: str
    bytes: int
    perplexity: float


def points(folder: Path) -> list[Point]:
    """All rows of the results in a folder that can be compared, and the base itself; of several seeds the first."""
    found: list[Point] = []
    parameters, base = 0, None
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text("utf-8"))["rows"]:
            perplexity = comparable(row)
            if perplexity is None or variants.seeded(row["name"])[1] is not None:
                continue
            if row["name"] == "base":
                base = perplexity
            elif "bytes_on_disk" in row.get("size", {}):
                size = row["size"]["bytes_on_disk"] + row.get("adapter_bytes", 0)
                found.append(Point(path.stem, row["name"], size, perplexity))
                parameters = max(parameters, row["size"]["parameters"])  # a pruned model has fewer
    if base is not None and parameters:
        found.append(Point("base", BASE, 2 * parameters, base))
    return found


def comparable(row: dict[str, Any]) -> float | None:
    """The row's perplexity, if it is the demo model's by the shared protocol."""
    quality = row.get("quality") or {}
    quality = quality.get("wikitext", quality)
    model = row.get("options", {}).get("model", "demo")
    same = model == "demo" and all(quality.get(key) == value for key, value in PROTOCOL.items())
    return quality["perplexity"] if same else None


def front(found: list[Point]) -> list[Point]:
    """The points that no other is as small as and better than, smallest first."""
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (point.bytes, point.perplexity)):
        if not best or point.perplexity < best[-1].perplexity:
            best.append(point)
    return best


def draw(found: list[Point], path: Path) -> None:
    """One dot per point, coloured by results file; the front as a line, its points named."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullFormatter

    best = front(found)
    plt.rcParams["svg.hashsalt"] = "llmslim"  # the same points, the same bytes
    figure, axis = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    above = sum(point.perplexity > LARGEST for point in found)
    for number, source in enumerate(sorted({point.source for point in found} - {"base"})):
        rows = [point for point in found if point.source == source]
        for marker, label, some in (
            ("o", source, [point for point in rows if point.perplexity <= LARGEST]),
            ("^", None, [point for point in rows if point.perplexity > LARGEST]),
        ):
            axis.scatter(
                [point.bytes / 1e6 for point in some],
                [min(point.perplexity, LARGEST) for point in some],
                s=28,
                marker=marker,
                color=f"C{number}",
                alpha=0.8,
                linewidths=0,
                label=label,
                clip_on=False,
                zorder=3,
            )
    for point in found:
        if point.source == "base":
            axis.scatter(
                [point.bytes / 1e6], [point.perplexity], s=60, marker="*", color="black", label=BASE, zorder=4
            )
    steps_x, steps_y = [best[0].bytes / 1e6], [LARGEST]
    for point in best:  # what can be had at so many bytes: level until the next point
        steps_x += [point.bytes / 1e6] * 2
        steps_y += [steps_y[-1], min(point.perplexity, LARGEST)]
    axis.plot(steps_x, steps_y, color="black", linewidth=0.8, label="Pareto front", zorder=2)

    room = LINE * (len(best) + 1) / (72 * HEIGHT)  # of the height, for the names below the front
    lowest = best[-1].perplexity
    axis.set_yscale("log")
    axis.set_ylim(lowest * (lowest / LARGEST) ** (room / (1 - room)), LARGEST)
    axis.set_xlim(0, 1.04 * max(point.bytes for point in found) / 1e6)
    axis.yaxis.set_major_locator(FixedLocator([20, 30, 40, 50, 70, 100, 150, 200, 300, 500]))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%d"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(color="#dddddd", linewidth=0.5)
    axis.set(xlabel="MB on disk", ylabel="WikiText-2 perplexity (log scale)")
    title = "SmolLM2-135M: size against perplexity, 16 windows of 512 tokens"
    if above:
        title += f"\n▲ at the edge: {above} points above {LARGEST:g}"
    axis.set_title(title, loc="left", fontsize="medium")
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize="small")
    figure.canvas.draw()  # from here on the axes' place is settled
    _name(axis, best)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _name(axis: Any, best: list[Point]) -> None:
    """Name the points of the front to their lower left, where no point can be; names keep a line apart."""
    scale = 72 / axis.figure.dpi
    height = float("inf")
    for point in best:
        place = (point.bytes / 1e6, min(point.perplexity, LARGEST))
        at = axis.transData.transform(place)[1] * scale
        height = min(at - LINE, height - LINE)
        axis.annotate(
            f"{point.name}, {point.perplexity:.1f}",
            place,
            xytext=(-14, height - at),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize="small",
            arrowprops={
                "arrowstyle": "-",
                "relpos": (1, 0.5),
                "color": "#777777",
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 2,
            },
        )


def main(argv: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--list", action="store_true", help="print the front, and stop")
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--output", type=Path, help="of the picture (default: pareto.svg beside the results)")
    options = made.parse_args(argv)
    found = points(options.results)
    if options.list:
        for point in front(found):
            print(f"{point.bytes / 1e6:8.1f} MB {point.perplexity:10.2f}  {point.name} ({point.source})")
        return
    draw(found, options.output or options.results / "pareto.svg")


if __name__ == "__main__":
    main()
