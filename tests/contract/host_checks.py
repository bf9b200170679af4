"""What every Host must do: functions of a host and a running PV domain on it.

They run on ModelHost always, and on XenHost in the lab (host_on_xen.py). Where the two differ, the model is wrong.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np

from xenpv.abi.domctl import PageType
from xenpv.abi.x86 import PAGE_SIZE, PTE_FRAME_MASK, PTE_P, PTE_PSE, VCPU_GUEST_CONTEXT, XEN_L4_SLOTS
from xenpv.abi.xen import SHARED_INFO
from xenpv.errors import HostError
from xenpv.frames import U8, U64, DomId, Mfn
from xenpv.host.protocol import Host, find_domain
from xenpv.memory.page_tables import cr3_to_frame

ALL_ONES = (1 << 64) - 1
NO_DOMAIN = DomId(0x7FEF)  # the highest number that a domain may have, which no test host gets to
BEYOND = (1, 1 << 20, (1 << 40) - 1, (1 << 52) + 5)  # above max_mfn; the last becomes frame 5 if it is shifted by 12


def array(*mfns: int) -> U64:
    return np.array(mfns, dtype=np.uint64)


def top_table(host: Host, domid: DomId) -> Mfn:
    """The top page table of vcpu 0."""
    width = host.info(domid).width
    context = VCPU_GUEST_CONTEXT.read(host.vcpu_context(domid, 0), width)
    return Mfn(int(cr3_to_frame(int(context["ctrlreg"][3]), width)))


def entries(host: Host, domid: DomId, mfns: U64) -> U64:
    """All entries of these page tables, (n, 512)."""
    pages, mapped = host.map_frames(domid, mfns)
    assert mapped.all()
    return pages.view("<u8").reshape(-1, 512).copy()


def beyond(host: Host) -> U64:
    return array(*(host.max_mfn() + n for n in BEYOND[:2]), *BEYOND[2:], ALL_ONES)


def fails(call: Callable[[], object], number: int, domid: DomId | None) -> None:
    """The call raises HostError with that errno and that domain."""
    caught: HostError | None = None
    try:
        call()
    except HostError as error:
        caught = error
    assert caught is not None, "no HostError"
    assert (caught.errno, caught.domid) == (number, domid), caught
    assert caught.op, caught
    assert domid is None or f"dom{domid}" in str(caught), caught


def version_is_plausible(host: Host, domid: DomId) -> None:
    version = host.version()
    assert (version.major, version.minor) >= (4, 0)
    assert isinstance(version.extra, str)


def domains_are_ascending_and_include_dom0(host: Host, domid: DomId) -> None:
    listed = [d.domid for d in host.domains()]
    assert listed == sorted(set(listed))
    assert listed[0] == 0
    assert domid in listed


def info_equals_the_entry_of_domains(host: Host, domid: DomId) -> None:
    [listed] = [d for d in host.domains() if d.domid == domid]
    info = host.info(domid)
    for name in ("domid", "name", "uuid", "hvm", "width", "max_pages", "shared_info_mfn", "max_vcpu", "dying"):
        assert getattr(info, name) == getattr(listed, name), name
    assert not info.hvm
    assert info.width in {4, 8}
    assert 0 < info.pages <= info.max_pages
    assert info.max_vcpu >= 0
    assert (info.shutdown_reason is None) != info.shutdown


def find_domain_by_id_name_or_uuid_returns_it(host: Host, domid: DomId) -> None:
    info = host.info(domid)
    assert find_domain(host, str(domid)).domid == domid
    for text in (info.name, info.uuid):
        assert text is None or find_domain(host, text).domid == domid
    fails(lambda: find_domain(host, "no such domain"), errno.ESRCH, None)


def assert_gone(host: Host, domid: DomId) -> None:
    """Check that every call refuses a domain that does not exist, or not any more."""
    some = array(0)
    fails(lambda: host.info(domid), errno.ESRCH, domid)
    fails(lambda: host.map_frames(domid, some), errno.ESRCH, domid)
    fails(lambda: host.map_frames(domid, array()), errno.ESRCH, domid)
    fails(lambda: host.page_types(domid, some), errno.ESRCH, domid)
    fails(lambda: host.page_types(domid, array()), errno.ESRCH, domid)
    fails(lambda: host.vcpu_context(domid, 0), errno.ESRCH, domid)
    fails(lambda: host.shared_info(domid), errno.ESRCH, domid)
    fails(lambda: host.pause(domid), errno.ESRCH, domid)
    fails(lambda: host.unpause(domid), errno.ESRCH, domid)
    assert domid not in [d.domid for d in host.domains()]


def host_calls_for_an_absent_domain_raise_esrch(host: Host, domid: DomId) -> None:
    assert_gone(host, NO_DOMAIN)


def vcpu_context_beyond_the_last_vcpu_raises_einval(host: Host, domid: DomId) -> None:
    info = host.info(domid)
    assert len(host.vcpu_context(domid, 0)) == VCPU_GUEST_CONTEXT.size(info.width)
    fails(lambda: host.vcpu_context(domid, info.max_vcpu + 1), errno.EINVAL, domid)


def cr3_names_a_pinned_top_level_table(host: Host, domid: DomId) -> None:
    kind = PageType.L4TAB_PIN if host.info(domid).width == 8 else PageType.L3TAB_PIN
    assert host.page_types(domid, array(top_table(host, domid))).tolist() == [kind]


def entries_of_tables_name_tables_of_the_level_below(host: Host, domid: DomId) -> None:
    """Follow the present entries from cr3, except Xen's slots. The domain is paused, so that nothing changes."""
    width = host.info(domid).width
    tables = array(top_table(host, domid))
    host.pause(domid)
    try:
        for kind in (PageType.L4TAB, PageType.L3TAB, PageType.L2TAB, PageType.L1TAB)[8 - width >> 2 :]:
            found = host.page_types(domid, tables)
            assert ((found & 7) == kind).all(), (kind, found)
            if kind == PageType.L1TAB:
                break
            ptes = entries(host, domid, tables)
            if kind == PageType.L4TAB:
                ptes[:, XEN_L4_SLOTS.start : XEN_L4_SLOTS.stop] = 0
            if kind == PageType.L3TAB and width == 4:
                ptes[:, 4:] = 0
            if kind == PageType.L2TAB and width == 4:
                return  # where Xen's own entries are depends on which of the four this is
            here = ptes[(ptes & np.uint64(PTE_P | PTE_PSE)) == PTE_P]
            tables = np.unique((here & np.uint64(PTE_FRAME_MASK)) >> np.uint64(12))[:4096]
            assert len(tables)
    finally:
        host.unpause(domid)


def m2p_of_a_table_is_a_pfn_of_the_domain(host: Host, domid: DomId) -> None:
    top = top_table(host, domid)
    info = SHARED_INFO.read(host.shared_info(domid), host.info(domid).width)
    [pfn] = host.m2p(array(top)).tolist()
    assert pfn != ALL_ONES
    assert pfn < int(info["arch"]["max_pfn"]) or not int(info["arch"]["max_pfn"])


def m2p_keeps_the_order_and_is_all_ones_beyond_the_host(host: Host, domid: DomId) -> None:
    top = top_table(host, domid)
    [pfn] = host.m2p(array(top)).tolist()
    far = beyond(host)
    found = host.m2p(np.concatenate([array(top), far, array(top)]))
    assert found.dtype == np.uint64
    assert found.tolist() == [pfn, *[ALL_ONES] * len(far), pfn]
    assert host.m2p(array()).shape == (0,)


def map_frames_zeroes_frames_that_cannot_be_mapped(host: Host, domid: DomId) -> None:
    top = top_table(host, domid)
    other = 1 if domid == 0 else 0
    foreign = array(host.info(DomId(other)).shared_info_mfn)
    bad = np.concatenate([beyond(host), foreign])
    wanted = np.concatenate([array(top), bad, array(top)])
    host.pause(domid)
    try:
        pages, mapped = host.map_frames(domid, wanted)
        assert pages.shape == (len(wanted), PAGE_SIZE)
        assert pages.dtype == mapped.dtype == np.uint8
        assert mapped.tolist() == [1, *[0] * len(bad), 1]
        assert not pages[1:-1].any()
        assert pages[0].any()
        assert (pages[0] == pages[-1]).all()
        first = pages[0].copy()
        alone, _ = host.map_frames(domid, array(top))
        assert (alone[0] == first).all()
    finally:
        host.unpause(domid)
    assert host.page_types(domid, bad).tolist() == [PageType.XTAB] * len(bad)


def map_frames_and_page_types_of_no_frames_are_empty(host: Host, domid: DomId) -> None:
    pages, mapped = host.map_frames(domid, array())
    assert pages.shape == (0, PAGE_SIZE)
    assert mapped.shape == (0,)
    assert host.page_types(domid, array()).shape == (0,)


def page_types_of_more_frames_than_one_hypercall_takes(host: Host, domid: DomId) -> None:
    """getpageframeinfo3 takes 1024."""
    top = top_table(host, domid)
    wanted = np.full(2500, top, np.uint64)
    wanted[1024] = ALL_ONES
    expected: U8 = np.ones(2500, np.uint8)
    expected[1024] = 0
    types = host.page_types(domid, wanted)
    assert ((types == PageType.XTAB) == (expected == 0)).all()
    assert (host.map_frames(domid, wanted)[1] == expected).all()


def shared_info_is_the_frame_in_domain_info(host: Host, domid: DomId) -> None:
    host.pause(domid)
    try:
        page = host.shared_info(domid)
        assert len(page) == PAGE_SIZE
        pages, mapped = host.map_frames(domid, array(host.info(domid).shared_info_mfn))
        assert mapped.tolist() == [1]
        width = host.info(domid).width
        one, two = (SHARED_INFO.read(data, width)["arch"] for data in (page, pages.tobytes()))
        assert one == two  # but not the clock, which Xen goes on writing
    finally:
        host.unpause(domid)


def pauses_are_counted(host: Host, domid: DomId) -> None:
    before = host.info(domid).paused
    host.pause(domid)
    host.pause(domid)
    host.unpause(domid)
    assert host.info(domid).paused
    host.unpause(domid)
    assert host.info(domid).paused == before


HOST_CHECKS: tuple[Callable[[Host, DomId], None], ...] = (
    version_is_plausible,
    domains_are_ascending_and_include_dom0,
    info_equals_the_entry_of_domains,
    find_domain_by_id_name_or_uuid_returns_it,
    host_calls_for_an_absent_domain_raise_esrch,
    vcpu_context_beyond_the_last_vcpu_raises_einval,
    cr3_names_a_pinned_top_level_table,
    entries_of_tables_name_tables_of_the_level_below,
    m2p_of_a_table_is_a_pfn_of_the_domain,
    m2p_keeps_the_order_and_is_all_ones_beyond_the_host,
    map_frames_zeroes_frames_that_cannot_be_mapped,
    map_frames_and_page_types_of_no_frames_are_empty,
    page_types_of_more_frames_than_one_hypercall_takes,
    shared_info_is_the_frame_in_domain_info,
    pauses_are_counted,
)
