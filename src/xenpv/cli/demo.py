"""``xenpv demo``: the main job, on a model of Xen and on a real saved domain that both come with the package."""

from __future__ import annotations

import lzma
import tempfile
from importlib.resources import files

import click

from xenpv.cli.p2m import describe, print_p2m
from xenpv.cli.terminal import NUMBER, size, steps
from xenpv.cli.verify import summary
from xenpv.domain.build import build
from xenpv.domain.check_physmap import PhysmapCheck
from xenpv.domain.live import LiveDomain
from xenpv.domain.verify import verify
from xenpv.errors import RequestError
from xenpv.findings import Findings
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
def demo(form: str, memory: int) -> int:
    """A PV domain of 600 GiB laid out, built and looked into without a hypervisor; a real saved one verified.

    \b
    xenpv demo --p2m rooted4           the tree of any depth that was proposed in 2014
    xenpv demo --p2m tree3             a tree of three levels ends at 512 GiB, and says so
    xenpv demo --p2m tree4hidden       a kernel that shows less than it has is refused, in words
    """
    ok = _large(form, memory) and _saved()
    click.echo("\nNext, with files of your own:  xenpv verify FILE    xenpv image KERNEL    xenpv layout KERNEL")
    click.echo("and in dom0:  xenpv list    xenpv check DOM    xenpv build KERNEL --memory SIZE --start")
    return 0 if ok else 1


def _large(form: str, memory: int) -> bool:
    image = KernelImage.parse(lzma.decompress(files("xenpv.cli").joinpath(KERNEL).read_bytes()))
    layout = plan(image, Request(memory, cmdline=f"p2m={form}"))
    _title(f"A PV domain of {size(memory)}, laid out")
    _say_layout(layout)
    host = ModelHost(memory + _OTHERS)
    with steps() as step:
        built = build(host, image, layout, name="demo", step=step)
    host.unpause(built.domid)
    _title("Built on a model of Xen's memory rules, and started")
    try:
        host.run(built.domid, Kernel(parse_form(form)).boot)
    except RequestError as e:
        click.echo(f"  its kernel cannot show its p2m that way: {e}")
        return False
    live = LiveDomain(host, host.info(built.domid))
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
        report = verify(file.name)
        assert report.saved is not None
        with report.saved as saved:
            report.name = saved.name = "demo.save"
            for finding in report.findings:
                click.echo(f"  {finding.severity}: {finding}")
            click.echo(f"  {summary(report)}")
    return report.ok


def _title(text: str) -> None:
    click.echo(click.style(f"\n{text}", bold=True))
