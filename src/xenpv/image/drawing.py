"""Draws a plan as SVG: pseudo-physical memory beside its virtual addresses.

Heights are logarithmic, so one page is visible beside a terabyte. The picture has colours for light and dark
backgrounds, and needs no other file.
"""

from __future__ import annotations

from itertools import pairwise
from math import log2
from xml.sax.saxutils import escape

from xenpv.abi.x86 import PAGE_SIZE
from xenpv.image.layout import Layout, Part, Segment

_WIDTH, _TOP = 900, 92
_LEFT, _RIGHT, _COLUMN = 110, 520, 230  # x of the two columns, and their width
_BREAK = 26  # height of a gap between two mappings

# Colour-blind readers can tell these hues apart. Free and empty parts have no colour.
_COLOURS = {
    Part.KERNEL: "#4c78c8",
    Part.RAMDISK: "#8a63b8",
    Part.P2M: "#d8862b",
    Part.P2M_TABLES: "#c04e4e",
    Part.TABLES: "#c04e4e",
    Part.START_INFO: "#2f9e8f",
    Part.XENSTORE: "#2f9e8f",
    Part.CONSOLE: "#2f9e8f",
    Part.STACK: "#5f9e3a",
}

# Light colours first, since some SVG viewers know neither media queries nor variables.
_STYLE = """
text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#1c1f24}rect{stroke:#fff}
.t{font-size:16px;font-weight:600}.s{fill:#69707a}.e{text-anchor:end}.p{fill:#fff}.n{fill:#dfe3e8}.l{opacity:.25}
@media (prefers-color-scheme:dark){text{fill:#e8eaed}rect{stroke:#15181d}
.s{fill:#98a0aa}.p{fill:#15181d}.n{fill:#343a43}}
.i{fill:#fff}
"""


def height(pages: int) -> float:
    """Return the height of a block of pages, in pixels: three more for each doubling."""
    return 17 + 3 * log2(pages)


def svg(layout: Layout, title: str) -> str:
    """Return the picture as an XML document.

    Characters of ``title`` that XML cannot hold become "?".
    """
    body, pfn_y = [], {}
    y = float(_TOP)
    for segment in layout.segments:
        pfn_y[segment] = y
        body += _block(segment, _LEFT, y)
        body.append(_text(_LEFT - 8, y + 13, f"{segment.first:#x}", "s e"))
        y += height(segment.pages)
    body.append(_text(_LEFT - 8, y + 4, f"{layout.segments[-1].pfns.stop:#x}", "s e"))
    bottom = y
    links, y = [], float(_TOP)
    mapped = sorted((s for s in layout.segments if s.vaddr is not None), key=_vaddr)
    for segment, after in [*pairwise(mapped), (mapped[-1], None)]:
        links.append(_link(segment, pfn_y[segment], y))
        body += _block(segment, _RIGHT, y)
        body.append(_text(_RIGHT + _COLUMN + 8, y + 13, f"{_vaddr(segment):#x}", "s"))
        y += height(segment.pages)
        end = _vaddr(segment) + segment.pages * PAGE_SIZE
        if after is None or end != _vaddr(after):
            body.append(_text(_RIGHT + _COLUMN + 8, y + 4, f"{end:#x}", "s"))
            body.append(_text(_RIGHT + _COLUMN / 2 - 40, y + 18, "not mapped", "s"))
            y += _BREAK
    full = max(bottom, y) + 24
    head = [
        _text(20, 30, title, "t"),
        _text(20, 50, f"{layout.nr_pages:#x} pages, {layout.width * 8}-bit; heights are logarithmic", "s"),
        _text(_LEFT, _TOP - 10, "memory, by pfn"),
        _text(_LEFT + _COLUMN, _TOP - 10, "pages", "s e"),
        _text(_RIGHT, _TOP - 10, "addresses, by vaddr"),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {full:.0f}" width="{_WIDTH}" role="img">',
            f"<title>{_clean(title)}</title><style>{_STYLE}</style>",
            '<rect width="100%" height="100%" class="p"/>',
            *head,
            *links,
            *body,
            "</svg>\n",
        ]
    )


def _vaddr(segment: Segment) -> int:
    assert segment.vaddr is not None
    return segment.vaddr


def _block(segment: Segment, x: float, y: float) -> list[str]:
    colour = _COLOURS.get(segment.part)
    fill = f'style="fill:{colour}"' if colour else 'class="n"'
    name = f"L{segment.level} {segment.part}" if segment.level else str(segment.part)
    return [
        f'<rect x="{x}" y="{y:.1f}" width="{_COLUMN}" height="{height(segment.pages):.1f}" {fill}/>',
        _text(x + 8, y + 13, name, "i" if colour else ""),
        _text(x + _COLUMN - 8, y + 13, f"{segment.pages:#x}", "i e" if colour else "e"),
    ]


def _link(segment: Segment, pfn_y: float, vaddr_y: float) -> str:
    """Return the band from a segment's pfns to its addresses.

    ``pfn_y`` and ``vaddr_y`` are the upper edges of its two blocks.
    """
    a, b, deep = _LEFT + _COLUMN, _RIGHT, height(segment.pages)
    points = f"{a},{pfn_y:.1f} {b},{vaddr_y:.1f} {b},{vaddr_y + deep:.1f} {a},{pfn_y + deep:.1f}"
    colour = _COLOURS.get(segment.part)
    fill = f'style="fill:{colour}" class="l"' if colour else 'class="n l"'
    return f'<polygon points="{points}" {fill}/>'


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.1f}" class="{style}">{_clean(text)}</text>'


def _clean(text: str) -> str:
    return escape("".join(c if c.isprintable() else "?" for c in text))
