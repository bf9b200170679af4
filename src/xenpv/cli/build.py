"""``xenpv build``: a PV domain out of a kernel file, on the Xen below us."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import click

from xenpv.cli.image import naming, read_kernel
from xenpv.cli.layout import ramdisk_size
from xenpv.cli.terminal import JSON, NUMBER, print_json, progress_bar
from xenpv.errors import RequestError
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import plan
from xenpv.image.request import Request
from xenpv.text import size

_NAME_MAX = 255  # bytes


@click.command()
@click.argument("kernel", metavar="KERNEL", type=click.Path(allow_dash=True))
@click.option("--memory", type=NUMBER, required=True, metavar="SIZE", help="Memory of the domain, such as 640G.")
@click.option("--ramdisk", type=click.Path(), metavar="FILE", help="Its initrd.")
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
    called = _checked_name(name if name is not None else "domain" if kernel == "-" else Path(kernel).name)
    if output is not None and start:
        raise click.UsageError("a file is not started: leave out --start, or -o")
    if output == "-" and as_json:
        raise click.UsageError("standard output is the file: leave out --json, or -o -")
    initrd = ramdisk_size(Path(ramdisk)) if ramdisk is not None else 0
    request = Request(memory, initrd, vcpus, cmdline, virt_p2m_4tools=not old_tools)
    data = read_kernel(kernel)
    with naming(kernel):
        image = KernelImage.parse(data)
        if output is not None:
            _build_file(image, request, ramdisk, called, output, as_json=as_json)
            return
        layout = plan(image, request)
    from xenpv.build.build import build as build_domain  # noqa: PLC0415  NumPy, and Xen's libraries
    from xenpv.host.xen.host import XenHost  # noqa: PLC0415
    from xenpv.source.config import as_libxl  # noqa: PLC0415

    uuid = str(uuid4())
    boot = _boots_from(kernel, ramdisk, request)
    config = as_libxl(called, uuid, pages=layout.nr_pages, vcpus=layout.vcpus, boot=boot)
    with XenHost() as host:
        if any(domain.name == called for domain in host.domains()):
            raise RequestError(f"there is a domain {called!r} already; say another --name")
        with progress_bar() as bar:
            content = _content(ramdisk, request)
            built = build_domain(host, image, layout, content, name=called, uuid=uuid, config=config, progress=bar)
        if start:
            host.unpause(built.domid)
    if as_json:
        print_json({"domid": built.domid, "name": called, "pages": layout.nr_pages, "running": start})
    else:
        state = "runs" if start else f"is built, and paused: xl unpause {called}"
        click.echo(f"dom{built.domid} ({called}), {size(memory)}, {state}")


def _checked_name(name: str) -> str:
    """A name that xl and its files can hold, and that people can type; digits alone would be taken for an id."""
    if not name or not name.isprintable() or len(name.encode(errors="replace")) > _NAME_MAX:
        raise RequestError(
            f"a name has 1 to {_NAME_MAX} bytes that can be printed, not {name!a:.100}; say another --name"
        )
    if name.isdigit():
        raise RequestError(f"the name {name!r} would be taken for a domain's id; say another --name")
    return name


def _content(ramdisk: str | None, request: Request) -> bytes:
    """A ramdisk's bytes, as many as were planned for and one more to tell."""
    if ramdisk is None:
        return b""
    with Path(ramdisk).open("rb") as file:
        return file.read(request.ramdisk + 1)


def _boots_from(kernel: str, ramdisk: str | None, request: Request) -> dict[str, str]:
    """What xl starts it from again, should it reboot after an xl restore; of a kernel from a pipe nothing is known."""
    files = {"kernel": kernel, "ramdisk": ramdisk} if kernel != "-" else {}
    known = {name: str(Path(path).absolute()) for name, path in files.items() if path}
    known["cmdline"] = request.cmdline
    return {name: value.encode(errors="replace").decode() for name, value in known.items() if value}


def _build_file(
    image: KernelImage, request: Request, ramdisk: str | None, name: str, output: str, *, as_json: bool
) -> None:
    from xenpv.build.offline import HOST_BYTES, build_file, plan_file  # noqa: PLC0415  NumPy
    from xenpv.host.model.host import ModelHost  # noqa: PLC0415
    from xenpv.io.atomic_output import Output  # noqa: PLC0415

    layout = plan_file(image, request)
    content = _content(ramdisk, request)
    host = ModelHost((layout.nr_pages << 12) + HOST_BYTES, sparse=True)
    with Output.open(output) as file, progress_bar() as bar:
        summary = build_file(host, image, layout, content, file, name=name, uuid=str(uuid4()), progress=bar)
    if as_json:
        counts = {"pages": layout.nr_pages, "stored": summary.pages, "without_content": summary.empty}
        print_json({"file": output, "name": name} | counts)
        return
    stored = f"{summary.pages} pages stored, {summary.empty} without content"
    where = ("standard output", "FILE") if output == "-" else (output, output)
    click.echo(f"{where[0]}: {name}, {size(request.memory)}, {stored}; start it by: xl restore {where[1]}", err=True)
