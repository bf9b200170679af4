"""A stand-in for a host with some domains, for code that only lists and finds them."""

from __future__ import annotations

import errno
from typing import Any, Self

from xenpv.frames import DomId
from xenpv.host.errors import host_error
from xenpv.host.protocol import DomainInfo


def domain_info(domid: int, name: str | None = None, uuid: str | None = None, **changes: Any) -> DomainInfo:
    """Return what Xen says of a running PV domain of 4 MiB, but for the given fields."""
    fields: dict[str, Any] = {
        "hvm": False,
        "width": 8,
        "pages": 1024,
        "max_pages": 1024,
        "shared_info_mfn": 5,
        "max_vcpu": 1,
        "paused": False,
        "shutdown": False,
        "shutdown_reason": None,
        "dying": False,
    }
    return DomainInfo(DomId(domid), name, uuid, **{**fields, **changes})


class HostStub:
    """A host that only knows the DomainInfo of its domains."""

    xenstore_error: str | None = None

    def __init__(self, *domains: DomainInfo) -> None:
        self._domains = domains

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def domains(self) -> list[DomainInfo]:
        return list(self._domains)

    def info(self, domid: DomId) -> DomainInfo:
        for one in self._domains:
            if one.domid == domid:
                return one
        raise host_error("getdomaininfo", errno.ESRCH, domid)
