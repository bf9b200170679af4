"""The verbs of the public API, by names and paths.

``import xenpv`` gives them; docs/reference/api.md shows each.

Functions that act on a running domain open the Xen host that they run on. With ``host`` they act on that host instead:
programs and tests give a ``xenpv.host.model.host.ModelHost``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, overload
from uuid import uuid4

from xenpv.errors import RequestError
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import plan
from xenpv.image.request import Request
from xenpv.io.progress import ProgressCallback
from xenpv.io.stream_input import Input

if TYPE_CHECKING:
    from xenpv.build.build import Built
    from xenpv.convert.convert import ConversionResult, ConvertOptions
    from xenpv.host.protocol import Mover
    from xenpv.migrate.sender import SentDomain
    from xenpv.restore.restore import Restored
    from xenpv.save.file import SavedFile
    from xenpv.save.precopy import PrecopyPolicy
    from xenpv.save.save import Summary


def save(
    name: str,
    path: str,
    *,
    keep: bool = False,
    paused: bool = False,
    force: bool = False,
    timeout: float = 60.0,
    progress: ProgressCallback | None = None,
    host: Mover | None = None,
) -> SavedFile:
    """Suspend a running domain, save it to a file, and destroy it.

    The file appears only when it is complete. After an error the domain runs on, and there is no file. If only its
    destruction fails, the file is complete and stays; the HostError says so.

    Args:
        name: The domain's number, uuid or name.
        path: The file, or "-" for standard output.
        keep: Let the domain run on instead of destroying it.
        paused: With ``keep``, leave the domain paused.
        force: Replace an existing file even if it is no saved domain.
        timeout: Seconds that the guest may take to suspend.
        progress: Called while memory is saved.
        host: The host of the domain (default: this one).

    Raises:
        RequestError: The domain cannot be saved as it is.
        GuestError: The guest's p2m or page tables are damaged.
        HostError: There is no such domain, or Xen refused an operation. The message says if the domain stays suspended.
        OSError: The file cannot be written.
    """
    from xenpv.host.protocol import find_domain  # noqa: PLC0415  NumPy
    from xenpv.save.file import save_file  # noqa: PLC0415

    with _open_host(host) as xen:
        domid = find_domain(xen, name).domid
        return save_file(
            xen, domid, path, suspend_timeout=timeout, keep=keep, paused=paused, force=force, progress=progress
        )


def restore(
    path: str,
    *,
    name: str | None = None,
    new_uuid: bool = False,
    paused: bool = False,
    seal_key: bytes | None = None,
    progress: ProgressCallback | None = None,
    host: Mover | None = None,
) -> Restored:
    """Create a domain from a save file and start it.

    After an error nothing of the domain is left.

    Args:
        path: The file, or "-" for standard input.
        name: The new domain's name (default: the one in the file).
        new_uuid: Give it a new uuid, so that it can run beside the domain that was saved.
        paused: Leave the domain paused.
        seal_key: Demand a seal that was made with this key, and covers the whole file.
        progress: Called while memory is restored.
        host: The host on which to create the domain (default: this one).

    Raises:
        RequestError: The file cannot be opened, or another domain has the name or uuid.
        StreamError: The file is damaged.
        GuestError: The guest's memory is damaged.
        HostError: Xen refused an operation.
    """
    from xenpv.restore.restore import restore_domain  # noqa: PLC0415  NumPy

    source = Input.open(path)
    try:
        with _open_host(host) as xen:
            return restore_domain(
                xen, source, name=name, new_uuid=new_uuid, paused=paused, seal_key=seal_key, progress=progress
            )
    finally:
        source.close()


def migrate(
    name: str,
    destination: str,
    *,
    live: bool | PrecopyPolicy = True,
    paused: bool = False,
    timeout: float = 60.0,
    progress: ProgressCallback | None = None,
    host: Mover | None = None,
) -> SentDomain:
    """Move a running domain to another host.

    ``xenpv receive`` runs there, or ssh starts it.

    Exactly one side may run the domain at any moment. After an error it runs on here.

    Args:
        name: The domain's number, uuid or name.
        destination: A host to reach by ssh, or ``tcp:HOST:PORT``, ``unix:PATH``, ``fd:IN,OUT``.
        live: Send memory while the domain runs. A PrecopyPolicy says when to stop it. False stops it first.
        paused: Leave the domain paused on the other host.
        timeout: Seconds that the guest may take to suspend.
        progress: Called while memory is sent.
        host: The host of the domain (default: this one).

    Raises:
        RequestError: The domain cannot be migrated as it is, or the other side refuses it.
        GuestError: The guest's p2m or page tables are damaged.
        HostError: There is no such domain, or Xen refused an operation.
        OSError: The other side cannot be reached, or the connection dropped.
    """
    from xenpv.host.protocol import find_domain  # noqa: PLC0415  NumPy
    from xenpv.migrate.sender import send_domain  # noqa: PLC0415
    from xenpv.migrate.transport import connect  # noqa: PLC0415
    from xenpv.save.file import configuration  # noqa: PLC0415
    from xenpv.save.precopy import PrecopyPolicy  # noqa: PLC0415

    precopy = (PrecopyPolicy() if live else None) if isinstance(live, bool) else live
    with _open_host(host) as xen, connect(destination) as link:
        domid = find_domain(xen, name).domid
        config = configuration(xen, domid)
        return send_domain(
            xen, domid, link, config=config, live=precopy, paused=paused, suspend_timeout=timeout, progress=progress
        )


@overload
def build(
    kernel: str,
    *,
    memory: int,
    vcpus: int = ...,
    cmdline: str = ...,
    ramdisk: str | None = ...,
    name: str | None = ...,
    progress: ProgressCallback | None = ...,
    host: Mover | None = ...,
) -> Built: ...


@overload
def build(
    kernel: str,
    output: str,
    *,
    memory: int,
    vcpus: int = ...,
    cmdline: str = ...,
    ramdisk: str | None = ...,
    name: str | None = ...,
    force: bool = ...,
    progress: ProgressCallback | None = ...,
) -> Summary: ...


def build(
    kernel: str,
    output: str | None = None,
    *,
    memory: int,
    vcpus: int = 1,
    cmdline: str = "",
    ramdisk: str | None = None,
    name: str | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
    host: Mover | None = None,
) -> Built | Summary:
    """Build a PV domain from a kernel, paused on a host or in a save file.

    A save file needs no hypervisor.

    Args:
        kernel: The path of a vmlinuz or vmlinux.
        output: The save file to write (default: build on a host).
        memory: Bytes of memory.
        vcpus: Number of vcpus.
        cmdline: The kernel's command line.
        ramdisk: The path of a ramdisk.
        name: The domain's name (default: the name of the kernel's file).
        force: Replace an existing file even if it is no saved domain.
        progress: Called while memory is filled.
        host: The host on which to build (default: this one).

    Returns:
        The paused domain, or figures of the save file.

    Raises:
        ImageError: The file is no PV kernel.
        OSError: The kernel or ramdisk cannot be read, for example FileNotFoundError.
        RequestError: Memory, vcpus or ramdisk do not fit.
        HostError: Xen refused an operation.
    """
    ramdisk_data = Path(ramdisk).read_bytes() if ramdisk is not None else b""
    request = Request(memory, len(ramdisk_data), vcpus, cmdline)
    image = KernelImage.parse(Path(kernel).read_bytes())
    domain_name, uuid = name if name is not None else Path(kernel).name, str(uuid4())
    if output is not None:
        from xenpv.build.offline import HOST_BYTES, build_file, plan_file  # noqa: PLC0415  NumPy
        from xenpv.host.model.host import ModelHost  # noqa: PLC0415
        from xenpv.io.atomic_output import Output  # noqa: PLC0415
        from xenpv.io.file_kind import FileKind  # noqa: PLC0415

        layout = plan_file(image, request)
        model = ModelHost((layout.nr_pages << 12) + HOST_BYTES, sparse=True)
        inputs = [kernel] if ramdisk is None else [kernel, ramdisk]
        with Output.open(output, replaces={FileKind.SAVED_DOMAIN}, inputs=inputs, force=force) as file:
            return build_file(model, image, layout, ramdisk_data, file, name=domain_name, uuid=uuid, progress=progress)
    from xenpv.build.build import build as build_domain  # noqa: PLC0415
    from xenpv.source.config import boot_source, libxl_config  # noqa: PLC0415

    layout = plan(image, request)
    config = libxl_config(
        domain_name,
        uuid,
        pages=layout.nr_pages,
        vcpus=layout.vcpus,
        boot=boot_source(str(kernel), str(ramdisk) if ramdisk is not None else None, cmdline),
    )
    with _open_host(host) as xen:
        if any(domain.name == domain_name for domain in xen.domains()):
            raise RequestError(f"a domain {domain_name!r} exists already; choose another name")
        return build_domain(
            xen, image, layout, ramdisk_data, name=domain_name, uuid=uuid, config=config, progress=progress
        )


def convert(
    path: str,
    output: str,
    *,
    options: ConvertOptions | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> ConversionResult:
    """Convert a save file of any version and envelope into today's stream, version 3.

    The output appears only when it is complete.

    Args:
        path: The file to convert, or "-" for standard input.
        output: The file to write, or "-" for standard output.
        options: Envelope, configuration and batch size of the output (default: as in the input).
        force: Write the output even if it would not restore.
        progress: Called while the file is read.

    Raises:
        RequestError: A file cannot be opened, or the options do not fit.
        StreamError: The input is damaged, or the output would not restore.
    """
    from xenpv.convert.convert import ConvertOptions  # noqa: PLC0415  NumPy
    from xenpv.convert.file import convert as convert_input  # noqa: PLC0415

    source = Input.open(path)
    try:
        return convert_input(source, output, options or ConvertOptions(), force=force, progress=progress)
    finally:
        source.close()


@contextmanager
def _open_host(host: Mover | None) -> Iterator[Mover]:
    """Open this host's Xen, and close it at the end. A host that is given stays open."""
    if host is not None:
        yield host
        return
    from xenpv.host.xen.host import XenHost  # noqa: PLC0415  Xen's libraries

    with XenHost() as xen:
        yield xen
