"""``xenpv save``: a PV domain into a file."""

from __future__ import annotations

from dataclasses import asdict

import click

from xenpv.cli.outcomes import describe_state, print_rollback
from xenpv.cli.terminal import FORCE, JSON, SEAL, SEAL_KEY, SECONDS, make_sealer, print_json, progress_bar
from xenpv.frames import PAGE_SIZE
from xenpv.text import printable, size

TIMEOUT = click.option("--timeout", type=SECONDS, default=60.0, show_default=True,
                       metavar="SECONDS", help="Give up if the guest has not suspended by then.")  # fmt: skip


@click.command()
@click.argument("target", metavar="DOM")
@click.argument("file", metavar="FILE", type=click.Path(allow_dash=True), required=False)
@click.option("-c", "--checkpoint", is_flag=True, help="Keep the domain running after it is saved.")
@click.option(
    "-p", "--paused", is_flag=True, help="Keep the domain, paused, after it is saved (xl unpause resumes it)."
)
@click.option("--xenpv-only", is_flag=True, help="Allow pfns beyond 16 TiB, in a record that only xenpv restores.")
@click.option(
    "--preflight", is_flag=True, help="Check whether the domain can be saved, and report its size; change nothing."
)
@SEAL
@SEAL_KEY
@TIMEOUT
@FORCE
@JSON
def save(
    target: str,
    file: str | None,
    checkpoint: bool,
    paused: bool,
    xenpv_only: bool,
    preflight: bool,
    seal: bool,
    seal_key: str | None,
    timeout: float,
    force: bool,
    as_json: bool,
) -> None:
    """Save a PV domain to FILE, as xl save does.

    The domain is then gone from this host.

    DOM is an id, a uuid or a name; "-" as FILE writes to a pipe. The guest suspends, is saved, and is destroyed only
    when FILE is complete; FILE appears only then. After a failure, or at Ctrl-C, the guest runs on and no FILE is left.
    Restore it with `xl restore FILE` or `xenpv restore FILE`; `xenpv verify FILE` checks beforehand.

    A domain with disks, network interfaces or a device model is refused: use xl save, which detaches them.

    \b
    Examples:
      xenpv save --preflight web         p2m form, number of pages, file size
      xenpv save web web.save
      xenpv save --seal web web.save                 with digests; xl restore passes over them
      xenpv save -c web - | zstd > web.save.zst      the domain keeps running
    """
    if (file is None) is not preflight:
        raise click.UsageError("give DOM and FILE, or --preflight and DOM")
    from xenpv.host.protocol import find_domain  # noqa: PLC0415
    from xenpv.host.xen.host import XenHost  # noqa: PLC0415  NumPy, and Xen's libraries
    from xenpv.save import file as saving  # noqa: PLC0415

    sealer = make_sealer(seal, seal_key)
    with XenHost() as host:
        domid = find_domain(host, target).domid
        if file is None:
            plan = saving.preflight(host, domid, libxc_compatible=not xenpv_only)
            if as_json:
                print_json(asdict(plan))
            else:
                click.echo(f"{plan.name}: can be saved; p2m: {plan.form}, up to pfn {plan.entries - 1:#x}")
                click.echo(f"{plan.pages} pages, {size(plan.pages * PAGE_SIZE)}; file size: about {size(plan.bytes)}")
            return

        keep = checkpoint or paused
        with progress_bar() as bar:
            saved = saving.save_file(
                host,
                domid,
                file,
                suspend_timeout=timeout,
                keep=keep,
                paused=paused,
                force=force,
                libxc_compatible=not xenpv_only,
                seal=sealer,
                on_rollback=print_rollback,
                progress=bar,
            )
    summary, now = saved.summary, describe_state(saved.state)
    if as_json:
        numbers = {"bytes": summary.bytes, "pages": summary.pages, "tables": summary.page_tables}
        numbers |= {"lost": summary.not_owned}
        print_json({"domain": summary.name, "file": file, **numbers, "seconds_down": saved.downtime, "now": now})
    else:
        line = f"{summary.name}: {summary.pages} pages, {size(summary.bytes)}, to {file}; it {now}"
        click.echo(printable(line), err=True)
