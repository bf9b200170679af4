"""A domain's nodes in xenstore, as libxl writes them. Data only.

Source: xen.git:docs/misc/xenstore-paths.pandoc, tools/libs/light/{libxl_create,libxl_dom,libxl_console}.c
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from xenpv.frames import PAGE_SIZE, DomId
from xenpv.host.protocol import DOM0, Daemons, DomainInfo, Ring

_CONSOLE_LIMIT = 1 << 20  # bytes of unread output that xenconsoled buffers
CONTROL_SHUTDOWN = "control/shutdown"  # below a domain's home: the shutdown request
MAX_MEM_SLACK = 256  # pages: libxl lets a domain have 1 MiB more than its memory (LIBXL_MAXMEM_CONSTANT)
_INITIALISING = 1  # XenbusStateInitialising


class Access(Enum):
    """The domain's access to a node. Dom0 has full access."""

    NOTHING = 0
    READ = 1
    WRITE = 2


class Node(NamedTuple):
    """A node, its value, and the domain's access to it."""

    path: str
    value: str = ""
    access: Access = Access.READ


def home(domid: DomId) -> str:
    """Return the path of a domain's own nodes."""
    return f"/local/domain/{domid}"


def creation_nodes(domid: DomId, name: str | None, uuid: str | None) -> list[Node]:
    """Return the nodes of a new domain. Parents precede their children."""
    own = home(domid)
    nodes = [Node(own)]
    if uuid is not None:
        nodes += [Node(f"/vm/{uuid}"), Node(f"/vm/{uuid}/uuid", uuid), Node(f"{own}/vm", f"/vm/{uuid}")]
    nodes += name_nodes(domid, name, uuid) if name is not None else []
    nodes += [Node(f"{own}/domid", str(domid))]
    nodes += [Node(f"{own}/{path}") for path in ("cpu", "memory", "device", "control")]
    nodes += [
        Node(f"{own}/control/platform-feature-multiprocessor-suspend", "1"),
        Node(f"{own}/control/platform-feature-xs_reset_watches", "1"),
    ]
    writable = ["device/suspend/event-channel", "data", "drivers", "feature", "attr", "error"]
    control = ("shutdown", "feature-poweroff", "feature-reboot", "feature-suspend", "sysrq")
    writable += [f"control/{node}" for node in control]
    nodes += [Node(f"{own}/{path}", access=Access.WRITE) for path in writable]
    xl = f"/libxl/{domid}"
    return nodes + [Node(path, value, Access.NOTHING) for path, value in ((xl, ""), (f"{xl}/type", "pv"))]


def name_nodes(domid: DomId, name: str, uuid: str | None) -> list[Node]:
    """Return the nodes of a domain's name."""
    vm = [Node(f"/vm/{uuid}/name", name)] if uuid is not None else []
    return [*vm, Node(f"{home(domid)}/name", name)]


def introduction_nodes(info: DomainInfo, daemons: Daemons, console: Ring, xenstore: Ring) -> list[Node]:
    """Return the nodes of a domain's rings, memory and vcpus."""
    own, kib = home(info.domid), PAGE_SIZE >> 10
    backend = f"{home(daemons.console)}/backend/console/{info.domid}"
    frontend = f"{own}/console"
    values = {
        f"{own}/memory/static-max": max(info.pages, info.max_pages - MAX_MEM_SLACK) * kib,
        f"{own}/memory/target": info.pages * kib,
        f"{own}/store/port": xenstore.port,
        f"{own}/store/ring-ref": xenstore.mfn,
        **{f"{own}/cpu/{vcpu}/availability": "online" for vcpu in range(info.max_vcpu + 1)},
        backend: "",
        f"{backend}/0/frontend": frontend,
        f"{backend}/0/frontend-id": info.domid,
        f"{backend}/0/online": 1,
        f"{backend}/0/state": _INITIALISING,
        f"{backend}/0/protocol": "vt100",
        f"{frontend}/backend": f"{backend}/0",
        f"{frontend}/backend-id": daemons.console,
        f"{frontend}/limit": _CONSOLE_LIMIT,
        f"{frontend}/type": "xenconsoled",
        f"{frontend}/output": "pty",
        f"{frontend}/tty": "",
        f"{frontend}/port": console.port,
        f"{frontend}/ring-ref": console.mfn,
    }
    xl = f"/libxl/{info.domid}/device/console/0"
    return [
        *(Node(path, str(value)) for path, value in values.items()),
        Node(f"{xl}/frontend", frontend, Access.NOTHING),
        Node(f"{xl}/backend", f"{backend}/0", Access.NOTHING),
    ]


def find_devices(domid: DomId, list_nodes: Callable[[str], list[str]]) -> list[str]:
    """Return a domain's devices besides its console.

    For example "vbd 51712", "vif 0", "device model".

    Args:
        domid: The domain.
        list_nodes: Returns the names of a node's children; none for a node that is not there.

    Source: xen.git:docs/misc/xenstore-paths.pandoc (~/device/$DEVID), tools/libs/light/libxl_device.c
    libxl__device_frontend_path(), libxl__device_libxl_path(), libxl_dm.c (device-model/$DOMID)
    """
    devices = {
        f"{kind} {number}"
        for folder in (f"{home(domid)}/device", f"/libxl/{domid}/device")
        for kind in list_nodes(folder)
        if kind != "suspend"  # the guest's event channel
        for number in list_nodes(f"{folder}/{kind}")
        if (kind, number) != ("console", "0")
    }
    model = ["device model"] if list_nodes(f"{home(DOM0)}/device-model/{domid}") else []
    return sorted(devices) + model


def root_paths(domid: DomId, daemons: Daemons, uuid: str | None) -> list[str]:
    """Return the roots of all nodes of a domain.

    Pass None for ``uuid`` if another domain has the same one.
    """
    vm = [f"/vm/{uuid}"] if uuid is not None else []
    return [f"{home(daemons.console)}/backend/console/{domid}", home(domid), *vm, f"/libxl/{domid}"]
