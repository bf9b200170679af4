"""Page tables that are restored: translated as soon as what they name is there, and whatever happens to them then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.model_invariants import check
from tests.support.restoring import Watched, assert_same, made, memory, moved, refused
from tests.support.saving import BOTH, CONFIG, Heap, suspended
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.stream import NOTAB, PAGE, Piece, Stream, Wire
from xenpv.abi.declare import Width
from xenpv.frames import PAGE_SHIFT, U8, U64
from xenpv.host.model.host import ModelHost
from xenpv.io.background import BackgroundWorker, Task
from xenpv.memory.pagetables import as_entries, frames
from xenpv.memory.physmap import Physmap
from xenpv.restore import page_tables
from xenpv.restore import pages as restore_pages
from xenpv.restore.page_tables import Populate, TablesIn
from xenpv.restore.pages import PagesIn
from xenpv.restore.restore import Restored
from xenpv.save.save import save

WIRE = Wire()


class Late(BackgroundWorker):
    """Reads nothing until it is waited for."""

    _task: Task | None = None

    def submit(self, task: Task) -> None:
        self.wait()
        self._task = task

    def wait(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task()


class Left(NamedTuple):
    """The tables of a restore that were not translated when the last page had come, and those that the end had to."""

    late: list[int]
    end: list[int]


@contextmanager
def at_once(count: int) -> Iterator[list[Left]]:
    """With so many tables translated at once, and content that comes as late as it may: what is left, each time."""
    left: list[Left] = []
    settle, finish = PagesIn.settle, TablesIn.finish

    def not_yet(tables: TablesIn) -> list[int]:
        pfns = tables.physmap.tables()[0]
        left: list[int] = pfns[~tables.physmap.is_local(pfns)].tolist()
        return left

    def settling(self: PagesIn) -> None:
        late = not_yet(self.tables)
        settle(self)
        left.append(Left(late, not_yet(self.tables)))

    def finishing(self: TablesIn, end_pfn: int, populate: Populate) -> tuple[U64, U8]:
        assert not_yet(self) == left[-1].end
        return finish(self, end_pfn, populate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_tables, "PAGES_IN_CACHE", count)
        patch.setattr(restore_pages, "BackgroundWorker", Late)
        patch.setattr(PagesIn, "settle", settling)
        patch.setattr(TablesIn, "finish", finishing)
        yield left


def restored(count: int, *pages: Piece, domain: Domain, **how: Any) -> tuple[ModelHost, Restored, list[int]]:
    """A domain whose pages come so, and its tables that were left for the end."""
    stream: Stream = domain.to_stream("xl").drop("PAGE_DATA").before("X86_TSC_INFO", *pages)
    with at_once(count) as left:
        host, done = made(stream, **how)
    check(host)
    return host, done, left[0].end


@BOTH
@pytest.mark.parametrize("form", ["linear", "tree3"])
def test_none_is_left_when_all_that_they_name_has_come(width: Width, form: str) -> None:
    guest, heap = suspended(form, width=width), Heap()
    save(guest.host, guest.domid, heap, config=CONFIG)
    for count in (1, 2):
        with at_once(count) as left:
            host, done = made(bytes(heap.data))
        assert len(left[0].end) < count
        assert len(left[0].late) < done.tables / 2
        check(host)
        assert_same(guest, moved(guest, host, done))


def tables_of(domain: Domain) -> list[int]:
    return [pfn for pfn, kind in domain.types.items() if 1 <= kind & 7 <= 4 and kind < 13]


@BOTH
def test_those_that_name_what_comes_later_wait_for_it(width: Width) -> None:
    domain = pv_domain(width=width)
    pages = domain.page_data(WIRE, 1)
    host, done, left = restored(1, *pages, domain=domain)
    assert min(tables_of(domain)) < max(domain.places.data)
    assert left == []
    assert memory(host, done.domid) == memory(*at_the_end(*pages, domain=domain))


def at_the_end(*pages: Piece, domain: Domain, **how: Any) -> tuple[ModelHost, Any]:
    """The same with all tables translated at the end."""
    host, done, left = restored(1 << 30, *pages, domain=domain, **how)
    assert left == sorted(tables_of(domain))
    return host, done.domid


def test_one_that_names_what_never_comes_is_left_for_the_end() -> None:
    domain = pv_domain()
    hidden = domain.places.data[-1]
    del domain.types[hidden]
    host, done, left = restored(1, *domain.page_data(WIRE, 1), domain=domain)
    assert len(left) == 1  # the L1 that names it; its frame comes from there
    assert len(memory(host, done.domid)[hidden]) == PAGE


@pytest.mark.parametrize("batch", [3, 64])
def test_one_that_comes_again_is_translated_again(batch: int) -> None:
    """Also while it is just being read once more."""
    domain = pv_domain()
    pages = domain.page_data(WIRE, 16)
    again = domain.page_data(WIRE, batch, sorted(tables_of(domain)))
    host, done, left = restored(1, *pages, *again, *again, pages[0], domain=domain)
    assert left == []
    assert memory(host, done.domid) == memory(*at_the_end(*pages, domain=domain))


def test_one_that_comes_again_while_it_waits_is_translated_once() -> None:
    """The frame that it names then is also the number of a pfn, which it does not mean."""
    host = ModelHost(128 << 20)
    domid = host.create(8, vcpus=1, max_pages=64)
    mfns = host.populate_physmap(domid, np.arange(7, dtype=np.uint64))
    one, two, three, near, far = range(5)
    physmap = Physmap()
    physmap.put(np.array([one, two, three, mfns[near]], np.uint64), mfns[[one, two, three, 5]])
    physmap.put_types(np.array([one, two, three], np.uint64), np.ones(3, np.uint8))
    with host.map_writable(domid, mfns[: three + 1]) as pages:
        as_entries(pages)[:, 0] = [near << PAGE_SHIFT | 1, far << PAGE_SHIFT | 1, 0]
    none = np.empty(0, np.uint64)
    with at_once(2):
        tables = TablesIn(host, host.info(domid), physmap)
        tables.came(np.array([one, two], np.uint64), three, none)  # both wait
        for pfn, again in ((near, [one, three]), (far, [])):
            physmap.put(np.array([pfn], np.uint64), mfns[[pfn]])
            tables.came(np.array(again, np.uint64), pfn, none)
    with host.map_writable(domid, mfns[: three + 1]) as pages:
        assert frames(as_entries(pages)[:2, 0]).tolist() == mfns[[near, far]].tolist()


def test_one_that_is_data_when_it_comes_again_is_left_alone() -> None:
    """A table waits; then its pfn comes as an ordinary page, with what would look like entries."""
    domain = pv_domain()
    page = domain.places.data[0]
    before = sorted(domain.types).index(page)
    looks = np.full(512, domain.places.data[1] << 12 | 0x67, np.uint64).tobytes()
    domain.pages[page][:] = looks
    assert domain.types[page] == NOTAB
    pages = domain.page_data(WIRE, 1)
    pages.insert(before, WIRE.page_data([(page, 1)], [looks]))
    host, done, left = restored(1, *pages, domain=domain)
    assert left == []
    assert memory(host, done.domid)[page] == looks


def test_what_is_verified_is_held_against_the_translated_table() -> None:
    domain = pv_domain()
    tables = tables_of(domain)
    changed = bytearray(domain.pages[tables[1]])
    changed[-8:] = bytes(7) + b"\x01"  # an entry that is not present
    kinds = [(pfn, domain.types[pfn]) for pfn in tables]
    contents = [bytes(domain.pages[pfn]) for pfn in tables]
    contents[1] = bytes(changed)
    again = [WIRE.verify(), WIRE.page_data(kinds, contents)]
    _, done, left = restored(1, *domain.page_data(WIRE, 16), *again, domain=domain)
    assert done.differing.tolist() == [tables[1]]
    assert left == []


def test_a_superpage_is_left_for_the_end_to_refuse() -> None:
    domain = pv_domain()
    [l2] = [pfn for pfn in tables_of(domain) if domain.types[pfn] & 7 == 2][:1]
    domain.pages[l2][-8:] = (domain.places.data[0] << 12 | 0xE7).to_bytes(8, "little")
    with at_once(1) as left:
        e = refused(domain.to_stream("xl", batch=1))
    assert f"Bad entry L2[511] of pfn {l2:#x}: superpage" in str(e)
    assert left[0].end == [l2]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_whenever_it_is_done_the_same_comes_of_it(data: st.DataObject) -> None:
    """In any order, pages coming again, as many at once as may be: a table means what it meant at the end."""
    domain = pv_domain(width=data.draw(st.sampled_from([8, 4])))
    pfns = sorted(domain.types)
    order = data.draw(st.permutations(pfns)) if data.draw(st.booleans()) else pfns
    again = data.draw(st.lists(st.tuples(st.sampled_from(tables_of(domain)), st.integers(0, 120)), max_size=30))
    for pfn, at in again:
        order.insert(at, pfn)
    batch = data.draw(st.integers(4, 40))
    pages = [
        piece for i in range(0, len(order), batch) for piece in domain.page_data(WIRE, batch, order[i : i + batch])
    ]
    host, done, _ = restored(data.draw(st.integers(1, 9)), *pages, domain=domain, host=Watched())
    assert memory(host, done.domid) == memory(*at_the_end(*pages, domain=domain, host=Watched()))
