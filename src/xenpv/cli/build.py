"""``xenpv build``: a PV domain out of a kernel file, on the Xen below us."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import uuid4

import click

from xenpv.cli.image import read_kernel
from xenpv.cli.terminal import JSON, NUMBER, print_json, size, steps
from xenpv.errors import RequestError
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import plan
from xenpv.image.request import Request


@click.command()
@click.argument("kernel", metavar="KERNEL", type=click.Path(allow_dash=True))
@click.option("--memory", type=NUMBER, required=True, metavar="SIZE", help="Memory of the domain, such as 640G.")
@click.option("--ramdisk", type=click.Path(exists=True, dir_okay=False), metavar="FILE", help="Its initrd.")
@click.option("--vcpus", type=int, default=1, metavar="N", help="Vcpus of the domain; 1 unless said.")
@click.option("--cmdline", default="", metavar="TEXT", help="The kernel's command line.")
@click.option("--name", metavar="NAME", help="What xl list calls it; the kernel file's name unless said.")
@click.option("--old-tools", is_flag=True, help="Let the kernel make the three-level tree, for tools before Xen 4.7.")
@click.option("--start", is_flag=True, help="Let it run; without, it is left paused (xl unpause starts it).")
@click.option("-o", "output", type=click.Path(allow_dash=True), metavar="FILE",
              help="Build into a save file that xl restore starts: needs no hypervisor.")  # fmt: skip
@JSON
def build(
    kernel: str,
    memory: int,
    ramdisk: str | None,
    vcpus: int,
    cmdline: str,
    name: str | None,
    old_tools: bool,
    start: bool,
    output: str | None,
    as_json: bool,
) -> None:
    """Build a PV domain of any size from a kernel, in dom0, without a configuration file; or into a save file.

    KERNEL is a bzImage (vmlinuz) or an ELF file (vmlinux); "-" reads a pipe. The domain has memory, vcpus, a console
    and xenstore, and no devices: `xl console`, `xl list`, `xl destroy` know it. Where everything will lie, `xenpv
    layout` tells with the same options, without a hypervisor. When it cannot be built, nothing is left behind.

    \b
    xenpv build /boot/vmlinuz --ramdisk /boot/initrd.img --memory 4G --cmdline console=hvc0 --name web --start
    xl console web
    xenpv build vmlinuz --memory 4G --name web -o web.save      anywhere; then, on a host: xl restore web.save

    The kernel is told that its tools read the p2m by its linear list alone (SIF_VIRT_P2M_4TOOLS), as they can since Xen
    4.7; xl never says so, and Linux under it makes the old tree as well. --old-tools says nothing, as xl.
    """
    image = KernelImage.parse(read_kernel(kernel))
    content = Path(ramdisk).read_bytes() if ramdisk is not None else b""
    request = Request(memory, len(content), vcpus, cmdline, virt_p2m_4tools=not old_tools)
    called = name or ("domain" if kernel == "-" else Path(kernel).name)
    if output is not None:
        if start:
            raise click.UsageError("a file is not started: leave out --start, or -o")
        _build_file(image, request, content, called, output)
        return
    from xenpv.domain.build import build as build_domain  # noqa: PLC0415  NumPy, and Xen's libraries
    from xenpv.domain.config import as_libxl  # noqa: PLC0415
    from xenpv.host.xen_build import XenToolstack  # noqa: PLC0415

    layout, uuid = plan(image, request), str(uuid4())
    config = as_libxl(called, uuid, pages=layout.nr_pages, vcpus=layout.vcpus)
    config["b_info"] |= _boots_from(kernel, ramdisk, request)
    with XenToolstack() as host:
        if any(domain.name == called for domain in host.domains()):
            raise RequestError(f"there is a domain {called!r} already; say another --name")
        with steps() as step:
            text = json.dumps(config, indent=4).encode()
            built = build_domain(host, image, layout, content, name=called, uuid=uuid, config=text, step=step)
        if start:
            host.unpause(built.domid)
    if as_json:
        print_json({"domid": built.domid, "name": called, "pages": layout.nr_pages, "running": start})
    else:
        state = "runs" if start else f"is built, and paused: xl unpause {called}"
        click.echo(f"dom{built.domid} ({called}), {size(memory)}, {state}")


def _boots_from(kernel: str, ramdisk: str | None, request: Request) -> dict[str, str]:
    """What xl starts it from again, should it reboot after an xl restore; of a kernel from a pipe nothing is known."""
    files = {"kernel": kernel, "ramdisk": ramdisk} if kernel != "-" else {}
    known = {name: str(Path(path).absolute()) for name, path in files.items() if path}
    known["cmdline"] = request.cmdline
    return {name: value.encode(errors="replace").decode() for name, value in known.items() if value}


def _build_file(image: KernelImage, request: Request, ramdisk: bytes, name: str, output: str) -> None:
    from xenpv.domain.offline import build_file, plan_file  # noqa: PLC0415  NumPy
    from xenpv.domain.output import Output  # noqa: PLC0415

    layout = plan_file(image, request)
    with Output.open(output) as file, steps() as step:
        summary = build_file(image, layout, ramdisk, file, name=name, uuid=str(uuid4()), step=step)
    stored = f"{summary.pages} pages stored, {summary.empty} without content"
    click.echo(f"{output}: {name}, {size(request.memory)}, {stored}; start it by: xl restore {output}", err=True)
