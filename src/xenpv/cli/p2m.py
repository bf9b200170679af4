"""``xenpv p2m``: which form, how large, what is in it."""

from __future__ import annotations

import sys
from typing import Any

import click
import numpy as np

from xenpv.cli.target import INDEX, PAUSE, TARGET, open_target
from xenpv.cli.terminal import JSON, NUMBER, print_json
from xenpv.frames import FOREIGN, IDENTITY, NO_FRAME, PAGE_SIZE, U64, type_name
from xenpv.memory.anchors import Anchors
from xenpv.memory.p2m import P2M
from xenpv.memory.survey import Kind, Survey, survey
from xenpv.source.domain import Domain
from xenpv.text import size

_CELLS = 64  # in a line of the map
_LINES = 16  # of the map, at most
_SHADES = " ░▒▓█"


@click.command()
@TARGET
@click.option("--lookup", type=NUMBER, multiple=True, metavar="PFN", help="Just the mfn of a pfn; again for more.")
@click.option(
    "--mfn", "mfns", type=NUMBER, multiple=True, metavar="MFN", help="Just the pfn of an mfn; again for more."
)
@click.option("--dump", is_flag=True, help="Every entry that is not INVALID_MFN, a line each.")
@click.option("--frames", is_flag=True, help="Every leaf: the frame that holds it, and the pfns in it.")
@INDEX
@PAUSE
@JSON
def p2m(
    target: str,
    lookup: tuple[int, ...],
    mfns: tuple[int, ...],
    dump: bool,
    frames: bool,
    pause: bool,
    as_json: bool,
) -> None:
    """The p2m of a running domain or a saved one: its form, its extent, what it holds, and a map of it.

    DOM is an id, a uuid or a name; what is a file, or "-", is taken as one. A running domain runs on meanwhile, unless
    --pause is given; if its p2m changed under us, that is said. Machine frames in a save file are those of the host
    that saved; they are of use to understand that host's logs.

    \b
    xenpv p2m web                       form, extent, and a map: each character a part of its pfns
    xenpv p2m web --lookup 0x1234 --mfn 0x83a120
    xenpv p2m dom.save --dump | grep …
    """
    with open_target(target, pause=pause) as domain:
        if dump:
            _dump(domain.p2m)
            return
        exposed = domain.has_p2m or domain.live is None  # a file without one is refused
        table = domain.p2m if exposed else None
        answers_only = bool(lookup or mfns) and not (frames or as_json)
        found = None if table is None or answers_only else survey(table, _CELLS * _LINES)
        described = describe(domain, table, found)
        if table is not None:
            if frames or as_json:
                described["frame_runs"] = [
                    {"first_pfn": first * table.per_leaf, "leaves": count, "frame": frame}
                    for first, count, frame in zip(*(a.tolist() for a in _runs(table)), strict=True)
                ]
            if lookup:
                described["lookup"] = _lookup(domain, table, lookup)
            if mfns:
                described["mfns"] = _reverse(domain, table, mfns)
        if domain.live is not None:
            described["changed"] = domain.live.changed()
    if as_json:
        print_json(described)
    else:
        print_p2m(described, found, answers_only=answers_only)


def _runs(table: P2M) -> tuple[Any, Any, Any]:
    return table.leaves.first, table.leaves.count, table.leaves.frame


def describe(domain: Domain, table: P2M | None, found: Survey | None) -> dict[str, Any]:
    """The p2m as plain values: its anchors, and what was found by them, if anything was."""
    anchors = domain.anchors
    running = domain.live is not None
    out: dict[str, Any] = {"name": domain.name, "running": running, "form": anchors.form_names if anchors else None}
    if anchors is not None:
        out |= _anchors(anchors)
    if table is None or found is None:
        return out
    distinct = table.distinct
    return out | {
        "entries": table.entries,
        "entries_per_leaf": table.per_leaf,
        "leaves": len(distinct),
        "places": int(distinct.count.sum()),
        "shared": int(np.count_nonzero(distinct.count > 1)),
        "populated": found.pages[Kind.OWN],
        **{kind.name.lower(): found.pages[kind] for kind in list(Kind)[1:]},
        "map": {"cell_pfns": found.cell, "populated": found.cells.tolist()},
    }


def _anchors(anchors: Anchors) -> dict[str, Any]:
    return {
        "forms": [root.name for root in anchors.roots],
        "max_pfn": anchors.max_pfn,
        "frame_list_list_mfn": anchors.frame_list_list,
        "p2m_cr3": anchors.p2m_cr3,
        "p2m_vaddr": anchors.p2m_vaddr,
        "p2m_generation": anchors.p2m_generation,
        "p2m_levels": anchors.p2m_levels,
        "p2m_root_mfn": anchors.p2m_root,
    }


def _lookup(domain: Domain, table: P2M, pfns: tuple[int, ...]) -> list[dict[str, Any]]:
    wanted = np.array(pfns, np.uint64)
    found = zip(pfns, table.lookup(wanted).tolist(), _types(domain, wanted), strict=True)
    return [{"pfn": pfn, "mfn": None if mfn == int(NO_FRAME) else mfn, "type": kind} for pfn, mfn, kind in found]


def _reverse(domain: Domain, table: P2M, mfns: tuple[int, ...]) -> list[dict[str, Any]]:
    wanted = np.array(mfns, np.uint64)
    pfns = table.pfns_of(wanted) if domain.live is None else domain.live.host.m2p(wanted)
    back = table.lookup(pfns)
    return [
        {"mfn": mfn, "pfn": None if pfn == int(NO_FRAME) else pfn, "entry": None if entry == int(NO_FRAME) else entry}
        for mfn, pfn, entry in zip(mfns, pfns.tolist(), back.tolist(), strict=True)
    ]


def _types(domain: Domain, pfns: U64) -> list[str]:
    return [type_name(page_type) for page_type in domain.frames.types(pfns).tolist()]


def _dump(table: P2M) -> None:
    """As xen-mfndump's dump-p2m has it, without a hypercall for each page."""
    click.echo(f"Guest width: {table.width}, p2m size: {table.entries:#x}")
    for leaves in table.content():
        for first, times, row in zip(leaves.first.tolist(), leaves.times.tolist(), leaves.mfns, strict=True):
            entries = np.flatnonzero(row != NO_FRAME)
            if times > 1 and len(entries):
                click.echo(f"  # the leaf of the next {len(entries)} lines stands in {times} places")
            pfns = first * table.per_leaf + entries
            lines = (
                f"  pfn={p:#x} ==> mfn={_entry(m)}\n" for p, m in zip(pfns.tolist(), row[entries].tolist(), strict=True)
            )
            sys.stdout.write("".join(lines))


def _entry(mfn: int | None) -> str:
    if mfn is None:
        return "INVALID_MFN"
    for mark, name in ((int(FOREIGN), "foreign"), (int(IDENTITY), "identity")):
        if mfn & mark:
            return f"{mfn & ~int(FOREIGN | IDENTITY):#x} ({name})"
    return f"{mfn:#x}"


def print_p2m(d: dict[str, Any], found: Survey | None, *, answers_only: bool = False) -> None:
    form = d["form"] or "no shared info, so the form is not known"
    click.echo(click.style(f"{d['name']}: {'exposes no p2m' if form == 'none' else form}", bold=True))
    whose = "" if d["running"] else " of the old host"
    if found is not None:
        leaves = f"{d['leaves']} leaves of {d['entries_per_leaf']} entries in {d['places']} places"
        click.echo(
            f"  entries      pfns 0 to {d['entries'] - 1:#x} ({size(d['entries'] * PAGE_SIZE)}), {leaves}", nl=False
        )
        click.echo(f"; {d['shared']} leaves shared by several" if d["shared"] else "")
        kinds = f"{d['invalid']} INVALID_MFN, {d['foreign']} foreign, {d['identity']} identity, {d['hole']} in no leaf"
        click.echo(f"  populated    {d['populated']} pages ({size(d['populated'] * PAGE_SIZE)}); {kinds}")
    if "max_pfn" in d and not answers_only:
        click.echo(f"  max_pfn      {d['max_pfn']:#x} (a count)")
        click.echo(f"  tree         frame list list at mfn {d['frame_list_list_mfn']:#x}{whose}")
        if d["p2m_cr3"]:
            where = f"{d['p2m_vaddr']:#x}, cr3 {d['p2m_cr3']:#x}{whose}, generation {d['p2m_generation']}"
            click.echo(f"  list         at {where}")
        if d["p2m_levels"]:
            click.echo(
                f"  rooted       {d['p2m_levels']} levels below mfn {d['p2m_root_mfn']:#x}{whose} (proposed ABI)"
            )
    if found is not None and len(found.cells):
        _draw(found, d["entries"])
    for run in d.get("frame_runs", []):
        last = min(run["first_pfn"] + run["leaves"] * d["entries_per_leaf"], d["entries"]) - 1
        unit = "mfn" if d["running"] else "pfn"
        click.echo(f"  leaf at {unit} {run['frame']:#x}  pfns {run['first_pfn']:#x} to {last:#x}")
    for one in d.get("lookup", []):
        click.echo(f"pfn={one['pfn']:#x} ==> mfn={_entry(one['mfn'])} (type {one['type']})")
    for one in d.get("mfns", []):
        pfn = "no pfn" if one["pfn"] is None else f"pfn={one['pfn']:#x}"
        agrees = "" if one["pfn"] is None or one["entry"] == one["mfn"] else f", whose entry is {_entry(one['entry'])}"
        click.echo(f"mfn={one['mfn']:#x} ==> {pfn}{agrees}")
    if d.get("changed"):
        click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {d['changed']}")


def _draw(found: Survey, entries: int) -> None:
    """A line for each _CELLS cells: what part of each is populated. Lines without any are left out."""
    of = np.minimum(found.cell, entries - np.arange(len(found.cells)) * found.cell)
    shade = np.ceil(found.cells * (len(_SHADES) - 1) / of).astype(np.int64)  # a single page is seen
    click.echo(f"  map          {size(found.cell * PAGE_SIZE)} each: ░ up to ¼ of it populated, ▒ ½, ▓ ¾, █ more")
    skipped = False
    for i in range(0, len(shade), _CELLS):
        row = shade[i : i + _CELLS]
        if not row.any():
            skipped = True
            continue
        if skipped:
            click.echo("               …")
        skipped = False
        click.echo(f"  {i * found.cell:#12x} │{''.join(_SHADES[s] for s in row)}│")
    if skipped:
        click.echo("               …")
