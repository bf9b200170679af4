"""``xenpv restore``: a PV domain out of a save file."""

from __future__ import annotations

import click

import xenpv
from xenpv.cli.terminal import CHECK_KEY, JSON, load_key, print_json, progress_bar
from xenpv.frames import PAGE_SIZE
from xenpv.host.domain_names import check_name
from xenpv.text import printable, size


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
@click.option("--name", metavar="NAME", show_default="its old name", help="Name of the restored domain.")
@click.option("--new-uuid", is_flag=True, help="Give it a new uuid: the saved domain may still run.")
@click.option("-p", "--paused", is_flag=True, help="Leave the domain paused (xl unpause starts it).")
@CHECK_KEY
@JSON
def restore(file: str, name: str | None, new_uuid: bool, paused: bool, seal_key: str | None, as_json: bool) -> None:
    """Restore a PV domain from FILE, a save file of xl or xenpv; "-" reads a pipe.

    The stream is checked while it is read. The domain starts only if all of it was right; a failure leaves nothing
    behind. The domain has memory, vcpus, a console and xenstore; for domains with disks or network interfaces use xl
    restore.

    \b
    Examples:
      xenpv restore web.save
      zstd -dc web.save.zst | xenpv restore --name web2 --new-uuid --paused -
    """
    if name is not None:
        check_name(name)
    key = load_key(seal_key)
    with progress_bar("restoring") as bar:
        restored = xenpv.restore(file, name=name, new_uuid=new_uuid, paused=paused, seal_key=key, progress=bar)
    new_name = name or restored.name
    if as_json:
        identity = {"domid": restored.domid, "name": new_name, "uuid": restored.uuid}
        sizes = {"pages": restored.pages, "entries": restored.entries, "bytes": restored.bytes}
        print_json(identity | sizes | {"running": not paused})
    else:
        state = f"restored and paused; start it with: xl unpause {restored.domid}" if paused else "running"
        click.echo(f"dom{restored.domid} ({printable(new_name or '')}), {size(restored.pages * PAGE_SIZE)}, {state}")
