"""Builds of which one call of the host is refused: on the model host, and in dom0 on real Xen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xenpv.errors import HostError

CALLS = (
    "memory_map",
    "populate_physmap",
    "map_writable",
    "write_frames",
    "alloc_event",
    "hypercall_page",
    "info",
    "pin_tables",
    "write_shared_info",
    "set_vcpu_context",
    "seed_grants",
    "introduce",
    "configure",
)


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
