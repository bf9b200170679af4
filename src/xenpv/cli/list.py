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
    """The domains that run on this machine: id, name, uuid, memory, vcpus, state and width.

    Needs Xen's dom0 and root. Changes nothing, stops nothing.
    """
    with XenHost() as host:
        domains = host.domains()
    if as_json:
        print_json([asdict(d) | {"memory": d.pages * PAGE_SIZE, "vcpus": d.max_vcpu + 1} for d in domains])
        return
    rows = [
        [
            str(d.domid),
            printable(d.name) if d.name else "",
            d.uuid or "",
            size(d.pages * PAGE_SIZE),
            str(d.max_vcpu + 1),
            state(d),
            "HVM or PVH" if d.hvm else f"PV, {8 * d.width}-bit",
        ]
        for d in domains
    ]
    print_table("", ["id#", "name", "uuid", "memory#", "vcpus#", "state", "kind"], rows)


def state(domain: DomainInfo) -> str:
    """List the domains of this host: id, name, uuid, memory, vcpus, state and type.

    Needs root in dom0. It only reads.

    \b
    Examples:
      xenpv list
      xenpv list --json | jq '.[] | select(.hvm | not) | .name'     the PV domains
    """
    if domain.dying:
        return "dying"
    if domain.shutdown:
        reason = domain.shutdown_reason
        name = None if reason is None else dict(enumerate(_SHUTDOWN_REASONS)).get(reason)
        return f"shut down: {name or reason}"
    return "paused" if domain.paused else "running"
