"""What every Toolstack must do: functions of a host and the width of the domains to build.

They run on ModelHost always, and on XenHost in the lab (toolstack_on_xen.py). Each leaves the host as it was.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from tests.contract import tiny_guest
from tests.contract.host_checks import NO_DOMAIN, array, fails
from xenpv.abi.declare import Width
from xenpv.abi.domctl import PINNED, PageType
from xenpv.abi.x86 import PAGE_SIZE, VCPU_GUEST_CONTEXT
from xenpv.abi.xen import SHARED_INFO
from xenpv.errors import HostError
from xenpv.frames import U8, U64, DomId
from xenpv.host.protocol import Ring, Toolstack, find_domain

NAME, UUID = "contract", "c0117ac7-0000-4000-8000-0123456789ab"
SOON = 30.0  # seconds: Xen frees a domain when nothing refers to it any more, such as mappings of daemons


def pfns(n: int, first: int = 0, step: int = 1) -> U64:
    return np.arange(first, first + n * step, step, dtype=np.uint64)


def levels(*numbers: int) -> U8:
    return np.array(numbers, np.uint8)


@contextmanager
def domain(
    host: Toolstack, width: Width, pages: int = 16, *, vcpus: int = 1, name: str | None = None, uuid: str | None = None
) -> Iterator[DomId]:
    """Create a domain; destroy it when the block ends."""
    domid = host.create(width, max_pages=pages, vcpus=vcpus, name=name, uuid=uuid)
    try:
        yield domid
    finally:
        host.destroy(domid)
        assert eventually(lambda: is_gone(host, domid))


def top_level(width: Width) -> int:
    return 4 if width == 8 else 3


def content(host: Toolstack, domid: DomId, mfns: U64) -> U8:
    pages, mapped = host.map_frames(domid, mfns)
    assert mapped.all()
    return pages.copy()


def with_tables(host: Toolstack, domid: DomId, width: Width, *, writable: int | None = None) -> U64:
    """Populate a domain, and write the tiny guest's page tables, not pinned yet. Its frames."""
    mfns = host.populate_physmap(domid, pfns(tiny_guest.PAGES))
    wanted = tiny_guest.tables(mfns, width, writable=writable)
    host.write_frames(domid, mfns[list(wanted)], np.array(list(wanted.values())))
    return mfns


def eventually(condition: Callable[[], bool]) -> bool:
    """Return whether a condition holds within SOON seconds."""
    deadline = time.monotonic() + SOON
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds


def is_gone(host: Toolstack, domid: DomId) -> bool:
    try:
        host.info(domid)
    except HostError as error:
        return error.errno == errno.ESRCH
    return False


def create_makes_a_paused_domain_without_memory(host: Toolstack, width: Width) -> None:
    with domain(host, width, 77, vcpus=3, name=NAME, uuid=UUID) as domid:
        info = host.info(domid)
        assert (info.name, info.uuid, info.width, info.hvm) == (NAME, UUID, width, False)
        assert (info.pages, info.max_pages, info.max_vcpu) == (0, 77, 2)
        assert (info.paused, info.shutdown, info.dying) == (True, False, False)
        assert find_domain(host, NAME).domid == find_domain(host, UUID).domid == domid
        assert info.shared_info_mfn <= host.max_mfn()


def rename_changes_the_name(host: Toolstack, width: Width) -> None:
    for uuid in (UUID, None):
        with domain(host, width, name=NAME, uuid=uuid) as domid:
            host.rename(domid, f"{NAME}--other")
            assert (host.info(domid).name, find_domain(host, f"{NAME}--other").domid) == (f"{NAME}--other", domid)
    fails(lambda: host.rename(domid, NAME), errno.ESRCH, domid)


def set_configuration_stores_what_configuration_returns(host: Toolstack, width: Width) -> None:
    for uuid in (UUID, None):
        with domain(host, width, name=NAME, uuid=uuid) as domid:
            assert host.configuration(domid) is None
            host.set_configuration(domid, b'{"c_info": {}}')
            assert host.configuration(domid) == b'{"c_info": {}}'


def set_width_works_while_a_domain_has_no_memory(host: Toolstack, width: Width) -> None:
    with domain(host, width) as domid:
        host.set_width(domid, width)
        if width == 4:
            fails(lambda: host.set_width(domid, 8), errno.EINVAL, domid)
        host.populate_physmap(domid, pfns(1))
        host.set_width(domid, width)
    if width == 8:
        return
    with domain(host, 8) as domid:
        host.set_width(domid, 4)
        assert host.info(domid).width == 4
    with domain(host, 8) as domid:
        host.populate_physmap(domid, pfns(1))
        fails(lambda: host.set_width(domid, 4), errno.EACCES, domid)


def create_with_a_bad_number_of_vcpus_raises_einval(host: Toolstack, width: Width) -> None:
    before = [d.domid for d in host.domains()]
    for vcpus in (-1, 0, 8193):
        fails(lambda vcpus=vcpus: host.create(width, vcpus=vcpus), errno.EINVAL, None)  # type: ignore[misc]
    assert [d.domid for d in host.domains()] == before


def destroy_frees_the_memory_and_the_uuid(host: Toolstack, width: Width) -> None:
    with domain(host, width, 2000, name=NAME, uuid=UUID) as domid:
        tiny_guest.build(host, domid, width)
        assert len(host.populate_physmap(domid, pfns(1900, 64))) == 1900
        built = host.free_pages()
    assert eventually(lambda: host.free_pages() >= built + tiny_guest.PAGES + 1900), (built, host.free_pages())
    assert UUID not in [d.uuid for d in host.domains()]


def destroy_works_after_every_step_of_a_build(host: Toolstack, width: Width) -> None:
    for steps in range(4):
        with domain(host, width, 64, name=NAME, uuid=UUID) as domid:
            if steps > 0:
                mfns = with_tables(host, domid, width)
            if steps > 1:
                host.pin_tables(domid, mfns[[tiny_guest.top_table(width)]], levels(top_level(width)))
            if steps > 2:
                host.alloc_event_channel(domid)
                host.seed_grants(domid, console=int(mfns[tiny_guest.CONSOLE]), xenstore=int(mfns[tiny_guest.STORE]))


def populate_physmap_stops_at_max_mem(host: Toolstack, width: Width) -> None:
    with domain(host, width, 10) as domid:
        first = host.populate_physmap(domid, pfns(16))
        assert len(first) == len(set(first.tolist())) == 10
        assert len(host.populate_physmap(domid, pfns(6, 10))) == 0
        host.set_max_mem(domid, 12)
        assert host.info(domid).max_pages == 12
        more = host.populate_physmap(domid, pfns(6, 10))
        assert len(more) == 2
        assert len(host.populate_physmap(domid, pfns(0))) == 0
        assert host.info(domid).pages == 12
        host.set_max_mem(domid, 3)  # no error, and nothing is taken away
        assert (host.info(domid).pages, host.info(domid).max_pages) == (12, 3)
        assert not set(first.tolist()) & set(more.tolist())


def populate_physmap_of_order_9_allocates_whole_extents(host: Toolstack, width: Width) -> None:
    with domain(host, width, 1024 + 511) as domid:
        mfns = host.populate_physmap(domid, pfns(3, 1 << 20, 512), 9)
        assert len(mfns) == 2
        assert (mfns % np.uint64(512) == 0).all()
        assert host.info(domid).pages == 1024
        frames = (mfns[:, None] + pfns(512)).reshape(-1)
        assert (host.m2p(frames) == pfns(1024, 1 << 20)).all()
        assert (host.page_types(domid, frames) == PageType.NOTAB).all()


def populate_physmap_sets_the_m2p(host: Toolstack, width: Width) -> None:
    with domain(host, width) as domid:
        wanted = array(5, 0, (1 << 31) + 7, 1 << 36, 6)
        mfns = host.populate_physmap(domid, wanted)
        assert host.m2p(mfns).tolist() == wanted.tolist()
        assert wanted.tolist() == [5, 0, (1 << 31) + 7, 1 << 36, 6]  # what was passed is left alone


def write_frames_and_map_writable_write_what_map_frames_reads(host: Toolstack, width: Width) -> None:
    with domain(host, width, 2000) as domid:
        mfns = host.populate_physmap(domid, pfns(1500))
        pattern = np.repeat(np.arange(1500, dtype="<u8"), 512).view(np.uint8).reshape(-1, PAGE_SIZE)
        host.write_frames(domid, mfns[::-1], pattern)
        assert (content(host, domid, mfns) == pattern[::-1]).all()
        with host.map_writable(domid, mfns[:3]) as pages:
            assert pages.shape == (3, PAGE_SIZE)
            assert (pages == pattern[::-1][:3]).all()
            pages[1, 100:200] = 0xAA
            kept = pages
        kept[0] = 0x55  # no longer the domain's memory, and no crash
        expected = pattern[::-1][:3].copy()
        expected[1, 100:200] = 0xAA
        assert (content(host, domid, mfns[:3]) == expected).all()
        host.write_frames(domid, array(), np.zeros((0, PAGE_SIZE), np.uint8))
        with host.map_writable(domid, array()) as pages:
            assert pages.shape == (0, PAGE_SIZE)


def map_writable_keeps_writes_of_a_block_that_raises(host: Toolstack, width: Width) -> None:
    with domain(host, width) as domid:
        mfns = host.populate_physmap(domid, pfns(1))
        try:
            with host.map_writable(domid, mfns) as pages:
                pages[:] = 7
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert (content(host, domid, mfns) == 7).all()


def write_frames_with_a_foreign_frame_writes_none(host: Toolstack, width: Width) -> None:
    """All or none, also where Xen would let dom0 write: device registers, and dom0's own memory by another's name."""
    with domain(host, width) as domid, domain(host, width) as other:
        mfns = host.populate_physmap(domid, pfns(2))
        theirs = int(host.populate_physmap(other, pfns(1))[0])
        host.write_frames(domid, mfns, np.full((2, PAGE_SIZE), 1, np.uint8))
        for bad in (theirs, host.max_mfn() + 5, host.info(DomId(0)).shared_info_mfn, 0xA0):
            wanted = array(int(mfns[0]), bad)
            fails(
                lambda wanted=wanted: host.write_frames(domid, wanted, np.full((2, PAGE_SIZE), 2, np.uint8)),  # type: ignore[misc]
                errno.EINVAL,
                domid,
            )
            fails(lambda wanted=wanted: host.map_writable(domid, wanted).__enter__(), errno.EINVAL, domid)  # type: ignore[misc]
        assert (content(host, domid, mfns) == 1).all()


def pin_tables_types_all_tables_below(host: Toolstack, width: Width) -> None:
    with domain(host, width) as domid:
        mfns = with_tables(host, domid, width)
        which = [tiny_guest.L1, tiny_guest.L2, tiny_guest.L3, tiny_guest.L4][: top_level(width)]
        assert (host.page_types(domid, mfns) == PageType.NOTAB).all()
        host.pin_tables(domid, mfns[which[-1:]], levels(top_level(width)))
        types = host.page_types(domid, mfns)
        expected = [PageType.L1TAB, PageType.L2TAB, PageType.L3TAB, PageType.L4TAB_PIN]
        if width == 4:
            expected = [PageType.L1TAB, PageType.L2TAB, PageType.L3TAB_PIN]
        assert types[which].tolist() == expected
        others = np.delete(types, which)
        assert (others == PageType.NOTAB).all()


def pin_tables_stops_at_the_first_refused_table(host: Toolstack, width: Width) -> None:
    with domain(host, width) as domid:
        mfns = with_tables(host, domid, width)
        one, two, code = (int(mfns[n]) for n in (tiny_guest.L1, tiny_guest.L2, tiny_guest.CODE))
        empty = int(mfns[tiny_guest.STACK])
        host.write_frames(domid, array(empty), np.zeros((1, PAGE_SIZE), np.uint8))
        host.pin_tables(domid, array(), levels())
        wanted = array(one, one, empty)
        fails(lambda: host.pin_tables(domid, wanted, levels(1, 1, 1)), errno.EINVAL, domid)  # pinned already
        types = host.page_types(domid, array(one, two, code, empty)).tolist()
        assert types == [PageType.L1TAB_PIN, PageType.NOTAB, PageType.NOTAB, PageType.NOTAB]
        fails(lambda: host.pin_tables(domid, array(one), levels(2)), errno.EINVAL, domid)  # a table of another level
        foreign = array(host.info(DomId(0)).shared_info_mfn)
        fails(lambda: host.pin_tables(domid, foreign, levels(1)), errno.EINVAL, domid)


def pin_tables_of_a_table_mapped_writable_raises_ebusy(host: Toolstack, width: Width) -> None:
    for which in (tiny_guest.L1, tiny_guest.L2, tiny_guest.top_table(width)):
        with domain(host, width) as domid:
            mfns = with_tables(host, domid, width, writable=which)
            top = mfns[[tiny_guest.top_table(width)]]
            fails(lambda top=top: host.pin_tables(domid, top, levels(top_level(width))), errno.EBUSY, domid)  # type: ignore[misc]
            types = host.page_types(domid, mfns)
            assert not (types & PINNED).any()
            if (host.version().major, host.version().minor) > (4, 14):  # which names what a frame last was
                assert (types == PageType.NOTAB).all()
            host.write_frames(domid, mfns, np.zeros((len(mfns), PAGE_SIZE), np.uint8))  # none is in use as a table


def page_tables_and_writable_frames_exclude_each_other(host: Toolstack, width: Width) -> None:
    with domain(host, width) as domid:
        mfns = with_tables(host, domid, width)
        top = mfns[[tiny_guest.top_table(width)]]
        level = levels(top_level(width))
        with host.map_writable(domid, mfns[[tiny_guest.L1]]):
            fails(lambda: host.pin_tables(domid, top, level), errno.EINVAL, domid)
        host.pin_tables(domid, top, level)
        before = content(host, domid, mfns)
        two = mfns[[tiny_guest.CODE, tiny_guest.L1]]
        fails(lambda: host.write_frames(domid, two, np.ones((2, PAGE_SIZE), np.uint8)), errno.EBUSY, domid)
        fails(lambda: host.map_writable(domid, two).__enter__(), errno.EBUSY, domid)
        assert (content(host, domid, mfns) == before).all()


def set_vcpu_context_sets_what_vcpu_context_returns(host: Toolstack, width: Width) -> None:
    with domain(host, width) as domid:
        mfns = with_tables(host, domid, width)
        top = int(mfns[tiny_guest.top_table(width)])
        given = tiny_guest.context(top, width)
        fails(lambda: host.set_vcpu_context(domid, 0, given[:-8]), errno.EINVAL, domid)
        fails(lambda: host.set_vcpu_context(domid, 1, given), errno.EINVAL, domid)
        no_table = tiny_guest.context(int(mfns[tiny_guest.CODE]), width)
        host.write_frames(domid, mfns[[tiny_guest.CODE]], np.full((1, PAGE_SIZE), 0xFF, np.uint8))
        fails(lambda: host.set_vcpu_context(domid, 0, no_table), errno.EINVAL, domid)
        host.pin_tables(domid, array(top), levels(top_level(width)))
        host.set_vcpu_context(domid, 0, given)
        wanted, found = (VCPU_GUEST_CONTEXT.read(data, width) for data in (given, host.vcpu_context(domid, 0)))
        r = "r" if width == 8 else "e"
        for name in (f"{r}ip", f"{r}sp", f"{r}si", "cs", "ss"):
            assert found["user_regs"][name] == wanted["user_regs"][name], name
        for name in ("kernel_ss", "kernel_sp", "flags"):
            assert found[name] == wanted[name], name
        assert found["ctrlreg"][3] == wanted["ctrlreg"][3]


def write_shared_info_writes_within_the_page_only(host: Toolstack, width: Width) -> None:
    with domain(host, width) as domid:
        data = np.zeros(1, SHARED_INFO[width])
        data["arch"]["max_pfn"] = 1234
        host.write_shared_info(domid, data.tobytes())
        at = SHARED_INFO.offset(width, "arch.pfn_to_mfn_frame_list_list")
        host.write_shared_info(domid, (4711).to_bytes(width, "little"), at)
        found = SHARED_INFO.read(host.shared_info(domid), width)["arch"]
        assert (found["max_pfn"], found["pfn_to_mfn_frame_list_list"]) == (1234, 4711)
        for offset in (PAGE_SIZE - 3, -4):
            fails(lambda offset=offset: host.write_shared_info(domid, b"beyond", offset), errno.EINVAL, domid)  # type: ignore[misc]


def alloc_event_channel_numbers_ports_per_domain(host: Toolstack, width: Width) -> None:
    with domain(host, width) as one, domain(host, width) as two:
        ports = [host.alloc_event_channel(one), host.alloc_event_channel(one), host.alloc_event_channel(one, two)]
        assert len(set(ports)) == 3
        assert min(ports) > 0
        assert host.alloc_event_channel(two) == min(ports)


def init_hypercall_page_writes_the_code(host: Toolstack, width: Width) -> None:
    with domain(host, width) as domid:
        mfns = with_tables(host, domid, width)
        host.init_hypercall_page(domid, int(mfns[tiny_guest.HYPERCALLS]))
        entries = content(host, domid, mfns[[tiny_guest.HYPERCALLS]]).reshape(-1, 32)
        for number in (0, 1, 29, 32, 127):
            code = entries[number].tobytes()
            assert b"\xb8" + number.to_bytes(4, "little") in code  # mov $number, %eax
            assert b"\xc3" in code  # ret
        assert entries[23].tobytes().count(b"\xc3") == 0  # iret does not return
        host.pin_tables(domid, mfns[[tiny_guest.top_table(width)]], levels(top_level(width)))
        fails(lambda: host.init_hypercall_page(domid, int(mfns[tiny_guest.L1])), errno.EPERM, domid)
        fails(lambda: host.init_hypercall_page(domid, host.info(DomId(0)).shared_info_mfn), errno.EINVAL, domid)


def a_built_domain_passes_the_host_checks(host: Toolstack, width: Width) -> None:
    with domain(host, width, tiny_guest.PAGES, name=NAME, uuid=UUID) as domid:
        built = tiny_guest.build(host, domid, width)
        info = host.info(domid)
        assert (info.name, info.pages, info.paused) == (NAME, tiny_guest.PAGES, True)
        assert host.m2p(built.mfns).tolist() == list(range(tiny_guest.PAGES))
        foreign = host.info(DomId(0)).shared_info_mfn
        fails(lambda: host.seed_grants(domid, console=foreign, xenstore=built.xenstore.mfn), errno.EINVAL, domid)


def toolstack_calls_for_an_absent_domain_raise_esrch(host: Toolstack, width: Width) -> None:
    some, ring = array(0), Ring(0, 1)
    for call in (
        lambda: host.destroy(NO_DOMAIN),
        lambda: host.set_width(NO_DOMAIN, width),
        lambda: host.set_max_mem(NO_DOMAIN, 1),
        lambda: host.populate_physmap(NO_DOMAIN, some),
        lambda: host.populate_physmap(NO_DOMAIN, array()),
        lambda: host.map_writable(NO_DOMAIN, some).__enter__(),
        lambda: host.map_writable(NO_DOMAIN, array()).__enter__(),
        lambda: host.write_frames(NO_DOMAIN, some, np.zeros((1, PAGE_SIZE), np.uint8)),
        lambda: host.init_hypercall_page(NO_DOMAIN, 0),
        lambda: host.pin_tables(NO_DOMAIN, some, levels(1)),
        lambda: host.pin_tables(NO_DOMAIN, array(), levels()),
        lambda: host.set_vcpu_context(NO_DOMAIN, 0, tiny_guest.context(0, width)),
        lambda: host.write_shared_info(NO_DOMAIN, b""),
        lambda: host.alloc_event_channel(NO_DOMAIN),
        lambda: host.seed_grants(NO_DOMAIN, console=0, xenstore=0),
        lambda: host.introduce(NO_DOMAIN, console=ring, xenstore=ring),
        lambda: host.set_configuration(NO_DOMAIN, b"{}"),
        lambda: host.configuration(NO_DOMAIN),
    ):
        fails(call, errno.ESRCH, NO_DOMAIN)


def destroy_of_dom0_raises_einval(host: Toolstack, width: Width) -> None:
    fails(lambda: host.destroy(DomId(0)), errno.EINVAL, DomId(0))
    assert host.info(DomId(0)).name == "Domain-0"


TOOLSTACK_CHECKS: tuple[Callable[[Toolstack, Width], None], ...] = (
    create_makes_a_paused_domain_without_memory,
    rename_changes_the_name,
    set_configuration_stores_what_configuration_returns,
    set_width_works_while_a_domain_has_no_memory,
    create_with_a_bad_number_of_vcpus_raises_einval,
    destroy_frees_the_memory_and_the_uuid,
    destroy_works_after_every_step_of_a_build,
    populate_physmap_stops_at_max_mem,
    populate_physmap_of_order_9_allocates_whole_extents,
    populate_physmap_sets_the_m2p,
    write_frames_and_map_writable_write_what_map_frames_reads,
    map_writable_keeps_writes_of_a_block_that_raises,
    write_frames_with_a_foreign_frame_writes_none,
    pin_tables_types_all_tables_below,
    pin_tables_stops_at_the_first_refused_table,
    pin_tables_of_a_table_mapped_writable_raises_ebusy,
    page_tables_and_writable_frames_exclude_each_other,
    set_vcpu_context_sets_what_vcpu_context_returns,
    write_shared_info_writes_within_the_page_only,
    alloc_event_channel_numbers_ports_per_domain,
    init_hypercall_page_writes_the_code,
    a_built_domain_passes_the_host_checks,
    toolstack_calls_for_an_absent_domain_raise_esrch,
    destroy_of_dom0_raises_einval,
)
