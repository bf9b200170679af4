"""What the lab supports: one table, read by everything else.

A version of Xen is booted with its own hypervisor, xl and libraries. They are Debian's packages, of the suite named
here. `root` is the suite of dom0's other programs: Python of at least 3.11 with the project's dependencies must be
there, which bullseye has not, so Xen 4.14 sits on bookworm's root; 4.20's xl wants trixie's C library.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import LabError


@dataclass(frozen=True, slots=True)
class XenVersion:
    xen: str
    suite: str
    root: str
    kernel: str


SUPPORTED = (
    XenVersion(xen="4.14", suite="bullseye", root="bookworm", kernel="6.1"),
    XenVersion(xen="4.17", suite="bookworm", root="bookworm", kernel="6.1"),
    XenVersion(xen="4.20", suite="trixie", root="trixie", kernel="6.1"),
)
KERNEL_SUITES = {"6.1": "bookworm"}
GUEST_KERNEL = "6.1"
DEFAULT = "4.17"


def names() -> list[str]:
    return [version.xen for version in SUPPORTED]


def find(xen: str) -> XenVersion:
    for version in SUPPORTED:
        if version.xen == xen:
            return version
    raise LabError(f"Xen {xen} is not in the lab; it has {', '.join(names())}")
