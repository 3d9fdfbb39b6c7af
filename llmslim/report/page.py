"""The frame of a page that stands alone: its head and style, and small pieces of HTML. All text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root{--ink:#1b1f24;--dim:#59636e;--paper:#fff;--card:#f4f6f8;--line:#d5dae0;--c0:#3a6ea5;--c1:#c8772e;--c2:#4f8f5b;
--c3:#a04a7f;--c4:#7a7f87;--c5:#b3a033;--good:#1a7f37;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ed;--dim:#9aa4af;--paper:#14171a;--card:#1f2429;--line:#363d45;
--c0:#6fa3dc;--c1:#e39a56;--c2:#7cba87;--c3:#d081b0;--c4:#a2a8b0;--c5:#d6c45f;--good:#57c878;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:62rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--paper);overflow-wrap:anywhere}
h1{font-size:1.45rem;line-height:1.25;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}p{margin:.4rem 0}
.dim,figcaption{color:var(--dim);font-size:.9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.75rem;margin:1rem 0}
.card{background:var(--card);border-radius:.6rem;padding:.8rem 1rem}
.card h2{margin:0;font-size:.95rem;color:var(--dim);font-weight:600}
.card .big{font-size:1.6rem;font-weight:700;line-height:1.25}.good{color:var(--good)}.bad{color:var(--bad)}
.card p{margin:.15rem 0;font-size:.92rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{padding:.32rem .5rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;overflow-wrap:normal}
.t{overflow-wrap:anywhere}th{color:var(--dim);font-weight:600}.n{text-align:right;font-variant-numeric:tabular-nums}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1rem}
figure{margin:0}svg{width:100%;max-width:36rem;height:auto;display:block}
svg text{font:11px system-ui,sans-serif;fill:var(--dim)}
.axis{fill:none;stroke:var(--dim)}.grid{stroke:var(--line)}.frontier{fill:none;stroke:var(--c4);stroke-dasharray:4 3}
.c0{fill:var(--c0)}.c1{fill:var(--c1)}.c2{fill:var(--c2)}.c3{fill:var(--c3)}.c4{fill:var(--c4)}.c5{fill:var(--c5)}
.stack{display:flex;height:1.4rem;border-radius:.3rem;overflow:hidden;margin:.15rem 0 .6rem}
.stack i,.key i{display:block}.key i{display:inline-block;width:.8em;height:.8em;margin-right:.35em;border-radius:.15em}
.key span{margin-right:1rem;white-space:nowrap;display:inline-block}
.b0{background:var(--c0)}.b1{background:var(--c1)}.b2{background:var(--c2)}.b3{background:var(--c3)}.b4{background:var(--c4)}
.b5{background:var(--c5)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.6rem;margin:.4rem 0 1rem}
pre,.pair div{background:var(--card);border-radius:.4rem;padding:.6rem .8rem;margin:0;white-space:pre-wrap;
font:.85rem/1.45 ui-monospace,monospace}mark{background:none;color:var(--bad);font-weight:700}
code{font:.88em ui-monospace,monospace}
@media (max-width:34rem){th,td{padding:.28rem .25rem}table{font-size:.8rem}}
@media print{:root{--ink:#000;--dim:#444;--paper:#fff;--card:#f4f4f4;--line:#bbb;--c0:#3a6ea5;--c1:#c8772e;--c2:#4f8f5b;
--c3:#a04a7f;--good:#1a7f37;--bad:#b3261e}body{font-size:10.5pt;max-width:none;padding:0}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}figure,tr,.card,.pair{break-inside:avoid}
h2{break-after:avoid;margin-top:1.2rem}.scroll{overflow:visible}th,td{padding:.12rem .4rem}table,pre{font-size:9pt}
.cards{grid-template-columns:repeat(3,1fr)}.card .big{font-size:1.25rem}}
"""


def page(title: str, body: Sequence[str]) -> str:
    """A whole document; nothing in it is fetched from anywhere, and the policy in its head forbids it."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it; nothing when all of that is empty."""
    inside = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{inside}</section>" if inside else ""


def paragraph(text: str, style: str = "") -> str:
    return f"<p{_class(style)}>{escape(text)}</p>" if text else ""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of texts; the columns of `numbers` are set to the right."""
    if not rows:
        return ""

    def row(cells: Sequence[str], tag: str) -> str:
        made = (
            f'<{tag} class="n">{escape(cell if tag == "th" else _kept(cell))}</{tag}>'
            if index in numbers
            else f"<{tag}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return (
        f'<div class="scroll"><table><thead>{row(headings, "th")}</thead><tbody>{body}</tbody></table></div>'
    )


def _kept(cell: str) -> str:
    """A short figure and its unit stay on one line."""
    return cell.replace(" ", "\u00a0") if len(cell) <= 13 else cell


def figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>" if drawing else ""


def card(title: str, big: str, lines: Sequence[str], style: str = "") -> str:
    """One of the answers of the first screen."""
    told = "".join(paragraph(line) for line in lines if line)
    heading, big = f"<h2>{escape(title)}</h2>", big.replace(" %", "\u00a0%")
    return f'<div class="card">{heading}<div{_class(f"big {style}".strip())}>{escape(big)}</div>{told}</div>'


def listed(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def stack(parts: Sequence[tuple[str, float]], whole: float) -> str:
    """A bar of the parts [(class of colour, value)], as long as they are of the whole."""
    cells = "".join(
        f'<i class="{style}" style="width:{100 * value / whole:.3f}%"></i>' for style, value in parts
    )
    return f'<div class="stack">{cells}</div>'


def _class(style: str) -> str:
    return f' class="{style}"' if style else ""
