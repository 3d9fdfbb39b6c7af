"""llmslim compare"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmslim.commands.common import show
from llmslim.errors import UserError
from llmslim.flags import Parser


def parser(prog: str) -> Parser:
    made = Parser(
        prog,
        "Lay runs side by side: size, quality and speed of each, and which of them no other beats in both size\n"
        "and quality, as a picture in the terminal and, with --html, on a page.",
        f"examples:\n  {prog} out/smol-4bit out/smol-3bit out/smol-pruned --html out/compared.html",
    )
    made.add_argument(
        "runs", metavar="RUN", nargs="*", help="the output folder of a run, with its report.json"
    )
    made.add_argument(
        "--html", metavar="FILE", help="also write a page with the table and pictures of size and speed"
    )
    return made


def run(options: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from llmslim.report.compare import HEADINGS, compare, comparison_page, text_plot

    found = compare(options.get("runs", []))
    page = Path(options["html"]) if "html" in options else None
    if page is not None and (page.suffix != ".html" or not page.parent.is_dir()):
        raise UserError(f"The page {page} cannot be written: give a .html file in a folder that is there.")
    grid = Table(box=None, pad_edge=False)
    for number, heading in enumerate(HEADINGS):
        words = number in (0, len(HEADINGS) - 1)
        grid.add_column(heading, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for index, line in enumerate(found.runs):
        grid.add_row(*map(escape, line.cells(index in found.best)))
    show(grid)
    print(f"\n{text_plot(found)}")
    for caveat in found.caveats:
        print(caveat)
    if page is not None:
        page.write_text(comparison_page(found), "utf-8")
        print(f"Saved to {page}.")
