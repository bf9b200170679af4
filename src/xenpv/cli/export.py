"""``xenpv export``: a domain's memory for other tools."""

from __future__ import annotations

from dataclasses import asdict

import click

from xenpv.cli.target import INDEX, PAUSE, open_target
from xenpv.cli.terminal import JSON, print_json, progress_bar
from xenpv.errors import RequestError, StreamError
from xenpv.export.export import FORMATS
from xenpv.export.export import export as export_to
from xenpv.export.formats.kdump import FLAGS
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
    help="What is to be written; see below.",
)
@click.option("--compression", type=click.Choice(list(FLAGS)), default="zlib", show_default=True,
              help="Of kdump's pages. All readers know zlib, zstd is faster.")  # fmt: skip
@click.option("--partial", is_flag=True, help="Export what is there of a FILE that was cut off or is damaged.")
@INDEX
@PAUSE
@JSON
def export(source: str, out: str, form: str, compression: str, partial: bool, pause: bool, as_json: bool) -> None:
    """Write a domain's memory to OUT as other tools read it; "-" writes to a pipe.

    SOURCE is a saved domain, or a running one (in dom0), which runs on meanwhile unless --pause is said: pages are then
    of different moments. Page tables of PV domains have pfns in the place of mfns, so that tools which know nothing of
    Xen can walk them. Of pages that are not there nothing is written; OUT can be read by its owner only, and has its
    name only when it is whole.

    \b
    elf       a core by physical address, as of a crashed Linux: drgn, gdb, crash, Volatility
    lime      LiME: each run of pages behind its addresses
    raw       the bytes as they are, with holes where no page is
    dumpcore  what `xl dump-core` writes, mfns in page tables
    kdump     makedumpfile's compressed format: drgn, crash; not to a pipe

    \b
    xenpv export web.save web.elf
    drgn -c web.elf -s vmlinux         gdb vmlinux web.elf, crash vmlinux web.elf, vol -f web.elf
    xenpv export --pause web - | zstd > web.elf.zst
    """
    wrong: list[str] = []

    def fault(rule: Rule, message: str, offset: int, record: str | None) -> None:  # noqa: ARG001  as a BreachHandler
        wrong.append(f"{message} (at {offset:#x}{f' in {record}' if record else ''})")

    try:
        with open_target(source, pause=pause, allow_hvm=True, on_breach=fault if partial else None) as domain:
            if partial and domain.live is not None:
                raise RequestError(f"{domain.name}: runs; only a file can be there in part")
            if not domain.seekable:
                raise RequestError("a pipe passes by once, and this needs all pages twice: put it into a file first")
            with progress_bar("exporting") as bar:
                done = export_to(domain, out, form, compression=compression, progress=bar)
            if domain.live is not None and not pause:
                done.remarks.append("it ran meanwhile: pages are of different moments (--pause stops it for as long)")
            done.remarks += _missing(domain, wrong, done.last_pfn)
            name = domain.name
    except StreamError as e:
        if partial:
            raise
        raise RequestError(f"{e}; --partial exports what is there") from e
    if as_json:
        print_json({"source": name, "out": out, "format": form, **asdict(done)})
        return
    told = f"{done.pages} pages, {size(done.pages * PAGE_SIZE)}, {done.zeros} of them zeros"
    click.echo(printable(f"{name}: {told}, to {out}"), err=True)
    for remark in done.remarks:
        click.echo(printable(f"xenpv: note: {remark}"), err=True)


def _missing(domain: Domain, wrong: list[str], last_pfn: int) -> list[str]:
    """What is wrong with a file, and what of a saved domain did not come."""
    out = [wrong[0] + (f", and {len(wrong) - 1} more faults" if len(wrong) > 1 else "")] if wrong else []
    saved = domain.saved
    if saved is None:
        return out
    contents = saved.contents
    if not saved.pages_complete:
        out.append(f"the file ends among the pages: the last that is there is pfn {last_pfn:#x}")
        if contents.end_pfn > last_pfn:
            out[-1] += f", and the p2m reaches to {contents.end_pfn:#x}"
    if not contents.complete and not domain.hvm:
        gone = [what for what, there in (("vcpus", contents.vcpus), ("shared info", contents.shared_info)) if not there]
        out += [f"missing: {' and '.join(gone)}"] if gone else []
    return out
