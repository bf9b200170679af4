"""``xenpv list``: the domains of this host."""

from __future__ import annotations

from dataclasses import asdict

import click

from xenpv.cli.terminal import JSON, print_json, print_table
from xenpv.frames import PAGE_SIZE
from xenpv.host.protocol import DomainInfo
from xenpv.host.xen.host import XenHost
from xenpv.text import printable, size

_SHUTDOWN_REASONS = ("poweroff", "reboot", "suspend", "crash", "watchdog", "soft reset")


@click.command("list")
@JSON
def list(as_json: bool) -> None:  # noqa: A001  the verb's name
    """List the domains of this host: id, name, uuid, memory, vcpus, state and type.

    Needs root in dom0. It only reads.

    \b
    Examples:
      xenpv list
      xenpv list --json | jq '.[] | select(.hvm | not) | .name'
    """
    with XenHost() as host:
        domains, xenstore_error = host.domains(), host.xenstore_error
    if xenstore_error is not None:
        click.echo(f"xenpv: note: no names are known: {xenstore_error}", err=True)
    if as_json:
        print_json(
            [asdict(domain) | {"memory": domain.pages * PAGE_SIZE, "vcpus": domain.max_vcpu + 1} for domain in domains]
        )
        return
    rows = [
        [
            str(domain.domid),
            printable(domain.name) if domain.name else "",
            domain.uuid or "",
            size(domain.pages * PAGE_SIZE),
            str(domain.max_vcpu + 1),
            state(domain),
            "HVM or PVH" if domain.hvm else f"PV, {8 * domain.width}-bit",
        ]
        for domain in domains
    ]
    print_table("", ["id#", "name", "uuid", "memory#", "vcpus#", "state", "type"], rows)


def state(domain: DomainInfo) -> str:
    """Return a domain's state, as the table prints it."""
    if domain.dying:
        return "dying"
    if domain.shutdown:
        reason = domain.shutdown_reason
        name = None if reason is None else dict(enumerate(_SHUTDOWN_REASONS)).get(reason)
        return f"shut down: {name or reason}"
    return "paused" if domain.paused else "running"
