"""Builds and restores during which the host refuses one call: on the model host, and in dom0 on real Xen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from xenpv.errors import HostError
from xenpv.frames import DomId

BUILDING = (
    "set_memory_map",
    "populate_physmap",
    "map_writable",
    "write_frames",
    "alloc_event_channel",
    "init_hypercall_page",
    "info",
    "pin_tables",
    "write_shared_info",
    "set_vcpu_context",
    "seed_grants",
    "introduce",
    "set_configuration",
)
RESTORING = (
    "create", "set_memory_map", "daemons", "alloc_event_channel", "info", "set_cpu_policy", "populate_physmap",
    "map_writable", "write_shared_info", "set_tsc_info", "set_vcpu_context", "set_vcpu_state", "pin_tables",
    "seed_grants", "introduce", "set_configuration", "unpause",
)  # fmt: skip


@dataclass
class RefusingCall:
    """A call of a host that is refused the ``nth`` time, counted from 0 (-1: never); ``calls`` counts them."""

    call: Callable[..., Any]
    nth: int
    calls: int = 0

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self.calls += 1
        if self.calls - 1 == self.nth:
            raise HostError("no", op="test")
        return self.call(*args, **keywords)


def refuse_each_call(host: Any, calls: Iterable[str], make: Callable[[], DomId]) -> dict[str, str]:
    """Make a domain again and again, with each call refused at its first and at its last time.

    Destroys every domain that is made in spite of it.

    Args:
        host: The host, whose methods are replaced for the time.
        calls: Names of its methods.
        make: Makes the domain.

    Returns:
        The error messages, by "call first" and "call last".
    """
    messages: dict[str, str] = {}
    for call in calls:
        last = 0
        for when in ("first", "count", "last"):
            refusing = RefusingCall(getattr(host, call), {"first": 0, "count": -1, "last": last}[when])
            setattr(host, call, refusing)
            try:
                domid = make()
            except HostError as e:
                messages[f"{call} {when}"] = str(e)
                domid = None
            finally:
                delattr(host, call)
            if domid is not None:
                host.destroy(domid)
            last = refusing.calls - 1
    return messages
