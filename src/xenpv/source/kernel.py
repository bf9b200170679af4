"""The Linux kernel in a domain's memory: version, banner, VMCOREINFO's symbols."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from xenpv.errors import GuestError
from xenpv.frames import PAGE_SIZE
from xenpv.memory.domain import PagedDomain
from xenpv.memory.vmcoreinfo import find_vmcoreinfo, vmcoreinfo_value
from xenpv.source.scan import search

_BANNER = b"Linux version "
_BANNER_MAX = 1024  # bytes: build host, compiler and time are in it
_CANDIDATES_MAX = 1000  # Linux has a few copies of its banner, and a few programs contain "Linux version "
_WHOLE_BANNER = re.compile(rb"Linux version (\d+\.[\x21-\x7e]+) \([\x20-\x7e]+\n")
_SYMBOL = re.compile(rb"^SYMBOL\((\w+)\)=([0-9a-f]{1,16})$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A Linux kernel.

    Attributes:
        version: Its release, as ``uname -r`` prints it.
        banner: The line "Linux version …" that it prints first, without the newline; "" if it was not found.
        symbols: Virtual addresses by name, as far as VMCOREINFO names them; empty if there is no VMCOREINFO.
    """

    version: str
    banner: str
    symbols: Mapping[str, int] = field(default_factory=dict)


def find_kernel(domain: PagedDomain) -> Kernel | None:
    """Look for a Linux kernel in all of the domain's memory; None if there is none.

    VMCOREINFO decides if there is one. Otherwise the first complete banner does, which any program in the guest could
    have written.
    """
    text = find_vmcoreinfo(domain)
    release = None if text is None else vmcoreinfo_value(text, "OSRELEASE")
    prefix = _BANNER if release is None else _BANNER + release.encode() + b" ("
    banner = _find_banner(domain, prefix)
    if text is None or release is None:
        return None if banner is None else Kernel(banner.split(" ")[2], banner)
    symbols = {match[1].decode(): int(match[2], 16) for match in _SYMBOL.finditer(text)}
    return Kernel(release, banner or "", symbols)


def _find_banner(domain: PagedDomain, prefix: bytes) -> str | None:
    """Return the first complete banner that begins with ``prefix``, or None.

    Looks at _CANDIDATES_MAX places at most: a hostile guest can fill its memory with the prefix.
    """
    for address in islice(search(domain, prefix), _CANDIDATES_MAX):
        for length in (_BANNER_MAX, PAGE_SIZE - address % PAGE_SIZE):  # the next page may not be there
            with suppress(GuestError):  # nor this one any more, in a running guest
                if match := _WHOLE_BANNER.match(domain.memory.read(address, length)):
                    return match[0].decode("ascii").rstrip("\n")
                break
    return None
