"""PageTableLocaliser: when tables are localised, and what they name then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.model_invariants import check_invariants
from tests.support.restoring import (
    RecordingHost,
    assert_same_pages,
    guest_on,
    memory_of,
    restore_error,
    restore_stream,
)
from tests.support.saving import BOTH, CONFIG, MemorySink, suspended
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.stream import NOTAB, PAGE, Piece, Stream, Wire
from xenpv.abi.declare import Width
from xenpv.errors import Fault
from xenpv.frames import PAGE_SHIFT, U8, U64
from xenpv.host.model.host import ModelHost
from xenpv.io.background import BackgroundWorker, Task
from xenpv.memory.page_tables import as_ptes, pte_frames
from xenpv.memory.physmap import Physmap
from xenpv.restore import page_tables, pages
from xenpv.restore.page_tables import PageTableLocaliser, Populate
from xenpv.restore.pages import MemoryLoader
from xenpv.restore.restore import Restored
from xenpv.save.save import save

WIRE = Wire()


class LateWorker(BackgroundWorker):
    """Runs a task only when it is waited for."""

    _task: Task | None = None

    def submit(self, task: Task) -> None:
        self.wait()
        self._task = task

    def wait(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task()


class NotLocalised(NamedTuple):
    """pfns of tables that hold pfns still: before the loader was flushed, and after."""

    before_flush: list[int]
    after_flush: list[int]


@contextmanager
def localising_in_batches_of(count: int) -> Iterator[list[NotLocalised]]:
    """Localise tables in batches of ``count``, and read content as late as possible; collect what is not localised."""
    collected: list[NotLocalised] = []
    flush, finish = MemoryLoader.flush, PageTableLocaliser.finish

    def not_localised(tables: PageTableLocaliser) -> list[int]:
        pfns, _ = tables.physmap.page_tables()
        return [int(pfn) for pfn in pfns[~tables.physmap.is_localised(pfns)]]

    def collecting_flush(self: MemoryLoader) -> None:
        before = not_localised(self.tables)
        flush(self)
        collected.append(NotLocalised(before, not_localised(self.tables)))

    def checking_finish(self: PageTableLocaliser, end_pfn: int, populate: Populate) -> tuple[U64, U8]:
        assert not_localised(self) == collected[-1].after_flush
        return finish(self, end_pfn, populate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_tables, "PAGES_IN_CACHE", count)
        patch.setattr(pages, "BackgroundWorker", LateWorker)
        patch.setattr(MemoryLoader, "flush", collecting_flush)
        patch.setattr(PageTableLocaliser, "finish", checking_finish)
        yield collected


def restore_pages(
    *records: Piece, domain: Domain, batch: int = 1, **options: Any
) -> tuple[ModelHost, Restored, list[int]]:
    """Restore a domain whose pages come in these records; also the tables that were left to finish()."""
    stream: Stream = domain.to_stream("xl").drop("PAGE_DATA").before("X86_TSC_INFO", *records)
    with localising_in_batches_of(batch) as collected:
        host, restored = restore_stream(stream, **options)
    check_invariants(host)
    return host, restored, collected[0].after_flush


def memory_if_localised_last(*records: Piece, domain: Domain, **options: Any) -> dict[int, bytes]:
    """Memory after the same restore, with every table localised by finish()."""
    host, restored, late_tables = restore_pages(*records, domain=domain, batch=1 << 30, **options)
    assert late_tables == sorted(tables_of(domain))
    return memory_of(host, restored.domid)


def tables_of(domain: Domain) -> list[int]:
    """pfns of the domain's page tables."""
    return [pfn for pfn, kind in domain.types.items() if 1 <= kind & 7 <= 4 and kind < 13]


@BOTH
@pytest.mark.parametrize("form", ["linear", "tree3"])
def test_localise_saved_guest_leaves_less_than_one_batch(width: Width, form: str) -> None:
    guest, heap = suspended(form, width=width), MemorySink()
    save(guest.host, guest.domid, heap, config=CONFIG)
    for count in (1, 2):
        with localising_in_batches_of(count) as collected:
            host, restored = restore_stream(bytes(heap.data))
        assert len(collected[0].after_flush) < count
        assert len(collected[0].before_flush) < restored.tables / 2
        check_invariants(host)
        assert_same_pages(guest, guest_on(host, guest, restored))


@BOTH
def test_localise_table_before_its_pages_waits_for_them(width: Width) -> None:
    domain = pv_domain(width=width)
    records = domain.page_data(WIRE, 1)
    host, restored, late_tables = restore_pages(*records, domain=domain)
    assert min(tables_of(domain)) < max(domain.places.data)
    assert late_tables == []
    assert memory_of(host, restored.domid) == memory_if_localised_last(*records, domain=domain)


def test_localise_table_with_unsent_pfn_is_left_to_finish_which_populates_it() -> None:
    domain = pv_domain()
    unsent = domain.places.data[-1]
    del domain.types[unsent]
    host, restored, late_tables = restore_pages(*domain.page_data(WIRE, 1), domain=domain)
    assert len(late_tables) == 1  # the L1 that names it
    assert len(memory_of(host, restored.domid)[unsent]) == PAGE


@pytest.mark.parametrize("pages_in_record", [3, 64], ids=lambda n: f"{n} pages in a record")
def test_localise_table_sent_again_is_localised_again(pages_in_record: int) -> None:
    """Also while the table is being read once more."""
    domain = pv_domain()
    records = domain.page_data(WIRE, 16)
    again = domain.page_data(WIRE, pages_in_record, sorted(tables_of(domain)))
    host, restored, late_tables = restore_pages(*records, *again, *again, records[0], domain=domain)
    assert late_tables == []
    assert memory_of(host, restored.domid) == memory_if_localised_last(*records, domain=domain)


def test_localise_waiting_table_received_again_is_localised_once() -> None:
    """The mfn in the localised entry is also a pfn of the domain: localising twice would name another page."""
    host = ModelHost(128 << 20)
    domid = host.create(8, vcpus=1, max_pages=64)
    mfns = host.populate_physmap(domid, np.arange(7, dtype=np.uint64))
    one, two, three, near, far = range(5)
    physmap = Physmap()
    physmap.add_pages(np.array([one, two, three, mfns[near]], np.uint64), mfns[[one, two, three, 5]])
    physmap.set_types(np.array([one, two, three], np.uint64), np.ones(3, np.uint8))
    with host.map_writable(domid, mfns[: three + 1]) as content:
        as_ptes(content)[:, 0] = [near << PAGE_SHIFT | 1, far << PAGE_SHIFT | 1, 0]
    none = np.empty(0, np.uint64)
    with localising_in_batches_of(2):
        tables = PageTableLocaliser(host, host.info(domid), physmap)
        tables.add_received(np.array([one, two], np.uint64), three, none)  # both wait
        for pfn, again in ((near, [one, three]), (far, [])):
            physmap.add_pages(np.array([pfn], np.uint64), mfns[[pfn]])
            tables.add_received(np.array(again, np.uint64), pfn, none)
    with host.map_writable(domid, mfns[: three + 1]) as content:
        assert pte_frames(as_ptes(content)[:2, 0]).tolist() == mfns[[near, far]].tolist()


def test_localise_waiting_table_sent_again_as_data_is_not_touched() -> None:
    """The data looks like page-table entries."""
    domain = pv_domain()
    page = domain.places.data[0]
    position = sorted(domain.types).index(page)
    data = np.full(512, domain.places.data[1] << 12 | 0x67, np.uint64).tobytes()
    domain.pages[page][:] = data
    assert domain.types[page] == NOTAB
    records = domain.page_data(WIRE, 1)
    records.insert(position, WIRE.page_data([(page, 1)], [data]))
    host, restored, late_tables = restore_pages(*records, domain=domain)
    assert late_tables == []
    assert memory_of(host, restored.domid)[page] == data


def test_verify_compares_with_localised_table() -> None:
    domain = pv_domain()
    tables = tables_of(domain)
    changed = bytearray(domain.pages[tables[1]])
    changed[-8:] = bytes(7) + b"\x01"  # an entry that is not present
    kinds = [(pfn, domain.types[pfn]) for pfn in tables]
    contents = [bytes(domain.pages[pfn]) for pfn in tables]
    contents[1] = bytes(changed)
    again = [WIRE.verify(), WIRE.page_data(kinds, contents)]
    _, restored, late_tables = restore_pages(*domain.page_data(WIRE, 16), *again, domain=domain)
    assert restored.differing.tolist() == [tables[1]]
    assert late_tables == []


def test_localise_superpage_is_left_to_finish_which_refuses_it() -> None:
    domain = pv_domain()
    [l2] = [pfn for pfn in tables_of(domain) if domain.types[pfn] & 7 == 2][:1]
    domain.pages[l2][-8:] = (domain.places.data[0] << 12 | 0xE7).to_bytes(8, "little")
    with localising_in_batches_of(1) as collected:
        e = restore_error(domain.to_stream("xl", batch=1))
    assert isinstance(e, Fault)
    assert (e.pfn, e.level, e.entry) == (l2, 2, 511)
    assert collected[0].after_flush == [l2]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_localise_in_any_order_gives_same_memory_as_localising_last(data: st.DataObject) -> None:
    """Rule: a table names the frames of its pfns at the end, in whatever order and however often pages are sent."""
    domain = pv_domain(width=data.draw(st.sampled_from([8, 4])))
    pfns = sorted(domain.types)
    order = data.draw(st.permutations(pfns)) if data.draw(st.booleans()) else pfns
    again = data.draw(st.lists(st.tuples(st.sampled_from(tables_of(domain)), st.integers(0, 120)), max_size=30))
    for pfn, position in again:
        order.insert(position, pfn)
    size = data.draw(st.integers(4, 40))
    records = [
        record for i in range(0, len(order), size) for record in domain.page_data(WIRE, size, order[i : i + size])
    ]
    batch = data.draw(st.integers(1, 9))
    host, restored, _ = restore_pages(*records, domain=domain, batch=batch, host=RecordingHost())
    assert memory_of(host, restored.domid) == memory_if_localised_last(*records, domain=domain, host=RecordingHost())
