"""A domain that stands still, as a stream: what xl save writes, at the cost of what the domain has.

The steps are apart, so that who saves a running domain can take them in another order: ``preflight`` looks at all that
could go wrong before a byte is written, ``frames`` is the p2m, ``batches`` the pages, ``tail`` what is sent while the
domain stands still.

What differs from xen.git:tools/libs/guest/xg_sr_save.c and xg_sr_save_x86_pv.c: pfns without a page are left out rather
than sent as XTAB, 8 bytes each up to max_pfn, which comes to the same at restore; the end of the p2m is cut off where
its leaves are all one, not only where whole tables are; p2m trees of more than three levels are walked; and what a
restorer would stumble over is refused here (see ``Saver.preflight``).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from xenpv.abi.x86 import (
    FIRST_RESERVED_GDT_ENTRY,
    GDT_ENTRIES_PER_FRAME,
    LEVELS,
    PTE_P,
    PTE_PSE,
    VCPU_GUEST_CONTEXT,
    VGCF_ONLINE,
    XEN_PAE_L2_FIRST,
)
from xenpv.abi.xen import START_INFO_MAGIC
from xenpv.domain.live import LiveDomain
from xenpv.errors import Fault, GuestError, HostError, RequestError
from xenpv.frames import (
    FOREIGN,
    HAS_DATA,
    IDENTITY,
    IS_KNOWN,
    IS_TABLE,
    NO_FRAME,
    PAGE_SHIFT,
    U8,
    U64,
    DomId,
    Mask,
    PageType,
)
from xenpv.host import DomainInfo, Host
from xenpv.memory.p2m import P2M, is_own
from xenpv.memory.pagetables import as_entries, cr3_frame, cr3_of, frames, is_xen_slot, normalise
from xenpv.memory.radix import Runs
from xenpv.stream.envelope import Kind
from xenpv.stream.fields import Buffer
from xenpv.stream.libxl import LibxlEnd
from xenpv.stream.pagedata import TYPE_SHIFT
from xenpv.stream.records import End, Record, SharedInfo, StaticDataEnd, VcpuBasic, X86PVInfo, X86PVP2MFrames
from xenpv.stream.writer import Writer

BATCH = 1024  # pages with content in a record: MAX_BATCH_SIZE of libxenguest
ENTRIES_MAX = 1 << 16  # entries of a record; a restorer bounds them by the record's length alone
PFNS_MAX = 1 << 32  # X86_PV_P2M_FRAMES counts them in 32 bits

_SUSPEND = 2  # SHUTDOWN_suspend, xen.git:xen/include/public/sched.h
_NO_SUCH_VCPU = frozenset({errno.ENODATA, errno.ESRCH, errno.EINVAL})  # never started, or not there

Progress = Callable[[int, int], None]
"""progress(pages saved, pages in all): called now and then."""


class Sink(Protocol):
    """Where a stream goes (domain/output.py)."""

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Take all of the buffers, in order: when it returns, they may hold something else."""


@dataclass
class Summary:
    """What was saved. ``entries`` are those of the p2m up to its last page, ``bytes`` of the whole stream.

    ``pages`` have content, ``tables`` of them are page tables. The others are p2m entries without any: ``foreign`` and
    ``identity`` are marked so by the guest, ``lost`` claim a frame that is not the domain's (a verifier will say so),
    ``empty`` have one of which Xen gives no content (broken, or not allocated).
    """

    name: str
    entries: int = 0
    pages: int = 0
    tables: int = 0
    foreign: int = 0
    identity: int = 0
    lost: int = 0
    empty: int = 0
    bytes: int = 0


def save(
    host: Host,
    domid: DomId,
    sink: Sink,
    *,
    config: bytes = b"",
    envelope: Kind = Kind.XL,
    progress: Progress | None = None,
) -> Summary:
    """Write a domain that has suspended, and whatever it is does not run, to ``sink``.

    ``envelope``: xl's file with ``config`` in it, JSON as libxl_domain_config_to_json() makes it (a file without it
    restores with xl restore CONFIG FILE), or a bare libxl or libxc stream. A Host has no calls for a vcpu's extended,
    xsave and MSR state, nor for the TSC and the CPU policies: those records are left out, which the format allows; the
    domain's vcpus come back with what Xen starts them with.

    Raises, before the sink has anything, RequestError for what cannot be asked for, GuestError for what the guest has
    that cannot be saved, HostError when Xen says no; and, when it has had something, GuestError for a page table that
    cannot be translated, HostError, and whatever the sink raises. The domain stays as it is, always.
    """
    saver = Saver(host, domid)
    saver.preflight()
    version = host.version()
    writer = Writer(envelope, xen=(version.major, version.minor), config=config)
    head, tail = saver.head(), saver.tail()
    sink.write(writer.start())
    for record in head:
        sink.write(writer.send(record))
    for entries, contents in saver.batches():
        sink.write(writer.pages(entries, contents))
        if progress is not None:
            progress(saver.summary.pages, saver.total)
    saver.stands_still()
    for record in tail:
        sink.write(writer.send(record))
    sink.write(writer.send(End()))
    if not writer.done:
        sink.write(writer.send(LibxlEnd()))
    saver.summary.bytes = writer.offset
    return saver.summary


class Saver:
    """The steps of saving one domain. ``total``: the pages that its p2m names, once ``preflight`` has counted them."""

    def __init__(self, host: Host, domid: DomId) -> None:
        self.host = host
        self.domid = domid
        self.live = LiveDomain(host, host.info(domid))
        self.width = self.live.info.width
        self.summary = Summary(self.live.name)
        self.total = 0

    # --- before a byte is written ------------------------------------------------------------------------------------

    def preflight(self) -> None:
        """Look at all that can be seen to go wrong. RequestError, GuestError, or HostError, in words."""
        info, name = self.live.info, self.live.name
        if info.hvm:
            raise RequestError(f"{name} is an HVM domain; PV domains are saved")
        if info.dying:
            raise RequestError(f"{name} is dying")
        if not _stands(info):
            raise RequestError(f"{name} is running: suspend it first")
        anchors = self.live.anchors
        if anchors.p2m_cr3 and anchors.p2m_generation & 1:
            generation = anchors.p2m_generation
            raise GuestError(f"{name}: p2m_generation {generation:#x} is odd: it was stopped while it changed its p2m")
        if not anchors.max_pfn:
            raise GuestError(f"{name}: its p2m has no entries: arch.max_pfn is 0")
        self._check_p2m()
        self._count()

    def stands_still(self) -> None:
        """HostError if somebody let the domain run meanwhile: what was saved would be of no one moment."""
        if not _stands(self.host.info(self.domid)):
            raise HostError(f"{self.live.name} was let run while it was saved", op="save", domid=self.domid)

    @cached_property
    def p2m(self) -> P2M:
        """Its p2m up to where its leaves are all one to the end: nothing is there, or they would be in two places."""
        whole = self.live.p2m
        entries = whole.used
        return replace(whole, entries=entries, leaves=whole.leaves.below(-(-entries // whole.per_leaf)))

    def _check_p2m(self) -> None:
        p2m, name = self.p2m, self.live.name
        self.summary.entries = p2m.entries
        if p2m.entries > PFNS_MAX:
            what = (
                f"{name}: its p2m reaches pfn {p2m.entries - 1:#x}; a stream has pfns up to {PFNS_MAX - 1:#x} (16 TiB)"
            )
            raise RequestError(what, needed=p2m.entries, available=PFNS_MAX)
        for table in p2m.unreadable:
            where = f"the table at mfn {table.frame:#x}, {table.level} above the leaves"
            raise GuestError(f"{name}: its p2m cannot be read: {where}")
        holes = p2m.holes
        if len(holes):
            first, count = int(holes.first[0]), int(holes.count[0])
            what = f"{name}: its p2m has no leaf for pfns {first * p2m.per_leaf:#x} to "
            raise GuestError(what + f"{(first + count) * p2m.per_leaf - 1:#x}, and a stream has to name one")

    def _count(self) -> None:
        """One pass over the p2m: what it names, and that no leaf which names a page stands in two places."""

        def lost(leaves: Runs) -> None:
            what = f"{self.live.name}: p2m_frame_list[{int(leaves.first[0])}], mfn {int(leaves.frame[0]):#x},"
            raise GuestError(f"{what} cannot be read")

        for leaves in self.p2m.content(lost=lost):
            mfns, times = leaves.mfns, leaves.times
            own = np.count_nonzero(is_own(mfns), axis=1)
            for at in np.flatnonzero((own > 0) & (times > 1))[:1].tolist():
                what = f"{self.live.name}: p2m_frame_list[{int(leaves.first[at])}] holds {own[at]} pages, and stands in"
                raise GuestError(f"{what} {int(times[at])} places: after a restore one would overwrite the other")
            self.total += int(own.sum())
            marked = mfns != NO_FRAME
            foreign = marked & (mfns & FOREIGN != 0)
            identity = marked & ~foreign & (mfns & IDENTITY != 0)
            self.summary.foreign += int(np.count_nonzero(foreign, axis=1) @ times)
            self.summary.identity += int(np.count_nonzero(identity, axis=1) @ times)

    # --- records -----------------------------------------------------------------------------------------------------

    def head(self) -> list[Record]:
        """Static data, and the p2m's frames."""
        width = self.width
        return [X86PVInfo(guest_width=width, pt_levels=LEVELS[width]), StaticDataEnd(), self.frames()]

    def frames(self) -> X86PVP2MFrames:
        """The pfns of the p2m's leaves. GuestError for a leaf that is no page of the domain."""
        distinct, leaves = self.p2m.distinct, self.p2m.leaves
        pfns = self.live.pfns_of(distinct.frame)
        for bad in np.flatnonzero(pfns == NO_FRAME)[:1].tolist():
            raise self._bad_mfn(f"p2m_frame_list[{int(distinct.first[bad])}]", int(distinct.frame[bad]))
        order = np.argsort(distinct.frame)
        of_run = pfns[order][np.searchsorted(distinct.frame[order], leaves.frame)]
        raw = np.repeat(of_run, leaves.count).astype("<u8", copy=False)  # 64 MiB of a domain that reaches 16 TiB
        return X86PVP2MFrames(start_pfn=0, end_pfn=self.p2m.entries - 1, raw=raw.view(np.uint8).data)

    def tail(self) -> list[Record]:
        """Shared info as it is, and the vcpus that are online."""
        records: list[Record] = [SharedInfo(data=self.host.shared_info(self.domid))]
        for vcpu in self.live.vcpus or [0]:
            context = self._context(vcpu)
            if context is not None:
                records.append(VcpuBasic(vcpu_id=vcpu, context=context))
        return records

    def _context(self, vcpu: int) -> bytes | None:
        """A vcpu's context with pfns for mfns; None for one that is not online. GuestError for frames not its own."""
        width = self.width
        try:
            data = bytearray(self.host.vcpu_context(self.domid, vcpu))
        except HostError as e:
            self.host.info(self.domid)  # ESRCH may be of the domain, too
            if vcpu == 0 or e.errno not in _NO_SUCH_VCPU:
                raise
            return None
        context = np.frombuffer(data, VCPU_GUEST_CONTEXT[width])
        if not int(context["flags"][0]) & VGCF_ONLINE:
            if vcpu == 0:
                raise GuestError(f"{self.live.name}: vcpu 0 is offline, and nothing else can resume it")
            return None
        if vcpu == 0:
            register = "rdx" if width == 8 else "edx"
            context["user_regs"][register] = self._start_info(int(context["user_regs"][register][0]))
        entries = int(context["gdt_ents"][0])
        if entries > FIRST_RESERVED_GDT_ENTRY:
            what = f"{self.live.name}: GDT entry count ({entries}) of vcpu{vcpu} out of range"
            raise GuestError(f"{what} (max {FIRST_RESERVED_GDT_ENTRY})")
        gdt = context["gdt_frames"][0]
        for i in range(-(-entries // GDT_ENTRIES_PER_FRAME)):
            gdt[i] = self._pfn(f"frame {i} of vcpu{vcpu}'s GDT", int(gdt[i]))
        ctrlreg = context["ctrlreg"][0]
        ctrlreg[3] = cr3_of(self._pfn(f"vcpu{vcpu}'s cr3", cr3_frame(int(ctrlreg[3]), width)), width)
        if width == 8 and ctrlreg[1]:
            user = self._pfn(f"vcpu{vcpu}'s cr1", int(ctrlreg[1]) >> PAGE_SHIFT)
            ctrlreg[1] = user << PAGE_SHIFT | PTE_P  # the mark of a pfn
        return bytes(data)

    def _start_info(self, mfn: int) -> int:
        """The pfn of the suspend record, which a restorer writes to: so a start info page has to be there."""
        pfn = self._pfn("suspend record", mfn)
        page, _ = self.live.read(np.array([mfn], np.uint64))
        magic = START_INFO_MAGIC[self.width]
        if not page.tobytes().startswith(magic):
            what = f"{self.live.name}: pfn {pfn:#x}, its suspend record, is no start info page"
            raise GuestError(what + self._why_not())
        return pfn

    def _why_not(self) -> str:
        """What explains that a domain is not ready to be saved, if anything does."""
        ready = self.live.info.shutdown_reason == _SUSPEND
        return "" if ready else ": it stands still, but its kernel has not suspended"

    def _pfn(self, what: str, mfn: int) -> int:
        pfn = int(self.live.pfns_of(np.array([mfn], np.uint64))[0])
        if pfn == int(NO_FRAME):
            raise self._bad_mfn(what, mfn)
        return pfn

    def _bad_mfn(self, what: str, mfn: int) -> GuestError:
        """As libxenguest has it: what m2p and p2m say."""
        one = np.array([mfn], np.uint64)
        pfn = self.host.m2p(one)
        other = int(self.live.p2m.lookup(pfn)[0])
        where = f"mfn {mfn:#x}, m2p[{mfn:#x}] = {int(pfn[0]):#x}, p2m[{int(pfn[0]):#x}] = {other:#x}"
        return GuestError(f"{self.live.name}: Bad mfn for {what}: {where}{self._why_not()}")

    # --- pages -------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[bytes, list[Buffer]]]:
        """All that the p2m names, ascending: entries as in PAGE_DATA, and page content. BATCH pages with content at a
        time, or ENTRIES_MAX without any.

        Content of pages that are no tables is the host's own mapping, gone when the next is asked for.
        """
        pfns = mfns = np.empty(0, np.uint64)
        kinds = np.empty(0, np.uint8)
        for leaves in self.p2m.content():
            own = is_own(leaves.mfns)
            new = leaves.mfns[own]
            pfns, mfns = np.append(pfns, leaves.pfns[own]), np.append(mfns, new)
            kinds = np.append(kinds, self._types(pfns[len(kinds) :], new))
            begin = 0
            for end in _ends(HAS_DATA[kinds]):
                yield self.batch(pfns[begin:end], mfns[begin:end], kinds[begin:end])
                begin = end
            pfns, mfns, kinds = pfns[begin:], mfns[begin:], kinds[begin:]
        if len(pfns):
            yield self.batch(pfns, mfns, kinds)

    def _types(self, pfns: U64, mfns: U64) -> U8:
        kinds = self.host.page_types(self.domid, mfns)
        for at in np.flatnonzero(~IS_KNOWN[kinds])[:1].tolist():
            what = f"Unknown type {int(kinds[at]):#x} for pfn {int(pfns[at]):#x} (mfn {int(mfns[at]):#x})"
            raise HostError(f"{self.live.name}: {what}", op="getpageframeinfo3", domid=self.domid)
        return kinds

    def batch(self, pfns: U64, mfns: U64, kinds: U8) -> tuple[bytes, list[Buffer]]:
        """Some pages of those types, as ``batches`` has them."""
        there = HAS_DATA[kinds]
        summary = self.summary
        contents: list[Buffer] = []
        if there.any():
            table = IS_TABLE[kinds]
            plain = there & ~table
            # Tables first: to translate them reads the p2m, and the mapping of the others must outlive that.
            tables = self._mapped(pfns[table], mfns[table]).copy()
            self._normalise(tables, kinds[table], pfns[table])
            contents = _interleaved(table[there], tables, self._mapped(pfns[plain], mfns[plain]))
            summary.tables += len(tables)
        sent, lost = int(np.count_nonzero(there)), int(np.count_nonzero(kinds == PageType.XTAB))
        summary.pages += sent
        summary.lost += lost
        summary.empty += len(kinds) - sent - lost
        entries = kinds.astype(np.uint64) << np.uint64(TYPE_SHIFT) | pfns
        return entries.astype("<u8", copy=False).tobytes(), contents

    def _mapped(self, pfns: U64, mfns: U64) -> U8:
        if not len(mfns):
            return np.empty((0, 1 << PAGE_SHIFT), np.uint8)
        pages, readable = self.live.read(mfns)
        for at in np.flatnonzero(~readable)[:1].tolist():
            what = f"pfn {int(pfns[at]):#x} (mfn {int(mfns[at]):#x}) cannot be mapped"
            raise HostError(f"{self.live.name}: {what}", op="map_frames", domid=self.domid)
        return pages

    def _normalise(self, pages: U8, kinds: U8, pfns: U64) -> None:
        """Put pfns for mfns in page tables. Fault for an entry that names no frame of the domain, or a superpage."""
        for level in np.unique(kinds & 7).tolist():
            rows = np.flatnonzero(kinds & 7 == level)
            if level > LEVELS[self.width]:
                raise self._bad_entry(f"an L{level} table in a 32-bit guest", int(pfns[rows[0]]), level, None)
            ptes, bad = normalise(as_entries(pages[rows]), self.live.pfns_of, is_xen_slot(level, self.width))
            if self.width == 4 and level == 2:
                # Xen's own entries are in one L2 of the guest's: that whose first of them is no frame of the guest.
                xens = bad[:, XEN_PAE_L2_FIRST, None] & is_xen_slot(2, 4, last_pae_l2=True)
                ptes[xens], bad[xens] = 0, False
            large = (ptes & np.uint64(PTE_P | PTE_PSE) == np.uint64(PTE_P | PTE_PSE)) if level > 1 else bad & False
            for row, slot in np.argwhere(large | bad)[:1].tolist():
                pte, pfn = as_entries(pages[rows[row] : rows[row] + 1])[0, slot], int(pfns[rows[row]])
                if large[row, slot]:
                    raise self._bad_entry(f"superpage ({int(pte):#x})", pfn, level, slot)
                mfn = int(frames(np.array([pte]))[0])
                raise self._bad_entry(f"mfn {mfn:#x} is no frame of the domain", pfn, level, slot)
            pages[rows] = ptes.view(np.uint8).reshape(len(rows), -1)

    def _bad_entry(self, why: str, pfn: int, level: int, slot: int | None) -> Fault:
        where = f"L{level}" + ("" if slot is None else f"[{slot}]")
        count = self.summary.foreign
        others = f"; its p2m has {count} of other domains' pages mapped" if count else ""
        what = f"{self.live.name}: Bad entry {where} of pfn {pfn:#x}: {why}{others}"
        return Fault(what, space="pfn", address=pfn, level=level, entry=slot)


def _stands(info: DomainInfo) -> bool:
    return info.paused or info.shutdown


def _ends(there: Mask) -> list[int]:
    """Where records end that hold these entries, of which some have content; what is left fills none."""
    full = np.flatnonzero(there)[BATCH - 1 :: BATCH] + 1
    return np.union1d(full, np.arange(ENTRIES_MAX, len(there) + 1, ENTRIES_MAX)).tolist()


def _interleaved(is_table: Mask, tables: U8, content: U8) -> list[Buffer]:
    """Pages of two arrays in the order that ``is_table`` says, in as few buffers as it takes."""
    out: list[Buffer] = []
    taken = {True: 0, False: 0}
    for run in np.split(is_table, np.flatnonzero(np.diff(is_table)) + 1):
        if len(run):
            mine, of = bool(run[0]), tables if run[0] else content
            first, taken[mine] = taken[mine], taken[mine] + len(run)
            out.append(of[first : first + len(run)].reshape(-1).data)
    return out
