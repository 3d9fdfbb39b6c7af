"""llmslim compare"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmslim.commands.common import show
from llmslim.errors import UserError
from llmslim.flags import Parser


def parser(prog: str) -> Parser:
    made = Parser(
        prog,
        "Lay runs side by side: size, quality, speed and task scores of each, and which of them no other beats\n"
        "in both size (or speed) and quality, as a picture in the terminal and, with --html, on a page, which\n"
        "has a picture for every pair of axes. Scores are those that `evaluate --tasks ... --save` kept.",
        f"examples:\n  {prog} out/smol-4bit out/smol-3bit out/smol-pruned --html out/compared.html\n"
        f"  {prog} out/smol-4bit out/smol-pruned --against decode --quality tasks",
    )
    made.add_argument(
        "runs", metavar="RUN", nargs="*", help="the output folder of a run, with its report.json"
    )
    made.add_argument(
        "--html", metavar="FILE", help="also write a page with the table and pictures of size and speed"
    )
    made.add_argument(
        "--against",
        metavar="bytes|decode|prefill",
        help="what quality is set against: bytes on disk, or tokens per second (default: bytes)",
    )
    made.add_argument(
        "--quality",
        metavar="perplexity|kl|tasks",
        help="perplexity, KL from the base, or the mean task score (default: the first that two runs have)",
    )
    return made


def run(options: dict[str, Any]) -> None:
    from llmslim.report.compare import compare, comparison_page
    from llmslim.report.runs import HEADINGS

    found = compare(options.get("runs", []), options.get("against", "bytes"), options.get("quality"))
    page = Path(options["html"]) if "html" in options else None
    if page is not None and (page.suffix != ".html" or not page.parent.is_dir()):
        raise UserError(f"The page {page} cannot be written: give a .html file in a folder that is there.")
    _show(HEADINGS, [line.cells(index in found.best) for index, line in enumerate(found.runs)])
    headings, scores = found.tasks
    if scores:
        print("\nscores on tasks")
        _show(headings, scores)
    print(f"\n{found.picture}")
    for caveat in found.caveats:
        print(caveat)
    if page is not None:
        page.write_text(comparison_page(found), "utf-8")
        print(f"Saved to {page}.")


def _show(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose figures stand to the right; names and words may take several lines."""
    from rich.markup import escape
    from rich.table import Table

    grid = Table(box=None, pad_edge=False)
    for heading in headings:
        words = heading in ("run", "made by")
        grid.add_column(heading, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for cells in rows:
        grid.add_row(*map(escape, cells))
    show(grid)
