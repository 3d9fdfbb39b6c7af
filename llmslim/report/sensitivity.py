"""The sensitivity of a model as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from llmslim.errors import UserError


def sensitivity_table(rows: list[dict[str, Any]], shares: tuple[float, ...]) -> Table:
    """One line per block: % of its outputs lost by a removal, alone, and after a refit of what stays."""
    table = Table(title="% of a block's output lost by a removal / when what stays is refitted")
    for heading in ("block", "influence", "cheapest head", "mean head"):
        table.add_column(
            heading, justify="left" if heading == "block" else "right", no_wrap=heading == "block"
        )
    for share in shares:
        table.add_column(f"{100 * share:g} % of channels", justify="right")
    for row in rows:
        heads = [
            (lost, refitted)
            for attention in row["heads"]
            for lost, refitted in zip(attention["lost"], attention["refitted"], strict=True)
        ]
        channels = [
            _both(
                _mean([one["lost"][i] for one in row["channels"]]),
                _mean([one["refitted"][i] for one in row["channels"]]),
            )
            if row["channels"]
            else "-"
            for i in range(len(shares))
        ]
        table.add_row(
            row["block"],
            f"{row['influence']:.3f}",
            _both(*min(heads)) if heads else "-",
            _both(_mean([lost for lost, _ in heads]), _mean([refitted for _, refitted in heads]))
            if heads
            else "-",
            *channels,
        )
    return table


def sensitivity_plot(rows: list[dict[str, Any]], shares: tuple[float, ...], path: Path) -> None:
    """Draw influence by block, heads by block, and channels by block; the file's ending says the kind (.svg, .png).

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, (blocks, heads, channels) = plt.subplots(
        1, 3, figsize=(15, max(3.0, 0.22 * len(rows) + 1)), layout="constrained"
    )
    blocks.barh(range(len(rows)), [row["influence"] for row in rows], color="#4c72b0")
    blocks.set(title="block influence (1 - cosine)", ylabel="block", ylim=(len(rows) - 0.5, -0.5))

    wide = max((sum(len(one["lost"]) for one in row["heads"]) for row in rows), default=0)
    grid = [[v for one in row["heads"] for v in one["refitted"]] for row in rows]
    grid = [line + [float("nan")] * (wide - len(line)) for line in grid]
    image = heads.imshow(
        [[100 * v for v in line] for line in grid], aspect="auto", cmap="viridis", interpolation="nearest"
    )
    heads.set(title="% of the attention's output lost by a head, others refitted", xlabel="query head")
    figure.colorbar(image, ax=heads)

    for index, share in enumerate(shares):
        lost = [
            100 * _mean([one["refitted"][index] for one in row["channels"]])
            if row["channels"]
            else float("nan")
            for row in rows
        ]
        channels.plot(lost, range(len(rows)), marker=".", label=f"{100 * share:g} % of channels")
    channels.set(
        title="% of the MLP's output lost, others refitted", ylim=(len(rows) - 0.5, -0.5), xscale="log"
    )
    channels.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("A plot needs matplotlib: pip install 'llmslim[plots]'.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _both(lost: float, refitted: float) -> str:
    return f"{100 * lost:.1f} / {100 * refitted:.1f}"
