"""``xenpv save``: a PV domain into a file."""

from __future__ import annotations

from dataclasses import asdict

import click

from xenpv.cli.terminal import JSON, print_json, progress_bar
from xenpv.frames import PAGE_SIZE
from xenpv.text import size

TIMEOUT = click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=60.0, metavar="SECONDS",
                       help="How long the guest may take to suspend; 60 unless said.")  # fmt: skip


@click.command()
@click.argument("target", metavar="DOM")
@click.argument("file", metavar="FILE", type=click.Path(allow_dash=True), required=False)
@click.option("-c", "--checkpoint", is_flag=True, help="Let the domain run on once it is saved.")
@click.option("-p", "--paused", is_flag=True, help="Leave it paused once it is saved (xl unpause lets it run on).")
@click.option("--xenpv-only", is_flag=True, help="Take a record that only xenpv restores: for pfns beyond 16 TiB.")
@click.option("--preflight", is_flag=True, help="Say what would be saved, and whether it can be; change nothing.")
@TIMEOUT
@JSON
def save(
    target: str,
    file: str | None,
    checkpoint: bool,
    paused: bool,
    xenpv_only: bool,
    preflight: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Save a PV domain to FILE, as xl save does; it is gone from this host then.

    DOM is an id, a uuid or a name; "-" writes to a pipe. The guest is asked to suspend, saved, and destroyed once FILE
    is whole: FILE has its name only then. If anything goes wrong, or at Ctrl-C, the guest runs on, and nothing is left
    of FILE. `xl restore FILE` and `xenpv restore FILE` bring it back, `xenpv verify FILE` says beforehand whether they
    will. Of a domain with disks or networks use xl save: xenpv does not let go of devices.

    \b
    xenpv save --preflight web         what form of p2m, how many pages, how large; can it be saved
    xenpv save web web.save
    xenpv save -c web - | zstd > web.save.zst      it runs on
    """
    if (file is None) is not preflight:
        raise click.UsageError("say DOM and FILE, or --preflight and DOM")
    from xenpv.host.protocol import find_domain  # noqa: PLC0415
    from xenpv.host.xen.host import XenHost  # noqa: PLC0415
    from xenpv.io.signals import interruptible  # noqa: PLC0415  NumPy, and Xen's libraries
    from xenpv.save.file import preflight as look  # noqa: PLC0415
    from xenpv.save.file import save_file  # noqa: PLC0415

    with XenHost() as host:
        domid = find_domain(host, target).domid
        if file is None:
            seen = look(host, domid, stock=not xenpv_only)
            if as_json:
                print_json(asdict(seen))
            else:
                click.echo(f"{seen.name}: can be saved, by {seen.form}, up to pfn {seen.entries - 1:#x}")
                click.echo(f"{seen.pages} pages, {size(seen.pages * PAGE_SIZE)}; the file: about {size(seen.bytes)}")
            return

        def say(what: str) -> None:
            click.echo(f"xenpv: {what}", err=True)

        keep = checkpoint or paused
        with interruptible(), progress_bar() as bar:
            ended = save_file(
                host,
                domid,
                file,
                timeout=timeout,
                keep=keep,
                paused=paused,
                stock=not xenpv_only,
                say=say,
                progress=bar,
            )
    summary = ended.summary
    if as_json:
        numbers = {"bytes": summary.bytes, "pages": summary.pages, "tables": summary.tables, "lost": summary.lost}
        print_json({"domain": summary.name, "file": file, **numbers, "seconds_down": ended.downtime, "now": ended.now})
    else:
        click.echo(f"{summary.name}: {summary.pages} pages, {size(summary.bytes)}, to {file}; it {ended.now}", err=True)
