"""Pages that are restored: in any order, again and again, with and without content; and which frames they get."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tests.support.model_invariants import check
from tests.support.restoring import (
    Watched,
    assert_same,
    made,
    memory,
    mfn_of,
    moved,
    opened,
)
from tests.support.saved_files import piped
from tests.support.saving import BOTH, CONFIG, Heap, suspended
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.stream import BROKEN, NOTAB, PAGE, XALLOC, XTAB, Piece, Stream, Wire
from xenpv.abi.declare import Width
from xenpv.host.model.host import ModelHost
from xenpv.io.stream_input import Input
from xenpv.restore.restore import Restored, restore_domain
from xenpv.save.save import save

WIRE = Wire()


def a_stream(domain: Domain, *pages: Piece) -> Stream:
    """All of a domain, and more pages behind its own."""
    stream = domain.to_stream("xl")
    return stream.before("X86_TSC_INFO", *pages)


def test_a_page_that_comes_again_is_written_over() -> None:
    domain = pv_domain()
    first, second = domain.places.data[:2]
    again = [(first, NOTAB), (second, NOTAB), (first, NOTAB)]
    more = WIRE.page_data(again, [b"a" * PAGE, b"b" * PAGE, b"c" * PAGE])
    host, restored = made(a_stream(domain, more))
    now = memory(host, restored.domid)
    assert (now[first], now[second]) == (b"c" * PAGE, b"b" * PAGE)
    assert restored.pages == len(domain.types) - 1


def test_pages_may_come_in_any_order_and_twice_in_a_record() -> None:
    """Each gets one frame, and no frame is mapped twice at once, which real Xen does and the protocol does not."""
    domain = pv_domain()
    low, high = domain.places.data[0], domain.places.data[-1]
    stream = domain.to_stream("xl", batch=16).drop("PAGE_DATA")
    entries = [(high, NOTAB), (low, NOTAB), (high, NOTAB)]
    stream.before("X86_TSC_INFO", WIRE.page_data(entries, [b"a" * PAGE, b"b" * PAGE, b"c" * PAGE]))
    stream.before("X86_TSC_INFO", *domain.page_data(WIRE, 16, sorted(set(domain.types) - {low, high})))
    host, restored = made(stream, Watched())
    now = memory(host, restored.domid)
    assert (now[low], now[high]) == (b"b" * PAGE, b"c" * PAGE)
    assert restored.pages == host.info(restored.domid).pages == len(domain.types) - 1


def test_types_are_those_that_came_last() -> None:
    """A page that was sent as a pinned table first, and is none at the end: it can be written, and is not pinned."""
    domain = pv_domain()
    page = domain.places.data[0]
    stream = domain.to_stream("xl")
    junk = np.full(512, 0xFFFF_F000_0000_0001, np.uint64).tobytes()  # pfns that no domain has
    stream.before("PAGE_DATA", WIRE.page_data([(page, 4 | 8)], [junk]))
    host, restored = made(stream)
    assert host.page_types(restored.domid, np.array([mfn_of(host, restored.domid, page)], np.uint64)).tolist() == [0]
    assert memory(host, restored.domid)[page] == bytes(domain.pages[page])


@pytest.mark.parametrize("kind", [XTAB, BROKEN])
def test_a_page_that_is_gone_keeps_its_frame_and_is_no_table(kind: int) -> None:
    domain = pv_domain()
    page = domain.places.data[0]
    stream = domain.to_stream("xl")
    stream.before("PAGE_DATA", WIRE.page_data([(page, 1 | 8)], [bytes(PAGE)]))
    stream.before("X86_TSC_INFO", WIRE.page_data([(page, kind)], []))
    host, restored = made(stream)
    mfn = mfn_of(host, restored.domid, page)
    assert host.page_types(restored.domid, np.array([mfn], np.uint64)).tolist() == [0]
    assert p2m_entry(host, restored, domain, page) == mfn


def p2m_entry(host: ModelHost, restored: Restored, domain: Domain, pfn: int) -> int:
    """What stands in the guest's own p2m."""
    per_leaf = PAGE // domain.width
    leaf = memory(host, restored.domid)[int(domain.p2m_pfns[pfn // per_leaf])]
    return int(np.frombuffer(leaf, f"<u{domain.width}")[pfn % per_leaf])


@pytest.mark.parametrize("width", [8, 4])
def test_pages_without_content_are_given_and_named(width: Width) -> None:
    domain = pv_domain(width=width, pfns=[*range(60), *range(2000, 2010)])
    page, gone = 2003, 2011
    stream = domain.to_stream("xl")
    domain.types[page] = XALLOC
    stream = domain.to_stream("xl")
    host, restored = made(stream)
    assert p2m_entry(host, restored, domain, page) == mfn_of(host, restored.domid, page)
    assert p2m_entry(host, restored, domain, gone) == 256**width - 1
    assert p2m_entry(host, restored, domain, 1500) == 256**width - 1


@BOTH
def test_what_is_behind_the_end_of_the_p2m_is_not_written_to(width: Width) -> None:
    domain = pv_domain(width=width)
    leaf = int(domain.p2m_pfns[-1])
    domain.pages[leaf][-8:] = b"behind!!"
    host, restored = made(domain.to_stream("xl"))
    assert memory(host, restored.domid)[leaf].endswith(b"behind!!")
    assert p2m_entry(host, restored, domain, domain.entries - 1) == 256**width - 1


def test_a_pfn_that_only_a_page_table_names_gets_a_frame() -> None:
    domain = pv_domain()
    hidden = domain.places.data[0]
    del domain.types[hidden]
    host, restored = made(domain.to_stream("xl"))
    assert p2m_entry(host, restored, domain, hidden) == mfn_of(host, restored.domid, hidden)
    check(host)


def test_a_verified_page_that_is_another_is_named_and_written() -> None:
    domain = pv_domain()
    one, two = domain.places.data[:2]
    sent = [(one, NOTAB), (two, NOTAB), (domain.places.top, 4 | 8)]
    content = [bytes(domain.pages[one]), b"new" + bytes(PAGE - 3), bytes(domain.pages[domain.places.top])]
    host, restored = made(a_stream(domain, WIRE.verify(), WIRE.page_data(sent, content)))
    assert restored.differing.tolist() == [two]
    assert memory(host, restored.domid)[two].startswith(b"new")
    check(host)


@pytest.mark.parametrize("extents", [1 << 30, 1, 0])
def test_memory_is_given_in_extents_where_there_are_some(extents: int) -> None:
    guest, heap = suspended("linear"), Heap()
    save(guest.host, guest.domid, heap, config=CONFIG)
    host = Watched()
    host.extents = extents
    _, restored = made(bytes(heap.data), host)
    by_order = {order: sum(n for o, n in host.asked if o == order) for order in (0, 9)}
    assert by_order[9] >= 4
    if extents == 1 << 30:
        assert by_order[0] + by_order[9] * 512 == restored.pages
        assert len(host.asked) < 12
    assert_same(guest, moved(guest, host, restored))


@pytest.mark.parametrize("way", ["file", "pipe"])
def test_where_nothing_can_be_read_into_a_domain_it_is_copied(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(pv_domain().to_stream("xl"))
    calls = []

    def refusing(call: Callable[..., int]) -> Callable[..., int]:
        def refuse(fd: int, buffers: Sequence[memoryview], *at: int) -> int:
            calls.append(len(buffers[0]))
            if len(calls) % 3:
                raise OSError(errno.EFAULT, "Bad address")
            return call(fd, [buffers[0][:5000]], *at)  # and now and then some of it can

        return refuse

    monkeypatch.setattr(os, "readv", refusing(os.readv))
    monkeypatch.setattr(os, "preadv", refusing(os.preadv))
    host = ModelHost(1 << 30, seed=3)
    if way == "file":
        with opened(data) as source:
            restored = restore_domain(host, source)
    else:
        with piped(data) as fd:
            source = Input(os.dup(fd), "pipe")
            restored = restore_domain(host, source)
            source.close()
    assert calls
    monkeypatch.undo()
    other, expected = made(data)
    mine, theirs = memory(host, restored.domid), memory(other, expected.domid)
    domain = pv_domain()
    for pfn in domain.places.data:
        assert mine[pfn] == theirs[pfn] == bytes(domain.pages[pfn])
