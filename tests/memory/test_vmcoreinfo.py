"""VMCOREINFO found in a domain's memory: where Linux keeps it, and among what only looks like it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.vmcoreinfo import RELEASE, UTS_OFFSET, text
from xenpv.abi.declare import Width
from xenpv.errors import Fault, HostError
from xenpv.frames import U8, U64
from xenpv.memory.vmcoreinfo import find_vmcoreinfo, vmcoreinfo_value
from xenpv.source.open import open_domain
from xenpv.source.saved import FilePages

PAGE = 4096


class Guest:
    """A domain with a kernel's uts name in it, and places for what a test puts there."""

    def __init__(self, width: Width = 8) -> None:
        self.domain: Domain = pv_domain(width=width)
        self.data = self.domain.places.data
        uts = self.data[-1]
        self.uts = self.domain.vaddrs[uts]
        fields = (b"Linux", b"(none)", RELEASE, b"#1 SMP", b"x86_64", b"(none)")
        self.put(uts, UTS_OFFSET, b"".join(field.ljust(65, b"\0") for field in fields))

    def put(self, pfn: int, offset: int, content: bytes) -> None:
        """Put content into pages that are empty but for it, from an offset in the first on."""
        content = bytes(offset) + content
        for at in range(0, len(content), PAGE):
            self.domain.pages[pfn + at // PAGE][:] = content[at : at + PAGE].ljust(PAGE, b"\0")

    def found(self, tmp_path: Path) -> bytes | None:
        path = tmp_path / "guest.save"
        path.write_bytes(self.domain.to_bytes())
        with open_domain(str(path)) as domain:
            return find_vmcoreinfo(domain)


@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("offset", [0, 24, 4096 - 8, 2048])
def test_find_vmcoreinfo_in_linux_pages_succeeds(tmp_path: Path, width: Width, offset: int) -> None:
    """As text in a page of its own, behind a note's header, and in an array across two pages."""
    guest = Guest(width)
    guest.put(guest.data[2], offset, text(guest.uts) + b"\0")
    assert guest.found(tmp_path) == text(guest.uts)


def test_find_vmcoreinfo_without_text_returns_none(tmp_path: Path) -> None:
    guest = Guest()
    assert guest.found(tmp_path) is None
    guest.put(guest.data[2], 8, b"OSRELEASE=%s\n\0VMCOREINFO\0")  # Linux's own format string
    assert guest.found(tmp_path) is None


def test_find_vmcoreinfo_prefers_the_kernels_own(tmp_path: Path) -> None:
    guest = Guest()
    guest.put(guest.data[1], 0, text(guest.domain.vaddrs[guest.data[0]], b"6.6.6-forged"))
    guest.put(guest.data[3], 0, text(guest.uts))
    assert guest.found(tmp_path) == text(guest.uts)


def test_find_vmcoreinfo_unverifiable_text_is_returned(tmp_path: Path) -> None:
    guest = Guest()
    guest.put(guest.data[1], 0, text(0xFFFF_8000_0000_0000))
    assert guest.found(tmp_path) == text(0xFFFF_8000_0000_0000)


@pytest.mark.parametrize(
    "junk",
    [
        text(0, more=b"\xff\n"),
        text(0, more=b"no end of line"),
        text(0, more=b"A=" + b"x" * 2 * PAGE + b"\n"),
        text(0).replace(b"PAGESIZE", b"PAGESITE"),
        text(0).replace(b"OSRELEASE=6", b"OSRELEASE:6"),
    ],
    ids=["unprintable", "no newline", "too long", "no PAGESIZE", "no release"],
)
def test_find_vmcoreinfo_malformed_text_returns_none(tmp_path: Path, junk: bytes) -> None:
    guest = Guest()
    guest.put(guest.data[1], 0, junk)
    assert guest.found(tmp_path) is None


@pytest.mark.parametrize("uts", [b"-1", b"zz", b"9" * 3000, b"ffffffffffffffff", b"7fffffffffff"])
def test_find_vmcoreinfo_unmapped_uts_name_is_not_trusted(tmp_path: Path, uts: bytes) -> None:
    guest = Guest()
    lying = text(0).replace(b"init_uts_ns)=0", b"init_uts_ns)=" + uts)
    guest.put(guest.data[1], 0, lying)
    assert guest.found(tmp_path) == lying


def test_find_vmcoreinfo_after_page_of_false_candidates_succeeds(tmp_path: Path) -> None:
    guest = Guest()
    guest.put(guest.data[1], 0, b"OSRELEAS" * 512)
    guest.put(guest.data[4], 0, text(guest.uts))
    assert guest.found(tmp_path) == text(guest.uts)


def test_find_vmcoreinfo_too_many_candidates_gives_up(tmp_path: Path) -> None:
    guest = Guest()
    for pfn in guest.data[:4]:
        guest.put(pfn, 0, b"OSRELEAS" * 512)
    guest.put(guest.data[5], 0, text(guest.uts))
    assert guest.found(tmp_path) is None


def test_find_vmcoreinfo_unreadable_pages_are_skipped(tmp_path: Path) -> None:
    """The file is cut off among its pages: those before the cut are looked through one by one."""
    guest = Guest()
    guest.put(guest.data[1], 0, text(guest.uts))
    path = tmp_path / "cut.save"
    whole = guest.domain.to_bytes()
    path.write_bytes(whole)
    with open_domain(str(path)) as domain:
        os.truncate(path, whole.index(text(guest.uts)) + PAGE)
        assert find_vmcoreinfo(domain) == text(guest.uts)


@pytest.mark.parametrize("lost", [0, 1])
def test_find_vmcoreinfo_ballooned_pages_are_skipped(
    tmp_path: Path, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = Guest()
    here, there = guest.data[1], guest.data[3]
    guest.put((there, here)[lost], 0, text(guest.uts))
    path = tmp_path / "guest.save"
    path.write_bytes(guest.domain.to_bytes())
    gone, read_pages, refused = (here, there)[lost], FilePages.pages, list[int]()

    def pages(self: FilePages, pfns: U64) -> U8:
        if gone in pfns:
            refused.append(gone)
            raise Fault("ballooned", space="pfn", address=gone)
        return read_pages(self, pfns)

    monkeypatch.setattr(FilePages, "pages", pages)
    with open_domain(str(path)) as domain:
        assert find_vmcoreinfo(domain) == text(guest.uts)
    assert refused


@pytest.mark.parametrize("call", ["pages", "read_virtual"])
def test_find_vmcoreinfo_of_a_domain_that_goes_meanwhile_raises_host_error(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HostError("no such domain", op="map", errno=errno.ESRCH)

    owner = {"pages": "xenpv.source.saved.FilePages", "read_virtual": "xenpv.memory.domain.DomainMemory"}[call]
    monkeypatch.setattr(f"{owner}.{call}", refuse)
    guest = Guest()
    guest.put(guest.data[1], 0, text(guest.uts))
    path = tmp_path / "guest.save"
    path.write_bytes(guest.domain.to_bytes())
    with open_domain(str(path)) as domain, pytest.raises(HostError):
        find_vmcoreinfo(domain)


def test_vmcoreinfo_value_returns_value_of_key() -> None:
    assert vmcoreinfo_value(text(0x1234), "SYMBOL(init_uts_ns)") == "1234"
    assert vmcoreinfo_value(text(0x1234), "OSRELEASE") == RELEASE.decode()
    assert vmcoreinfo_value(text(0x1234), "SYMBOL(init_uts") is None
