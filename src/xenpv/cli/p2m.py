"""``xenpv p2m``: a domain's p2m: its form, anchors, entries and a map."""

from __future__ import annotations

import sys
from typing import Any

import click
import numpy as np

from xenpv.cli.target import INDEX, PAUSE, TARGET, open_target
from xenpv.cli.terminal import JSON, NUMBER, print_field, print_json
from xenpv.frames import FOREIGN, IDENTITY, NO_FRAME, PAGE_SIZE, type_name
from xenpv.memory.p2m_anchors import Anchors
from xenpv.memory.p2m_reader import P2M
from xenpv.memory.p2m_survey import EntryKind, Survey, survey
from xenpv.source.domain import Domain
from xenpv.text import printable, size

_CELLS_PER_LINE = 64  # of the map
_LINES = 16  # of the map, at most
_SHADES = " ░▒▓█"


@click.command()
@TARGET
@click.option(
    "--lookup", "pfns", type=NUMBER, multiple=True, metavar="PFN", help="Print the mfn of this pfn only (repeatable)."
)
@click.option(
    "--mfn", "mfns", type=NUMBER, multiple=True, metavar="MFN", help="Print the pfn of this mfn only (repeatable)."
)
@click.option("--dump", is_flag=True, help="Print every entry that is not INVALID_MFN, one per line.")
@click.option("--frames", is_flag=True, help="Print every leaf: the frame that holds it, and its pfns.")
@INDEX
@PAUSE
@JSON
def p2m(
    target: str,
    pfns: tuple[int, ...],
    mfns: tuple[int, ...],
    dump: bool,
    frames: bool,
    pause: bool,
    as_json: bool,
) -> None:
    """Show a domain's p2m: its form, its anchors, its entries and their map.

    DOM is an id, a uuid or a name. A running domain keeps running unless --pause is given; a warning tells if its p2m
    changed meanwhile. Machine frames in a save file are those of the host that saved it.

    \b
    Examples:
      xenpv p2m web
      xenpv p2m web --lookup 0x1234 --mfn 0x83a120
      xenpv p2m dom.save --dump | grep foreign
      xenpv p2m --frames dom.save
    """
    with open_target(target, pause=pause) as domain:
        if dump:
            _print_entries(domain.p2m)
            return
        exposed = domain.has_p2m or domain.live is None  # for a file without a p2m, domain.p2m raises
        table = domain.p2m if exposed else None
        answers_only = bool(pfns or mfns) and not (frames or as_json)
        content = None if table is None or answers_only else survey(table, _CELLS_PER_LINE * _LINES)
        facts = describe(domain, table, content)
        if table is not None:
            if frames or as_json:
                facts["frame_runs"] = [
                    {"first_pfn": first * table.entries_per_leaf, "leaves": count, "frame": frame}
                    for first, count, frame in zip(*_leaf_runs(table), strict=True)
                ]
            if pfns:
                facts["lookup"] = _describe_pfns(domain, table, pfns)
            if mfns:
                facts["mfns"] = _describe_mfns(domain, table, mfns)
        if domain.live is not None:
            change = domain.live.p2m_change()
            facts["changed"] = None if change is None else change.message
    if as_json:
        print_json(facts)
    else:
        print_p2m(facts, content, answers_only=answers_only)


def _leaf_runs(table: P2M) -> tuple[list[int], list[int], list[int]]:
    """Return the runs of leaves: first leaf, number of leaves, first frame."""
    return table.leaves.first.tolist(), table.leaves.count.tolist(), table.leaves.frame.tolist()


def describe(domain: Domain, table: P2M | None, content: Survey | None) -> dict[str, Any]:
    """Return the description that --json prints.

    It has the anchors, and the content if there is a survey of it.
    """
    anchors = domain.anchors
    running = domain.live is not None
    out: dict[str, Any] = {"name": domain.name, "running": running, "form": anchors.form_names if anchors else None}
    if anchors is not None:
        out |= _describe_anchors(anchors)
    if table is None or content is None:
        return out
    distinct = table.distinct_leaves
    return out | {
        "entries": table.entries,
        "entries_per_leaf": table.entries_per_leaf,
        "leaves": len(distinct),
        "places": int(distinct.count.sum()),
        "shared": int(np.count_nonzero(distinct.count > 1)),
        "populated": content.pages[EntryKind.LOCAL],
        **{kind.name.lower(): content.pages[kind] for kind in list(EntryKind)[1:]},
        "map": {"cell_pfns": content.cell_pfns, "populated": content.local_pages.tolist()},
    }


def _describe_anchors(anchors: Anchors) -> dict[str, Any]:
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


def _describe_pfns(domain: Domain, table: P2M, pfns: tuple[int, ...]) -> list[dict[str, Any]]:
    """Describe the entry and the page type of each pfn."""
    array = np.array(pfns, np.uint64)
    rows = zip(pfns, table.lookup(array).tolist(), domain.frames.types(array).tolist(), strict=True)
    return [{"pfn": pfn, "mfn": _none_if_no_frame(mfn), "type": type_name(page_type)} for pfn, mfn, page_type in rows]


def _describe_mfns(domain: Domain, table: P2M, mfns: tuple[int, ...]) -> list[dict[str, Any]]:
    """Describe the pfn of each mfn, and that pfn's entry in the p2m.

    The pfn is from Xen's m2p if the domain runs.
    """
    array = np.array(mfns, np.uint64)
    pfns = table.pfns_of(array) if domain.live is None else domain.live.host.m2p(array)
    rows = zip(mfns, pfns.tolist(), table.lookup(pfns).tolist(), strict=True)
    return [{"mfn": mfn, "pfn": _none_if_no_frame(pfn), "entry": _none_if_no_frame(entry)} for mfn, pfn, entry in rows]


def _none_if_no_frame(frame: int) -> int | None:
    return None if frame == int(NO_FRAME) else frame


def _print_entries(table: P2M) -> None:
    """Print every entry in the format of xen-mfndump dump-p2m."""
    click.echo(f"Guest width: {table.width}, p2m size: {table.entries:#x}")
    for leaves in table.iter_leaves():
        for first, times, row in zip(
            leaves.first_place.tolist(), leaves.place_count.tolist(), leaves.mfns, strict=True
        ):
            entries = np.flatnonzero(row != NO_FRAME)
            if times > 1 and len(entries):
                click.echo(f"  # the next {len(entries)} lines are one leaf that is used {times} times")
            pfns = first * table.entries_per_leaf + entries
            pairs = zip(pfns.tolist(), row[entries].tolist(), strict=True)
            lines = (f"  pfn={pfn:#x} ==> mfn={_format_entry(mfn)}\n" for pfn, mfn in pairs)
            sys.stdout.write("".join(lines))


def _format_entry(mfn: int | None) -> str:
    """Format an entry, with its flag by name."""
    if mfn is None:
        return "INVALID_MFN"
    for flag, name in ((int(FOREIGN), "foreign"), (int(IDENTITY), "identity")):
        if mfn & flag:
            return f"{mfn & ~int(FOREIGN | IDENTITY):#x} ({name})"
    return f"{mfn:#x}"


def print_p2m(facts: dict[str, Any], content: Survey | None, *, answers_only: bool = False) -> None:
    """Print what describe() returned, and the map of the content.

    ``answers_only`` leaves out the anchors.
    """
    form = facts["form"] or "form unknown: there is no shared info"
    click.echo(click.style(f"{facts['name']}: {'exposes no p2m' if form == 'none' else form}", bold=True))
    host = "" if facts["running"] else " of the old host"
    if content is not None:
        entries = f"pfns 0 to {facts['entries'] - 1:#x} ({size(facts['entries'] * PAGE_SIZE)})"
        leaves = f"{facts['leaves']} leaves of {facts['entries_per_leaf']} entries in {facts['places']} places"
        shared = f"; used more than once: {facts['shared']}" if facts["shared"] else ""
        print_field("entries", f"{entries}, {leaves}{shared}")
        pages = f"{facts['populated']} pages ({size(facts['populated'] * PAGE_SIZE)})"
        marked = f"{facts['invalid']} INVALID_MFN, {facts['foreign']} foreign, {facts['identity']} identity"
        print_field("populated", f"{pages}; {marked}, {facts['hole']} in no leaf")
    if "max_pfn" in facts and not answers_only:
        _print_anchors(facts, host)
    if content is not None and len(content.local_pages):
        _print_map(content, facts["entries"])
    for run in facts.get("frame_runs", []):
        last = min(run["first_pfn"] + run["leaves"] * facts["entries_per_leaf"], facts["entries"]) - 1
        unit = "mfn" if facts["running"] else "pfn"
        click.echo(f"  leaf at {unit} {run['frame']:#x}  pfns {run['first_pfn']:#x} to {last:#x}")
    for entry in facts.get("lookup", []):
        click.echo(f"pfn={entry['pfn']:#x} ==> mfn={_format_entry(entry['mfn'])} (type {entry['type']})")
    for entry in facts.get("mfns", []):
        pfn = "no pfn" if entry["pfn"] is None else f"pfn={entry['pfn']:#x}"
        agrees = entry["pfn"] is None or entry["entry"] == entry["mfn"]
        click.echo(
            f"mfn={entry['mfn']:#x} ==> {pfn}" + ("" if agrees else f", whose entry is {_format_entry(entry['entry'])}")
        )
    if facts.get("changed"):
        click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {printable(facts['changed'])}")


def _print_anchors(facts: dict[str, Any], host: str) -> None:
    print_field("max_pfn", f"{facts['max_pfn']:#x} (a count)")
    print_field("tree", f"frame list list at mfn {facts['frame_list_list_mfn']:#x}{host}")
    if facts["p2m_cr3"]:
        cr3 = f"cr3 {facts['p2m_cr3']:#x}{host}"
        print_field("list", f"at {facts['p2m_vaddr']:#x}, {cr3}, generation {facts['p2m_generation']}")
    if facts["p2m_levels"]:
        root = f"mfn {facts['p2m_root_mfn']:#x}{host}"
        print_field("rooted", f"{facts['p2m_levels']} levels below {root} (proposed ABI)")


def _print_map(content: Survey, entries: int) -> None:
    """Print how much of each cell is populated, ``_CELLS_PER_LINE`` in a line.

    Lines without any are left out.
    """
    pfns = np.minimum(
        content.cell_pfns, entries - np.arange(len(content.local_pages)) * content.cell_pfns
    )  # the last may be shorter
    shades = np.ceil(content.local_pages * (len(_SHADES) - 1) / pfns).astype(np.int64)  # even a single page shows
    print_field("map", f"{size(content.cell_pfns * PAGE_SIZE)} each: ░ up to ¼ populated, ▒ ½, ▓ ¾, █ more")
    skipped = False
    for i in range(0, len(shades), _CELLS_PER_LINE):
        row = shades[i : i + _CELLS_PER_LINE]
        if not row.any():
            skipped = True
            continue
        if skipped:
            click.echo("               …")
        skipped = False
        click.echo(f"  {i * content.cell_pfns:#12x} │{''.join(_SHADES[shade] for shade in row)}│")
    if skipped:
        click.echo("               …")
