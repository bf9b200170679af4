"""``xenpv walk`` and ``read``: into a domain's memory, running or saved."""

from __future__ import annotations

import sys

import click

from xenpv.cli.target import INDEX, PAUSE, TARGET, Domain, opened
from xenpv.cli.terminal import JSON, NUMBER, print_json, print_table
from xenpv.errors import Fault, RequestError
from xenpv.frames import IS_TABLE, PAGE_SIZE, Pfn, type_name
from xenpv.memory.pagetables import flag_names
from xenpv.source.live import LiveDomain

_READ_AT_ONCE = 1 << 20
_VCPU = click.option("--vcpu", default=0, show_default=True, metavar="N", help="Whose page tables to go through.")
_USER = click.option("--user", is_flag=True, help="The user half's page tables, which a 64-bit guest has apart.")
_CR3 = click.option("--top", type=NUMBER, metavar="PFN", help="Begin at this top table rather than at a vcpu's.")


def _tries(domain: Domain) -> int:
    """How often to go through page tables: those of a process of a running domain may end while we do."""
    return 4 if isinstance(domain, LiveDomain) else 1


def _top(domain: Domain, vcpu: int, user: bool, top: int | None) -> Pfn:
    if top is not None:
        return Pfn(top)
    found = domain.cr3(vcpu, user=user)
    if found is None:
        have = ", ".join(str(n) for n in domain.vcpus) or "none"
        what = (
            "has no user page tables" if user and vcpu in domain.vcpus else f"is not there, or never ran (has: {have})"
        )
        raise RequestError(f"{domain.name}: vcpu {vcpu} {what}")
    return found


@click.command()
@TARGET
@click.argument("vaddr", type=NUMBER)
@_VCPU
@_USER
@_CR3
@INDEX
@PAUSE
@JSON
def walk(target: str, vaddr: int, vcpu: int, user: bool, top: int | None, pause: bool, as_json: bool) -> int:
    """Walk a virtual address through a domain's page tables, every entry shown: running (DOM) or saved (FILE).

    Entries are shown with pfns in the place of mfns. Exit status 1 when the walk ends before a page.
    """
    with opened(target, pause=pause, hvm=True) as domain:
        memory = domain.memory_of(vcpu)
        for _ in range(_tries(domain)):
            way = memory.walk(vaddr, top=_top(domain, vcpu, user, top))
            kinds = [memory.type(step.table) for step in way.steps]
            # It ended in an entry, not at a table that is gone. What still is a page table was one when it was walked;
            # only PV domains' pages are known to be some.
            last = way.steps[-1].level if way.steps else 0
            if last == (way.fault.level if way.fault else 1) and (domain.hvm or IS_TABLE[kinds].all()):
                break
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
        kind = type_name(memory.type(way.pfn))
        click.echo(f"{vaddr:#x} is pfn {way.pfn:#x} ({kind}), offset {vaddr % PAGE_SIZE:#x}")
        return 0


@click.command()
@TARGET
@click.argument("address", type=NUMBER)
@click.argument("length", type=NUMBER)
@click.option("-p", "--physical", is_flag=True, help="ADDRESS is pseudo-physical: pfn * 4096 + offset.")
@click.option("--raw", is_flag=True, help="Write the bytes as they are.")
@_VCPU
@_USER
@_CR3
@INDEX
@PAUSE
def read(
    target: str,
    address: int,
    length: int,
    physical: bool,
    raw: bool,
    vcpu: int,
    user: bool,
    top: int | None,
    pause: bool,
) -> None:
    """Read memory at a virtual (or pseudo-physical) address, as hex or raw.

    \b
    xenpv read dom.save 0xffffffff81e00000 256
    xenpv read web 0xffffffff81e00000 256           a running domain, by its name, id or uuid
    xenpv read dom.save --physical 0x4a00000 4K --raw > page
    """
    with opened(target, pause=pause, hvm=True) as domain:
        memory = domain.memory_of(vcpu)
        if raw and sys.stdout.isatty():
            raise RequestError("raw memory is not for a terminal: send it to a file or a pipe")
        for at in range(address, address + length, _READ_AT_ONCE):
            n = min(_READ_AT_ONCE, address + length - at)
            for left in reversed(range(_tries(domain))):
                try:
                    table = None if physical else _top(domain, vcpu, user, top)
                    data = memory.read(at, n) if table is None else memory.read_virtual(at, n, top=table)
                    break
                except Fault:
                    if not left:
                        raise
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
