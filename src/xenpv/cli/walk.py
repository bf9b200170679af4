"""``xenpv walk``: a virtual address through a domain's page tables."""

from __future__ import annotations

import click

from xenpv.cli.target import INDEX, PAUSE, TARGET, TOP, USER, VCPU, open_target, top_table, walk_attempts
from xenpv.cli.terminal import JSON, NUMBER, print_json, print_table
from xenpv.frames import IS_TABLE, PAGE_SIZE, type_name
from xenpv.memory.page_tables import flag_names
from xenpv.text import printable


@click.command()
@TARGET
@click.argument("vaddr", type=NUMBER)
@VCPU
@USER
@TOP
@INDEX
@PAUSE
@JSON
def walk(target: str, vaddr: int, vcpu: int, user: bool, top: int | None, pause: bool, as_json: bool) -> int:
    """Walk a virtual address through a domain's page tables and show every entry.

    DOM is a running domain (id, uuid or name); FILE is a save file or a core. Entries are shown with pfns in place of
    mfns.

    \b
    Examples:
      xenpv walk dom.save 0xffffffff81000000            as vcpu 0 sees it
      xenpv walk --vcpu 1 --user web 0x7f0012345000     a running domain, in user mode
      xenpv walk --top 0x1a2b dom.save 0x400000         another process, by its top-level table

    \b
    Exit status:
      0  the address is mapped
      1  it is not mapped, or an error
    """
    with open_target(target, pause=pause, allow_hvm=True) as domain:
        memory = domain.memory_of(vcpu)
        for _ in range(walk_attempts(domain)):
            path = memory.walk(vaddr, top=top_table(domain, vcpu, user, top))
            types = [memory.type(step.table) for step in path.steps]
            # Try again if the walk ended at a table that is gone, rather than in an entry. A page that is still a page
            # table was one during the walk; only the page types of PV domains tell.
            last = path.steps[-1].level if path.steps else 0
            if last == (path.fault.level if path.fault else 1) and (domain.hvm or IS_TABLE[types].all()):
                break
        if as_json:
            steps = [
                {"level": s.level, "table_pfn": s.table, "type": type_name(t), "entry": s.entry, "pte": s.pte,
                 "flags": flag_names(s.pte)}
                for s, t in zip(path.steps, types, strict=True)
            ]  # fmt: skip
            fault = None if path.fault is None else str(path.fault)
            print_json({"vaddr": vaddr, "steps": steps, "pfn": path.pfn, "fault": fault})
            return 0 if path.pfn is not None else 1
        rows = [
            [f"L{s.level}", f"{s.table:#x}", type_name(t), str(s.entry), f"{s.pte:#018x}", flag_names(s.pte)]
            for s, t in zip(path.steps, types, strict=True)
        ]
        print_table("", ["level", "table pfn", "type", "entry#", "pte", "flags"], rows)
        if path.pfn is None:
            click.echo(printable(f"{vaddr:#x} is not mapped: {path.fault}"))
            return 1
        page_type = type_name(memory.type(path.pfn))
        click.echo(f"{vaddr:#x} is pfn {path.pfn:#x} ({page_type}), offset {vaddr % PAGE_SIZE:#x}")
        return 0
