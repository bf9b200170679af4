"""``xenpv export``: a domain's memory in the formats of other tools."""

from __future__ import annotations

from dataclasses import asdict

import click

import xenpv
from xenpv.cli.target import INDEX, PAUSE, open_target
from xenpv.cli.terminal import FORCE, JSON, print_json, progress_bar
from xenpv.errors import RequestError, StreamError, Unsupported
from xenpv.export.export import FORMATS
from xenpv.export.formats.kdump import COMPRESSION_FLAGS
from xenpv.findings import Rule
from xenpv.frames import PAGE_SIZE
from xenpv.source.domain import Domain
from xenpv.text import printable, size


@click.command()
@click.argument("source", metavar="DOM|FILE")
@click.argument("out", metavar="OUT", type=click.Path(allow_dash=True))
@click.option(
    "-f",
    "--format",
    "form",
    type=click.Choice(list(FORMATS)),
    default="elf",
    show_default=True,
    help="Format of OUT; see above.",
)
@click.option("--compression", type=click.Choice(list(COMPRESSION_FLAGS)), default="zlib", show_default=True,
              help="Compression of kdump pages: every reader knows zlib, zstd is faster.")  # fmt: skip
@click.option("--partial", is_flag=True, help="Export the readable part of a FILE that is cut off or damaged.")
@INDEX
@PAUSE
@FORCE
@JSON
def export(
    source: str, out: str, form: str, compression: str, partial: bool, pause: bool, force: bool, as_json: bool
) -> None:
    """Write a domain's memory to OUT ("-": a pipe) for another tool.

    DOM is a running domain (id, uuid or name), FILE a save file or a core. A running domain keeps running unless
    --pause is given; its pages are then from different moments. Page tables of PV domains hold pfns in place of mfns,
    so that tools that know nothing of Xen can walk them. Missing pages are left out. Only the owner can read OUT, which
    appears only when it is complete.

    \b
    Formats:
      elf       a core by physical address, as of a crashed Linux: drgn, gdb, crash, Volatility
      lime      LiME: each run of pages after its addresses
      raw       the bytes themselves, with holes for missing pages
      dumpcore  as xl dump-core writes it, with mfns in page tables
      kdump     makedumpfile's compressed format: drgn, crash; not to a pipe

    \b
    Examples:
      xenpv export web.save web.elf
      xenpv export --format kdump --compression zstd web.save web.kdump
      xenpv export --pause web - | zstd > web.elf.zst

    \b
    Then:
      drgn -c web.elf -s vmlinux
      crash vmlinux web.elf
      gdb vmlinux web.elf
      vol -f web.elf linux.pslist
    """
    breaches: list[str] = []

    def add_breach(rule: Rule, message: str, offset: int, record: str | None) -> None:  # noqa: ARG001  as a BreachHandler
        breaches.append(f"{message} (at {offset:#x}{f' in {record}' if record else ''})")

    try:
        with open_target(source, pause=pause, allow_hvm=True, on_breach=add_breach if partial else None) as domain:
            if partial and domain.live is not None:
                raise RequestError(f"{domain.name} is a running domain; --partial is for files")
            if not domain.seekable:
                raise RequestError("a pipe can be read once, export reads each page twice: save it to a file first")
            with progress_bar("exporting") as bar:
                exported = xenpv.export(domain, out, form, compression=compression, force=force, progress=bar)
            if domain.live is not None and not pause:
                exported.remarks.append(
                    "the domain was running: pages are from different moments (--pause prevents that)"
                )
            exported.remarks += _missing_parts(domain, breaches, exported.last_pfn)
            name = domain.name
    except StreamError as e:
        if partial or isinstance(e, Unsupported):  # no page of an unknown format can be read
            raise
        raise RequestError(f"{e}; --partial exports the readable pages, if there are any") from e
    if as_json:
        print_json({"source": name, "out": out, "format": form, **asdict(exported)})
        return
    counts = f"{exported.pages} pages, {size(exported.pages * PAGE_SIZE)}, {exported.zeros} of them zeros"
    click.echo(printable(f"{name}: {counts}, to {out}"), err=True)
    for remark in exported.remarks:
        click.echo(printable(f"xenpv: note: {remark}"), err=True)


def _missing_parts(domain: Domain, breaches: list[str], last_pfn: int) -> list[str]:
    """Return remarks on a damaged file.

    They name its first breach, and the parts that are missing after the cut.
    """
    more = f", and {len(breaches) - 1} more faults" if len(breaches) > 1 else ""
    remarks = [breaches[0] + more] if breaches else []
    saved = domain.saved
    if saved is None:
        return remarks
    contents = saved.contents
    if not saved.pages_complete:
        remarks.append(f"the file ends among the pages; the last one is pfn {last_pfn:#x}")
        if contents.end_pfn > last_pfn:
            remarks[-1] += f", the p2m ends at {contents.end_pfn:#x}"
    if not contents.complete and not domain.hvm:
        parts = {"vcpus": contents.vcpus, "shared info": contents.shared_info}
        missing = [name for name, part in parts.items() if not part]
        remarks += [f"missing: {' and '.join(missing)}"] if missing else []
    return remarks
