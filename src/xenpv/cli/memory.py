"""``xenpv p2m``, ``walk`` and ``read``: into a saved domain's memory."""

from __future__ import annotations

import os
import sys
from typing import Any

import click
import numpy as np

from xenpv.cli.terminal import FILE, JSON, NUMBER, print_json, print_table, progress, size
from xenpv.domain.source import SavedDomain
from xenpv.errors import HostError, RequestError
from xenpv.frames import IS_POPULATED, NO_FRAME, PAGE_SIZE, Pfn, type_name
from xenpv.memory.pagetables import flag_names
from xenpv.stream.order import Guest

_READ_AT_ONCE = 1 << 20
_VCPU = click.option("--vcpu", default=0, show_default=True, metavar="N", help="Whose page tables to go through.")
_USER = click.option("--user", is_flag=True, help="The user half's page tables, which a 64-bit guest has apart.")
_CR3 = click.option("--top", type=NUMBER, metavar="PFN", help="Begin at this top table rather than at a vcpu's.")


def _open_pv(file: str) -> SavedDomain:
    with progress("reading") as bar:
        saved = SavedDomain.open(file, progress=bar)
    domain = saved.contents.domain
    if domain is None or domain.guest is not Guest.PV:
        saved.close()
        raise RequestError(
            f"{file}: an HVM domain; this needs a PV domain, whose page tables and p2m are in the stream"
        )
    return saved


def _top(saved: SavedDomain, vcpu: int, user: bool, top: int | None) -> Pfn:
    if top is not None:
        return Pfn(top)
    found = saved.cr3(vcpu, user=user)
    if found is None:
        have = ", ".join(str(n) for n in sorted(saved.contents.vcpus)) or "none"
        what = (
            "has no user page tables"
            if user and vcpu in saved.contents.vcpus
            else f"is not in the stream (has: {have})"
        )
        raise RequestError(f"{saved.name}: vcpu {vcpu} {what}")
    return found


@click.command()
@click.argument("target", metavar="DOM|FILE")
@click.option("--frames", is_flag=True, help="Of a file: list every frame of the p2m.")
@click.option("--lookup", type=NUMBER, multiple=True, metavar="PFN", help="The mfn of a pfn; may be repeated.")
@JSON
def p2m(target: str, frames: bool, lookup: tuple[int, ...], as_json: bool) -> None:
    """The p2m of a running domain or a saved one: its form, its extent, the frames that hold it.

    DOM is an id, a uuid or a name; what is a file, or "-", is taken as one. Machine frames in a save file are those
    of the host that saved; they are of use to understand that host's logs.
    """
    if target != "-" and not os.path.exists(target):
        from xenpv.cli.running import print_p2m  # noqa: PLC0415  opens Xen's libraries

        try:
            print_p2m(target, lookup, as_json)
        except HostError as e:
            raise RequestError(f"{target}: No such file or directory; and as a domain: {e}") from e
        return
    with _open_pv(target) as saved:
        description = _describe_p2m(saved, frames=frames or as_json, lookup=lookup)
        if as_json:
            print_json(description)
        else:
            _print_p2m(saved, description)


def _describe_p2m(saved: SavedDomain, *, frames: bool, lookup: tuple[int, ...]) -> dict[str, Any]:
    table, anchors = saved.p2m, saved.anchors
    counts = saved.contents.index.count()
    out: dict[str, Any] = {
        "form": str(anchors.form) if anchors else None,
        "entries": table.entries,
        "entries_per_frame": table.entries_per_frame,
        "frames": len(table.frames),
        "populated": sum(n for kind, n in counts.items() if IS_POPULATED[kind]),
    }
    out["holes"] = table.entries - out["populated"]
    if anchors is not None:
        out |= {
            "max_pfn": anchors.max_pfn,
            "frame_list_list_mfn": anchors.frame_list_list,
            "p2m_cr3": anchors.p2m_cr3,
            "p2m_vaddr": anchors.p2m_vaddr,
            "p2m_generation": anchors.p2m_generation,
        }
    if frames:
        out["frame_pfns"] = [None if pfn == NO_FRAME else int(pfn) for pfn in table.frames]
    if lookup:
        types = saved.frames.types(np.array(lookup, np.uint64))
        mfns = table.lookup(list(lookup))
        found = zip(lookup, mfns, types.tolist(), strict=True)
        out["lookup"] = [{"pfn": pfn, "mfn": mfn, "type": type_name(kind)} for pfn, mfn, kind in found]
    return out


def _print_p2m(saved: SavedDomain, d: dict[str, Any]) -> None:
    click.echo(click.style(f"{saved.name}: {d['form'] or 'no shared info, so the form is not known'}", bold=True))
    frames = f"{d['frames']} frames of {d['entries_per_frame']} entries"
    click.echo(f"  extent       pfns 0 to {d['entries'] - 1:#x} ({size(d['entries'] * PAGE_SIZE)}) in {frames}")
    click.echo(f"  populated    {d['populated']} pages, {d['holes']} holes")
    if "max_pfn" in d:
        click.echo(f"  max_pfn      {d['max_pfn']:#x} (a count)")
        click.echo(f"  tree         frame list list at mfn {d['frame_list_list_mfn']:#x} of the old host")
        if d["p2m_cr3"]:
            where = f"{d['p2m_vaddr']:#x}, cr3 {d['p2m_cr3']:#x} of the old host, generation {d['p2m_generation']}"
            click.echo(f"  list         at {where}")
    for i, pfn in enumerate(d.get("frame_pfns", [])):
        first = i * d["entries_per_frame"]
        span = f"pfns {first:#x} to {min(first + d['entries_per_frame'], d['entries']) - 1:#x}"
        click.echo(f"  frame {i:<6} pfn {pfn:#x}  {span}" if pfn is not None else f"  frame {i:<6} missing  {span}")
    for found in d.get("lookup", []):
        mfn = "INVALID_MFN" if found["mfn"] is None else f"{found['mfn']:#x}"
        click.echo(f"pfn={found['pfn']:#x} ==> mfn={mfn} (type {found['type']})")


@click.command()
@FILE
@click.argument("vaddr", type=NUMBER)
@_VCPU
@_USER
@_CR3
@JSON
def walk(file: str, vaddr: int, vcpu: int, user: bool, top: int | None, as_json: bool) -> int:
    """Walk a virtual address through the page tables, every entry shown.

    Exit status 1 when the walk ends before a page.
    """
    with _open_pv(file) as saved:
        way = saved.memory.walk(vaddr, top=_top(saved, vcpu, user, top))
        kinds = [saved.memory.type(step.table) for step in way.steps]
        if as_json:
            steps = [
                {"level": s.level, "table_pfn": s.table, "type": type_name(k), "entry": s.entry, "pte": s.pte,
                 "flags": flag_names(s.pte)}
                for s, k in zip(way.steps, kinds, strict=True)
            ]  # fmt: skip
            fault = None if way.fault is None else str(way.fault)
            print_json({"vaddr": vaddr, "steps": steps, "pfn": way.pfn, "fault": fault})
            return 0 if way.pfn is not None else 1
        rows = [
            [f"L{s.level}", f"{s.table:#x}", type_name(k), str(s.entry), f"{s.pte:#018x}", flag_names(s.pte)]
            for s, k in zip(way.steps, kinds, strict=True)
        ]
        print_table("", ["level", "table pfn", "type", "entry#", "pte", "flags"], rows)
        if way.pfn is None:
            click.echo(f"{vaddr:#x} is not mapped: {way.fault}")
            return 1
        kind = type_name(saved.memory.type(way.pfn))
        click.echo(f"{vaddr:#x} is pfn {way.pfn:#x} ({kind}), offset {vaddr % PAGE_SIZE:#x}")
        return 0


@click.command()
@FILE
@click.argument("address", type=NUMBER)
@click.argument("length", type=NUMBER)
@click.option("-p", "--physical", is_flag=True, help="ADDRESS is pseudo-physical: pfn * 4096 + offset.")
@click.option("--raw", is_flag=True, help="Write the bytes as they are.")
@_VCPU
@_USER
@_CR3
def read(
    file: str, address: int, length: int, physical: bool, raw: bool, vcpu: int, user: bool, top: int | None
) -> None:
    """Read memory at a virtual (or pseudo-physical) address, as hex or raw.

    \b
    xenpv read dom.save 0xffffffff81e00000 256
    xenpv read dom.save --physical 0x4a00000 4K --raw > page
    """
    with _open_pv(file) as saved:
        memory = saved.memory
        table = None if physical else _top(saved, vcpu, user, top)
        if raw and sys.stdout.isatty():
            raise RequestError("raw memory is not for a terminal: send it to a file or a pipe")
        for at in range(address, address + length, _READ_AT_ONCE):
            n = min(_READ_AT_ONCE, address + length - at)
            data = memory.read(at, n) if table is None else memory.read_virtual(at, n, top=table)
            if raw:
                sys.stdout.buffer.write(data)
            else:
                for line in _hex(at, data):
                    click.echo(line)


def _hex(address: int, data: bytes) -> list[str]:
    lines = []
    for i in range(0, len(data), 16):
        row = data[i : i + 16]
        text = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
        lines.append(f"{address + i:016x}  {row[:8].hex(' '):<23}  {row[8:].hex(' '):<23}  |{text}|")
    return lines
