"""A domain's nodes in xenstore, as libxl lays them out: what xl, xenconsoled and the guest's drivers look for.

Data only; who has a xenstore writes them. xen.git:docs/misc/xenstore-paths.pandoc, tools/libs/light/libxl_create.c,
libxl_dom.c, libxl_console.c
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from xenpv.frames import PAGE_SIZE, DomId
from xenpv.host.protocol import Daemons, DomainInfo, Ring

_CONSOLE_LIMIT = 1 << 20  # bytes that xenconsoled keeps of what nobody reads
CONTROL = "control/shutdown"  # of a domain's own nodes: what a toolstack asks of it
SLACK = 256  # pages: libxl lets a domain have 1 MiB more than its memory (LIBXL_MAXMEM_CONSTANT)
_INITIALISING = 1  # XenbusStateInitialising


class Access(Enum):
    """What the domain may do; dom0 may do everything."""

    NOTHING = 0
    READ = 1
    WRITE = 2


class Node(NamedTuple):
    """A node and its value."""

    path: str
    value: str = ""
    access: Access = Access.READ


def home(domid: DomId) -> str:
    """Where a domain's own nodes are."""
    return f"/local/domain/{domid}"


def created(domid: DomId, name: str | None, uuid: str | None) -> list[Node]:
    """Of a new domain. Parents stand before their children."""
    at = home(domid)
    nodes = [Node(at)]
    if uuid is not None:
        nodes += [Node(f"/vm/{uuid}"), Node(f"/vm/{uuid}/uuid", uuid), Node(f"{at}/vm", f"/vm/{uuid}")]
    nodes += named(domid, name, uuid) if name is not None else []
    nodes += [Node(f"{at}/domid", str(domid))]
    nodes += [Node(f"{at}/{path}") for path in ("cpu", "memory", "device", "control")]
    nodes += [
        Node(f"{at}/control/platform-feature-multiprocessor-suspend", "1"),
        Node(f"{at}/control/platform-feature-xs_reset_watches", "1"),
    ]
    own = ["device/suspend/event-channel", "data", "drivers", "feature", "attr", "error"]
    control = ("shutdown", "feature-poweroff", "feature-reboot", "feature-suspend", "sysrq")
    own += [f"control/{one}" for one in control]
    nodes += [Node(f"{at}/{path}", access=Access.WRITE) for path in own]
    xl = f"/libxl/{domid}"
    return nodes + [Node(path, value, Access.NOTHING) for path, value in ((xl, ""), (f"{xl}/type", "pv"))]


def named(domid: DomId, name: str, uuid: str | None) -> list[Node]:
    """What a domain is called."""
    vm = [Node(f"/vm/{uuid}/name", name)] if uuid is not None else []
    return [*vm, Node(f"{home(domid)}/name", name)]


def introduced(info: DomainInfo, daemons: Daemons, console: Ring, xenstore: Ring) -> list[Node]:
    """Of one whose rings are to be served."""
    at, kib = home(info.domid), PAGE_SIZE >> 10
    back = f"{home(daemons.console)}/backend/console/{info.domid}"
    front = f"{at}/console"
    values = {
        f"{at}/memory/static-max": max(info.pages, info.max_pages - SLACK) * kib,
        f"{at}/memory/target": info.pages * kib,
        f"{at}/store/port": xenstore.port,
        f"{at}/store/ring-ref": xenstore.mfn,
        **{f"{at}/cpu/{vcpu}/availability": "online" for vcpu in range(info.max_vcpu + 1)},
        back: "",
        f"{back}/0/frontend": front,
        f"{back}/0/frontend-id": info.domid,
        f"{back}/0/online": 1,
        f"{back}/0/state": _INITIALISING,
        f"{back}/0/protocol": "vt100",
        f"{front}/backend": f"{back}/0",
        f"{front}/backend-id": daemons.console,
        f"{front}/limit": _CONSOLE_LIMIT,
        f"{front}/type": "xenconsoled",
        f"{front}/output": "pty",
        f"{front}/tty": "",
        f"{front}/port": console.port,
        f"{front}/ring-ref": console.mfn,
    }
    xl = f"/libxl/{info.domid}/device/console/0"
    return [
        *(Node(path, str(value)) for path, value in values.items()),
        Node(f"{xl}/frontend", front, Access.NOTHING),
        Node(f"{xl}/backend", f"{back}/0", Access.NOTHING),
    ]


def all_of(domid: DomId, daemons: Daemons, uuid: str | None) -> list[str]:
    """What goes with a domain, and all below; ``uuid`` is None where another domain has the same."""
    vm = [f"/vm/{uuid}"] if uuid is not None else []
    return [f"{home(daemons.console)}/backend/console/{domid}", home(domid), *vm, f"/libxl/{domid}"]
