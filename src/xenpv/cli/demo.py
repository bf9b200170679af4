"""``xenpv demo``: the main job, on a model of Xen and on a real saved domain that both come with the package."""

from __future__ import annotations

import json
import lzma
import tempfile
from functools import partial
from importlib.resources import files
from pathlib import Path
from uuid import UUID

import click

from xenpv.cli.p2m import describe, print_p2m
from xenpv.cli.terminal import NUMBER, progress, size, steps
from xenpv.cli.verify import summary
from xenpv.domain.build import build
from xenpv.domain.check_physmap import PhysmapCheck
from xenpv.domain.live import LiveDomain
from xenpv.domain.offline import configuration
from xenpv.domain.output import Output
from xenpv.domain.save import save
from xenpv.domain.verify import verify
from xenpv.errors import GuestError, RequestError
from xenpv.findings import Findings
from xenpv.frames import DomId
from xenpv.host.model import ModelHost
from xenpv.host.model_forms import FORMS, parse_form
from xenpv.host.model_kernel import Kernel
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import Layout, Part, plan
from xenpv.image.request import Request
from xenpv.memory.survey import survey

SAVED = "demo.save.xz"  # tests/vectors/README.md has the command that made it
KERNEL = "demo.elf.xz"  # guests/litmus/build/litmus.elf
_OTHERS = 8 << 30  # bytes of the host that are not the domain's


@click.command()
@click.option("--p2m", "form", default="linear", show_default=True, type=click.Choice(list(FORMS)), metavar="FORM",
              help=f"How its kernel shows its p2m: {', '.join(FORMS)}.")  # fmt: skip
@click.option(
    "--memory", type=NUMBER, default=600 << 30, metavar="SIZE", help="Memory of the domain; 600G unless said."
)
@click.option("-o", "output", type=click.Path(), metavar="FILE",
              help="Keep the file that the domain is saved to: 2.4 GiB for 600.")  # fmt: skip
def demo(form: str, memory: int, output: str | None) -> int:
    """A PV domain of 600 GiB laid out, built, saved and verified without a hypervisor; and a real saved one verified.

    \b
    xenpv demo --p2m rooted4           the tree of any depth that was proposed in 2014
    xenpv demo --p2m tree3             a tree of three levels ends at 512 GiB, and says so
    xenpv demo --p2m tree4hidden       a kernel that shows less than it has is refused, in words
    """
    with tempfile.TemporaryDirectory(prefix="xenpv-demo-") as folder:
        ok = _large(form, memory, output or f"{folder}/demo.save") and _saved()
    click.echo("\nNext, with files of your own:  xenpv verify FILE    xenpv image KERNEL    xenpv layout KERNEL")
    click.echo("and in dom0:  xenpv list    xenpv check DOM    xenpv build KERNEL --memory SIZE --start")
    return 0 if ok else 1


def _large(form: str, memory: int, path: str) -> bool:
    image = KernelImage.parse(lzma.decompress(files("xenpv.cli").joinpath(KERNEL).read_bytes()))
    layout = plan(image, Request(memory, cmdline=f"p2m={form}"))
    _title(f"A PV domain of {size(memory)}, laid out")
    _say_layout(layout)
    host, kernel = ModelHost(memory + _OTHERS, sparse=True), Kernel(parse_form(form))
    with steps() as step:
        domid = build(host, image, layout, name="demo", step=step).domid
    host.unpause(domid)
    _title("Built on a model of Xen's memory rules, and started")
    try:
        host.run(domid, kernel.boot)
    except RequestError as e:
        click.echo(f"  its kernel cannot show its p2m that way: {e}")
        return False
    right = _checked(LiveDomain(host, host.info(domid)))
    host.run(domid, kernel.suspend)
    _title("Suspended, saved to a file, and verified")
    return _kept(host, domid, layout, path) and right


def _checked(live: LiveDomain) -> bool:
    findings = Findings(3)
    with steps() as step:
        check = PhysmapCheck(live, findings, progress=step and (lambda done, total: step("checking", done, total or 0)))
        check.run()
    if findings.errors:
        for finding in findings:
            click.echo(f"  {finding.severity}: {finding}")
        return False
    found = survey(live.p2m, 64 * 8)
    print_p2m(describe(live, live.p2m, found), found)
    click.echo(
        f"  every entry of it agrees with the m2p, and every frame of the domain is in it ({findings.notes} notes)"
    )
    return True


def _kept(host: ModelHost, domid: DomId, layout: Layout, path: str) -> bool:
    text = json.dumps(configuration(layout, "demo", str(UUID(int=0))), indent=4).encode()
    try:
        with Output.open(path) as out, steps() as step:
            done = save(host, domid, out, config=text, progress=partial(step, "saving") if step else None)
    except (GuestError, RequestError) as e:
        click.echo(f"  it cannot be saved: {e}")
        return False
    click.echo(
        f"  {done.pages} pages with content, {done.tables} of them page tables, and {done.empty} without: "
        f"{size(done.bytes)}"
    )
    return _verified(path, Path(path).name)


def _say_layout(layout: Layout) -> None:
    p2m = layout.segment(Part.P2M)
    assert p2m is not None
    tables = sum(span.count for span in layout.tables)
    mapped = layout.mapping_end - layout.virt_base
    where = "outside" if layout.p2m_outside else "inside"
    click.echo(f"  initial mapping  {layout.virt_base:#x} to {layout.mapping_end:#x} ({size(mapped)})")
    click.echo(f"  p2m list         {size(p2m.size)} at {p2m.vaddr:#x}, {where} the initial mapping")
    click.echo(f"  page tables      {tables}")


def _saved() -> bool:
    _title("A domain that stock xl saved on real Xen, verified")
    with tempfile.NamedTemporaryFile(prefix="xenpv-demo-", suffix=".save") as file:
        file.write(lzma.decompress(files("xenpv.cli").joinpath(SAVED).read_bytes()))
        file.flush()
        return _verified(file.name, "demo.save")


def _verified(path: str, name: str) -> bool:
    with progress("verifying") as bar:
        report = verify(path, progress=bar)
    assert report.saved is not None
    with report.saved as saved:
        report.name = saved.name = name
        for finding in report.findings:
            click.echo(f"  {finding.severity}: {finding}")
        click.echo(f"  {summary(report)}")
    return report.ok


def _title(text: str) -> None:
    click.echo(click.style(f"\n{text}", bold=True))
