"""``xenpv restore``: a PV domain out of a save file."""

from __future__ import annotations

import click

from xenpv.cli.terminal import JSON, print_json, progress_bar
from xenpv.errors import RequestError
from xenpv.frames import PAGE_SIZE
from xenpv.text import printable, size


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
@click.option("--name", metavar="NAME", help="What it is called; what it was called unless said.")
@click.option("-p", "--paused", is_flag=True, help="Leave it paused (xl unpause lets it run).")
@JSON
def restore(file: str, name: str | None, paused: bool, as_json: bool) -> None:
    """Restore a PV domain from FILE, a save file of xl's or xenpv's, or from a pipe: "-".

    The stream is checked as it comes, and the domain runs only if all of it was right; otherwise nothing is left of it.
    It has memory, vcpus, a console and xenstore; of a domain with disks or networks use xl restore.

    \b
    xenpv restore web.save
    zstd -dc web.save.zst | xenpv restore --name web2 --paused -
    """
    from xenpv.host.xen.host import XenHost  # noqa: PLC0415
    from xenpv.io.signals import interruptible  # noqa: PLC0415
    from xenpv.io.stream_input import Input  # noqa: PLC0415  NumPy, and Xen's libraries
    from xenpv.restore.restore import restore_domain  # noqa: PLC0415

    if name is not None and not (name and name.isprintable()):
        raise RequestError(f"{name!r} is no name")
    source = Input.open(file)
    try:
        with XenHost() as host, interruptible(), progress_bar("restoring") as bar:
            restored = restore_domain(host, source, name=name, paused=paused, progress=bar)
    finally:
        source.close()
    called = name or restored.name
    if as_json:
        told = {"domid": restored.domid, "name": called, "uuid": restored.uuid, "pages": restored.pages}
        print_json({**told, "entries": restored.entries, "bytes": restored.bytes, "running": not paused})
    else:
        state = f"is restored, and paused: xl unpause {restored.domid}" if paused else "runs"
        click.echo(f"dom{restored.domid} ({printable(called or '')}), {size(restored.pages * PAGE_SIZE)}, {state}")
