"""Builds and restores of which one call of the host is refused: on the model host, and in dom0 on real Xen."""

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
class Breaking:
    """A call of a host that is refused at its ``nth`` time, counted from 0; it counts them."""

    call: Callable[..., Any]
    nth: int
    times: int = 0

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        self.times += 1
        if self.times - 1 == self.nth:
            raise HostError("no", op="test")
        return self.call(*args, **keywords)


def refused_in_turn(host: Any, calls: Iterable[str], make: Callable[[], DomId]) -> dict[str, str]:
    """Make a domain, with each call refused at its first time, then at its last. What was said: by "call first|last".

    What is made all the same is destroyed.
    """
    said: dict[str, str] = {}
    for call in calls:
        last = 0
        for when in ("first", "count", "last"):
            breaking = Breaking(getattr(host, call), {"first": 0, "count": -1, "last": last}[when])
            setattr(host, call, breaking)
            try:
                domid = make()
            except HostError as e:
                said[f"{call} {when}"] = str(e)
                domid = None
            finally:
                delattr(host, call)
            if domid is not None:
                host.destroy(domid)
            last = breaking.times - 1
    return said
