"""MemoryLoader: pages in any order, repeated, with and without content; and which frames they get."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tests.support.model_invariants import check_invariants
from tests.support.restoring import (
    RecordingHost,
    assert_same_pages,
    guest_on,
    memory_of,
    mfn_of,
    restore_stream,
    stream_input,
)
from tests.support.saved_files import piped
from tests.support.saving import BOTH, CONFIG, MemorySink, suspended
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.stream import BROKEN, NOTAB, PAGE, XALLOC, XTAB, Piece, Stream, Wire
from xenpv.abi.declare import Width
from xenpv.host.model.host import ModelHost
from xenpv.io.stream_input import Input
from xenpv.restore.restore import Restored, restore_domain
from xenpv.save.save import save

WIRE = Wire()


def stream_of(domain: Domain, *more_records: Piece) -> Stream:
    """The stream of a domain, with more records after its pages."""
    return domain.to_stream("xl").before("X86_TSC_INFO", *more_records)


def test_load_page_sent_again_overwrites_it() -> None:
    domain = pv_domain()
    first, second = domain.places.data[:2]
    again = [(first, NOTAB), (second, NOTAB), (first, NOTAB)]
    more = WIRE.page_data(again, [b"a" * PAGE, b"b" * PAGE, b"c" * PAGE])
    host, restored = restore_stream(stream_of(domain, more))
    pages = memory_of(host, restored.domid)
    assert (pages[first], pages[second]) == (b"c" * PAGE, b"b" * PAGE)
    assert restored.pages == len(domain.types) - 1


def test_load_unordered_and_repeated_pfns_gives_each_one_frame() -> None:
    """Nor is a frame mapped twice at once: real Xen would allow it, the Host protocol does not."""
    domain = pv_domain()
    low, high = domain.places.data[0], domain.places.data[-1]
    stream = domain.to_stream("xl", batch=16).drop("PAGE_DATA")
    entries = [(high, NOTAB), (low, NOTAB), (high, NOTAB)]
    stream.before("X86_TSC_INFO", WIRE.page_data(entries, [b"a" * PAGE, b"b" * PAGE, b"c" * PAGE]))
    stream.before("X86_TSC_INFO", *domain.page_data(WIRE, 16, sorted(set(domain.types) - {low, high})))
    host, restored = restore_stream(stream, RecordingHost())
    pages = memory_of(host, restored.domid)
    assert (pages[low], pages[high]) == (b"b" * PAGE, b"c" * PAGE)
    assert restored.pages == host.info(restored.domid).pages == len(domain.types) - 1


def test_load_page_sent_again_with_other_type_has_last_type() -> None:
    """A page that was a pinned table first and is data at the end is neither pinned nor a table."""
    domain = pv_domain()
    page = domain.places.data[0]
    stream = domain.to_stream("xl")
    junk = np.full(512, 0xFFFF_F000_0000_0002, np.uint64).tobytes()  # pfns that no domain has, not present
    stream.before("PAGE_DATA", WIRE.page_data([(page, 4 | 8)], [junk]))
    host, restored = restore_stream(stream)
    assert host.page_types(restored.domid, np.array([mfn_of(host, restored.domid, page)], np.uint64)).tolist() == [0]
    assert memory_of(host, restored.domid)[page] == bytes(domain.pages[page])


@pytest.mark.parametrize("kind", [pytest.param(XTAB, id="XTAB"), pytest.param(BROKEN, id="BROKEN")])
def test_load_page_sent_again_without_frame_keeps_frame_and_is_no_table(kind: int) -> None:
    domain = pv_domain()
    page = domain.places.data[0]
    stream = domain.to_stream("xl")
    stream.before("PAGE_DATA", WIRE.page_data([(page, 1 | 8)], [bytes(PAGE)]))
    stream.before("X86_TSC_INFO", WIRE.page_data([(page, kind)], []))
    host, restored = restore_stream(stream)
    mfn = mfn_of(host, restored.domid, page)
    assert host.page_types(restored.domid, np.array([mfn], np.uint64)).tolist() == [0]
    assert p2m_entry(host, restored, domain, page) == mfn


def p2m_entry(host: ModelHost, restored: Restored, domain: Domain, pfn: int) -> int:
    """The entry of the guest's own p2m."""
    per_leaf = PAGE // domain.width
    leaf = memory_of(host, restored.domid)[int(domain.p2m_pfns[pfn // per_leaf])]
    return int(np.frombuffer(leaf, f"<u{domain.width}")[pfn % per_leaf])


@BOTH
def test_load_page_without_content_is_populated_and_in_p2m(width: Width) -> None:
    domain = pv_domain(width=width, pfns=[*range(60), *range(2000, 2010)])
    page, unsent = 2003, 2011
    domain.types[page] = XALLOC
    host, restored = restore_stream(domain.to_stream("xl"))
    assert p2m_entry(host, restored, domain, page) == mfn_of(host, restored.domid, page)
    assert p2m_entry(host, restored, domain, unsent) == 256**width - 1
    assert p2m_entry(host, restored, domain, 1500) == 256**width - 1


@BOTH
def test_write_p2m_keeps_data_after_its_end(width: Width) -> None:
    domain = pv_domain(width=width)
    leaf = int(domain.p2m_pfns[-1])
    domain.pages[leaf][-8:] = b"trailing"
    host, restored = restore_stream(domain.to_stream("xl"))
    assert memory_of(host, restored.domid)[leaf].endswith(b"trailing")
    assert p2m_entry(host, restored, domain, domain.entries - 1) == 256**width - 1


def test_load_pfn_named_only_by_page_table_is_populated() -> None:
    domain = pv_domain()
    hidden = domain.places.data[0]
    del domain.types[hidden]
    host, restored = restore_stream(domain.to_stream("xl"))
    assert p2m_entry(host, restored, domain, hidden) == mfn_of(host, restored.domid, hidden)
    check_invariants(host)


def test_load_after_verify_reports_and_writes_differing_page() -> None:
    domain = pv_domain()
    one, two = domain.places.data[:2]
    sent = [(one, NOTAB), (two, NOTAB), (domain.places.top, 4 | 8)]
    content = [bytes(domain.pages[one]), b"new" + bytes(PAGE - 3), bytes(domain.pages[domain.places.top])]
    host, restored = restore_stream(stream_of(domain, WIRE.verify(), WIRE.page_data(sent, content)))
    assert restored.differing.tolist() == [two]
    assert memory_of(host, restored.domid)[two].startswith(b"new")
    check_invariants(host)


@pytest.mark.parametrize("extents", [1 << 30, 1, 0], ids=["enough extents", "one extent", "no extent"])
def test_populate_uses_extents_while_the_host_has_some(extents: int) -> None:
    guest, heap = suspended("linear"), MemorySink()
    save(guest.host, guest.domid, heap, config=CONFIG)
    host = RecordingHost()
    host.extents_left = extents
    _, restored = restore_stream(bytes(heap.data), host)
    by_order = {order: sum(n for o, n in host.populate_calls if o == order) for order in (0, 9)}
    assert by_order[9] >= 4
    if extents == 1 << 30:
        assert by_order[0] + by_order[9] * 512 == restored.pages
        assert len(host.populate_calls) < 12
    assert_same_pages(guest, guest_on(host, guest, restored))


@pytest.mark.parametrize("source_kind", ["file", "pipe"])
def test_load_where_kernel_cannot_read_into_domain_memory_copies(
    source_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(pv_domain().to_stream("xl"))
    calls = []

    def refusing(call: Callable[..., int]) -> Callable[..., int]:
        def refuse(fd: int, buffers: Sequence[memoryview], *at: int) -> int:
            calls.append(len(buffers[0]))
            if len(calls) % 3:
                raise OSError(errno.EFAULT, "Bad address")
            return call(fd, [buffers[0][:5000]], *at)  # every third call reads a part

        return refuse

    monkeypatch.setattr(os, "readv", refusing(os.readv))
    monkeypatch.setattr(os, "preadv", refusing(os.preadv))
    host = ModelHost(1 << 30, seed=3)
    if source_kind == "file":
        with stream_input(data) as source:
            restored = restore_domain(host, source)
    else:
        with piped(data) as fd:
            source = Input(os.dup(fd), "pipe")
            restored = restore_domain(host, source)
            source.close()
    assert calls
    monkeypatch.undo()
    other, other_restored = restore_stream(data)
    actual, expected = memory_of(host, restored.domid), memory_of(other, other_restored.domid)
    domain = pv_domain()
    for pfn in domain.places.data:
        assert actual[pfn] == expected[pfn] == bytes(domain.pages[pfn])
