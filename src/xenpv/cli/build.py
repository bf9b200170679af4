"""``xenpv build``: a PV domain from a kernel, on this host or in a save file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import click

from xenpv.cli.kernel_file import (
    CMDLINE,
    KERNEL,
    MEMORY,
    VCPUS,
    kernel_inputs,
    named_in_errors,
    ramdisk_size,
    read_kernel,
)
from xenpv.cli.terminal import FORCE, JSON, SEAL, SEAL_KEY, make_sealer, print_json, progress_bar
from xenpv.errors import RequestError
from xenpv.host.domain_names import check_name
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import plan
from xenpv.image.request import Request
from xenpv.io.atomic_output import Output
from xenpv.io.file_kind import FileKind
from xenpv.text import size

if TYPE_CHECKING:
    from xenpv.stream.seal import Sealer


@click.command()
@KERNEL
@MEMORY
@click.option("--ramdisk", type=click.Path(), metavar="FILE", help="Initrd of the domain.")
@VCPUS
@CMDLINE
@click.option("--name", metavar="NAME", show_default="the kernel's file name", help="Name of the domain.")
@click.option(
    "--old-tools", is_flag=True, help="Have the kernel make a three-level p2m tree, for tools before Xen 4.7."
)
@click.option("--start", is_flag=True, help="Start the domain; otherwise it stays paused (xl unpause starts it).")
@click.option("-o", "output", type=click.Path(allow_dash=True), metavar="FILE",
              help="Write a save file for xl restore instead of a domain.")  # fmt: skip
@SEAL
@SEAL_KEY
@FORCE
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
    seal: bool,
    seal_key: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build a PV domain from a kernel, in dom0 or offline into a file (-o).

    KERNEL is a bzImage (vmlinuz) or an ELF file (vmlinux); "-" reads a pipe. The domain has memory, vcpus, a console
    and xenstore, but no devices; it needs no configuration file. `xl list`, `xl console` and `xl destroy` work on it.
    `xenpv layout` shows beforehand where everything will lie. A failed build leaves nothing behind.

    \b
    Examples:
      xenpv build /boot/vmlinuz --ramdisk /boot/initrd.img --memory 4G --cmdline console=hvc0 --name web --start
      xenpv build vmlinuz --memory 640G               paused; then: xl unpause vmlinuz
      xenpv build vmlinuz --memory 4G -o web.save     needs no Xen; then, on a host: xl restore web.save

    The start info sets SIF_VIRT_P2M_4TOOLS: the tools read the p2m by its linear list alone, as they can since Xen 4.7.
    xl never sets this flag, so a Linux guest also maintains the three-level tree. --old-tools does as xl does.
    """
    domain_name = check_name(name if name is not None else "domain" if kernel == "-" else Path(kernel).name)
    if output is not None and start:
        raise click.UsageError("-o writes a file, which cannot be started: use --start or -o, not both")
    if output == "-" and as_json:
        raise click.UsageError("-o - writes the file to standard output: leave out --json or name a FILE")
    sealer = make_sealer(seal, seal_key)
    if sealer is not None and output is None:
        raise click.UsageError("--seal and --seal-key seal a file: give -o, too")
    initrd = ramdisk_size(Path(ramdisk)) if ramdisk is not None else 0
    request = Request(memory, initrd, vcpus, cmdline, virt_p2m_4tools=not old_tools)
    data = read_kernel(kernel)
    with named_in_errors(kernel):
        image = KernelImage.parse(data)
        if output is not None:
            inputs = kernel_inputs(kernel, ramdisk)
            file = Output.open(output, replaces={FileKind.SAVED_DOMAIN}, inputs=inputs, force=force)
            _build_file(image, request, ramdisk, domain_name, file, sealer, as_json=as_json)
            return
        layout = plan(image, request)
    from xenpv.build.build import build as build_domain  # noqa: PLC0415  NumPy, and Xen's libraries
    from xenpv.host.xen.host import XenHost  # noqa: PLC0415
    from xenpv.source.config import boot_source, libxl_config  # noqa: PLC0415

    uuid = str(uuid4())
    boot = boot_source(kernel, ramdisk, request.cmdline)
    config = libxl_config(domain_name, uuid, pages=layout.nr_pages, vcpus=layout.vcpus, boot=boot)
    with XenHost() as host:
        if any(domain.name == domain_name for domain in host.domains()):
            raise RequestError(f"a domain {domain_name!r} exists already; choose another --name")
        with progress_bar() as bar:
            ramdisk_data = _read_ramdisk(ramdisk, request)
            built = build_domain(
                host, image, layout, ramdisk_data, name=domain_name, uuid=uuid, config=config, progress=bar
            )
        if start:
            host.unpause(built.domid)
    if as_json:
        print_json({"domid": built.domid, "name": domain_name, "pages": layout.nr_pages, "running": start})
    else:
        state = "running" if start else f"paused; start it with: xl unpause {domain_name}"
        click.echo(f"dom{built.domid} ({domain_name}), {size(memory)}, {state}")


def _read_ramdisk(ramdisk: str | None, request: Request) -> bytes:
    """Read a ramdisk, up to one byte more than planned.

    build() refuses it then if the file has grown since its size was read.
    """
    if ramdisk is None:
        return b""
    with Path(ramdisk).open("rb") as file:
        return file.read(request.ramdisk + 1)


def _build_file(
    image: KernelImage,
    request: Request,
    ramdisk: str | None,
    name: str,
    output: Output,
    sealer: Sealer | None,
    *,
    as_json: bool,
) -> None:
    from xenpv.build.offline import HOST_BYTES, build_file, plan_file  # noqa: PLC0415  NumPy
    from xenpv.host.model.host import ModelHost  # noqa: PLC0415

    with output, progress_bar() as bar:
        layout = plan_file(image, request)
        ramdisk_data = _read_ramdisk(ramdisk, request)
        host = ModelHost((layout.nr_pages << 12) + HOST_BYTES, sparse=True)
        summary = build_file(
            host, image, layout, ramdisk_data, output, name=name, uuid=str(uuid4()), seal=sealer, progress=bar
        )
    if as_json:
        counts = {"pages": layout.nr_pages, "stored": summary.pages, "without_content": summary.without_content}
        print_json({"file": output.name, "name": name} | counts)
        return
    stored = f"{summary.pages} pages stored, {summary.without_content} without content"
    file_name = output.name if output.is_regular_file else "FILE"
    click.echo(
        f"{output.name}: {name}, {size(request.memory)}, {stored}; start it with: xl restore {file_name}", err=True
    )
