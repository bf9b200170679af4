"""What makes a domain of pages, once all of a stream has come: tables, start info, p2m, shared info, vcpus, grants.

xen.git:tools/libs/guest/xg_sr_restore_x86_pv.c x86_pv_stream_complete(), handle_shared_info(). What differs: everything
that lies in memory is written before the first table is validated; shared info says of the p2m nothing that was true on
another host only; and start info keeps the two flags that tell a kernel how to read it and what its tools can read.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import numpy as np

from xenpv.abi.x86 import (
    FIRST_RESERVED_GDT_ENTRY,
    GDT_ENTRIES_PER_FRAME,
    LEVELS,
    PTE_P,
    VCPU_GUEST_CONTEXT,
    VGCF_ONLINE,
)
from xenpv.abi.xen import (
    P2M_LEVELS_AT,
    SHARED_INFO,
    SIF_MOD_START_PFN,
    SIF_VIRT_P2M_4TOOLS,
    START_INFO,
    START_INFO_MAGIC,
)
from xenpv.errors import GuestError, RequestError
from xenpv.frames import ABSENT, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_BATCH, PINNED, U8, U64, PageType, first_bad, type_name
from xenpv.host.protocol import DomainInfo, Mover, Ring, TscInfo, VcpuState
from xenpv.memory.p2m import P2M
from xenpv.memory.pagetables import cr3_frame, cr3_of
from xenpv.memory.physmap import CHUNK
from xenpv.memory.publish import words
from xenpv.memory.radix import Runs
from xenpv.restore.pages import PagesIn
from xenpv.stream.contents import Contents, Vcpu

_KEPT_FLAGS = SIF_VIRT_P2M_4TOOLS | SIF_MOD_START_PFN


class Ports(NamedTuple):
    """The domain's event channels to its daemons."""

    console: int
    xenstore: int


class RestoreEnd:
    """The last part of one restore. ``tables`` and ``pinned`` are counted as they are done."""

    def __init__(self, host: Mover, info: DomainInfo, contents: Contents, pages: PagesIn, ports: Ports) -> None:
        self.host = host
        self.info = info
        self.domid = info.domid
        self.name = info.label
        self.width = info.width
        self.contents = contents
        self.pages = pages
        self.physmap = pages.physmap
        self.ports = ports
        self.tables = 0
        self.pinned = 0

    def run(self) -> tuple[Ring, Ring]:
        """All of it; the rings of console and xenstore. GuestError, RequestError, HostError: nothing can start then."""
        contexts = self._contexts()
        pfns, kinds = self.pages.tables.finish(self.contents.end_pfn, self.pages.populate)
        self.tables = len(pfns)
        rings = self._start_info(contexts[0])
        self._p2m()
        self._shared_info()
        tsc = self.contents.tsc
        if tsc is not None:
            self.host.set_tsc_info(self.domid, TscInfo(tsc.mode, tsc.khz, tsc.nsec, tsc.incarnation))
        for vcpu, context in contexts.items():
            self._vcpu(vcpu, context, self.contents.vcpus[vcpu])
        self._pin(pfns, kinds)
        self.host.seed_grants(self.domid, console=rings[0].mfn, xenstore=rings[1].mfn)
        return rings

    def _pin(self, pfns: U64, kinds: U8) -> None:
        pinned = kinds & PINNED != 0
        pfns, levels = pfns[pinned], kinds[pinned] & np.uint8(7)
        for i in range(0, len(pfns), PAGES_PER_BATCH):
            some = slice(i, i + PAGES_PER_BATCH)
            self.host.pin_tables(self.domid, self.physmap.mfns(pfns[some]), levels[some])
        self.pinned = len(pfns)

    # --- what says where things are ----------------------------------------------------------------------------------

    def _frame(self, what: str, pfn: int, *, level: int = 0) -> int:
        """The mfn of a pfn that must be an ordinary page, or a table of a level. GuestError in libxenguest's words."""
        end = self.contents.end_pfn
        if pfn > end:
            raise GuestError(f"{self.name}: {what} (pfn {pfn:#x}) out of range (last pfn {end:#x})")
        one = np.array([pfn], np.uint64)
        kind = int(self.physmap.types(one)[0])
        if kind == ABSENT:
            raise GuestError(f"{self.name}: {what} (pfn {pfn:#x}) has bad mfn: the stream has no such page")
        if (kind & 7 != level or kind >= PageType.BROKEN) if level else kind != PageType.NOTAB:
            expected = f"L{level}TAB" if level else "NOTAB"
            bad = f"has bad type {type_name(kind)}, expected {expected}"
            raise GuestError(f"{self.name}: {what} (pfn {pfn:#x}) {bad}")
        return int(self.physmap.mfns(one)[0])

    def _start_info(self, context: np.void) -> tuple[Ring, Ring]:
        """Say in start info what is another now; the rings of console and xenstore that it names."""
        register = "rdx" if self.width == 8 else "edx"
        pfn = int(context["user_regs"][register])
        mfn = self._frame("Start Info", pfn)
        context["user_regs"][register] = mfn
        with self.host.map_writable(self.domid, np.array([mfn], np.uint64)) as pages:
            info: Any = pages[0, : START_INFO.size(self.width)].view(START_INFO[self.width])[0]
            magic = START_INFO_MAGIC[self.width]
            if not bytes(info["magic"]).startswith(magic):
                what = f"pfn {pfn:#x}, its suspend record, does not begin with {magic.decode()!r}"
                raise GuestError(f"{self.name}: {what}: it is no start info page")
            xenstore = Ring(self._frame("XenStore", int(info["store_mfn"])), self.ports.xenstore)
            domu = info["console"]["domU"]
            console = Ring(self._frame("Console", int(domu["mfn"])), self.ports.console)
            info["store_mfn"], info["store_evtchn"] = xenstore.mfn, xenstore.port
            domu["mfn"], domu["evtchn"] = console.mfn, console.port
            info["nr_pages"] = self.contents.end_pfn + 1
            info["shared_info"] = self.info.shared_info_mfn << PAGE_SHIFT
            info["flags"] = int(info["flags"]) & _KEPT_FLAGS
        return console, xenstore

    def _leaves(self) -> Runs:
        """The pfns of the p2m's leaves, as the stream has them."""
        return Runs(*self.contents.p2m_leaf_runs)

    def _p2m(self) -> None:
        """Fill the p2m's leaves with what the domain has now; every other pfn has INVALID_MFN.

        Marks of foreign and identity pages are gone with it, as in libxenguest: what they named was the old host's.
        """
        width, entries = self.width, self.contents.end_pfn + 1
        p2m = P2M(width, entries, self._leaves(), _never_read)
        if len(holes := p2m.holes):
            hole = f"p2m_frame_list[{int(holes.first[0])}]"
            raise GuestError(f"{self.name}: {hole} did not come: the p2m has no leaf there")
        per_leaf, chunks = p2m.per_leaf, p2m.per_leaf // CHUNK
        distinct = p2m.distinct
        shared = np.isin(p2m.leaves.frame, distinct.frame[distinct.count > 1])
        some = p2m.leaves[shared]
        used = self.physmap.used(some.first * chunks, (some.first + some.count) * chunks)
        if (at := first_bad(used > 0)) is not None:
            what = f"p2m_frame_list[{int(some.first[at])}] (pfn {int(some.frame[at]):#x}) has pages, and stands in more"
            raise GuestError(f"{self.name}: {what} places: one would overwrite the other")
        for i in range(0, len(distinct), PAGES_PER_BATCH):
            leaves = distinct[i : i + PAGES_PER_BATCH]
            bad = (leaves.frame >= np.uint64(entries)) | (self.physmap.types(leaves.frame) != PageType.NOTAB)
            if (at := first_bad(bad)) is not None:
                self._frame(f"p2m_frame_list[{int(leaves.first[at])}]", int(leaves.frame[at]))
            held = leaves.first[:, None] * chunks + np.arange(chunks)
            table = self.physmap.of_chunks(held.astype(np.uint64).reshape(-1)).reshape(len(leaves), per_leaf)
            content = words(table, width)
            with self.host.map_writable(self.domid, self.physmap.mfns(leaves.frame)) as pages:
                beyond = (int(leaves.first[-1]) + 1) * per_leaf - entries
                if beyond > 0:  # what is behind the end of the p2m is not the p2m
                    content[-1, PAGE_SIZE - beyond * width :] = pages[-1, PAGE_SIZE - beyond * width :]
                pages[:] = content

    def _shared_info(self) -> None:
        """What the vcpus and the kernel have there; no event is pending, all are masked, and no p2m is shown yet."""
        record, width = self.contents.shared_info, self.width
        if record is None:  # before END, but behind the last checkpoint
            raise GuestError(f"{self.name}: its shared info did not come before the last checkpoint")
        data = np.zeros(PAGE_SIZE, np.uint8)
        new: Any = data[: SHARED_INFO.size(width)].view(SHARED_INFO[width])[0]
        old = SHARED_INFO.read(record.data, width)
        new["vcpu_info"] = old["vcpu_info"]
        new["vcpu_info"]["evtchn_pending_sel"] = 0
        new["evtchn_mask"] = np.iinfo(new["evtchn_mask"].dtype).max
        for field in ("max_pfn", "nmi_reason"):
            new["arch"][field] = old["arch"][field]
        host = self.host
        clock = SHARED_INFO.offset(width, "wc_version")  # Xen's own, between the events and the kernel's
        arch = SHARED_INFO.offset(width, "arch")
        end = arch + P2M_LEVELS_AT[width] + 2 * width
        host.write_shared_info(self.domid, data[:clock].tobytes())
        host.write_shared_info(self.domid, data[arch:end].tobytes(), arch)

    # --- vcpus -------------------------------------------------------------------------------------------------------

    def _contexts(self) -> dict[int, np.void]:
        """A context of each vcpu that came, to be changed."""
        vcpus, most = self.contents.vcpus, self.info.max_vcpu
        if 0 not in vcpus or vcpus[0].basic is None:
            raise GuestError(f"{self.name}: Sender didn't send vcpu0's basic state")
        if max(vcpus) > most:
            what = f"{self.name} has {most + 1} vcpus, and the stream has state of vcpu{max(vcpus)}"
            raise RequestError(what, needed=max(vcpus) + 1, available=most + 1)
        return {
            number: np.frombuffer(bytearray(vcpu.basic.context), VCPU_GUEST_CONTEXT[self.width])[0]
            for number, vcpu in sorted(vcpus.items())
            if vcpu.basic is not None
        }

    def _vcpu(self, number: int, context: np.void, vcpu: Vcpu) -> None:
        what, width, levels = f"vcpu{number}'s", self.width, LEVELS[self.width]
        context["flags"] = int(context["flags"]) | VGCF_ONLINE  # NumPy 1 has no uint64 | int
        entries = int(context["gdt_ents"])
        if entries > FIRST_RESERVED_GDT_ENTRY:
            count = f"GDT entry count ({entries}) of vcpu{number} out of range (max {FIRST_RESERVED_GDT_ENTRY})"
            raise GuestError(f"{self.name}: {count}")
        gdt = context["gdt_frames"]
        for i in range(-(-entries // GDT_ENTRIES_PER_FRAME)):
            gdt[i] = self._frame(f"{what} GDT frame {i}", int(gdt[i]))
        ctrlreg = context["ctrlreg"]
        top = self._frame(f"{what} cr3", cr3_frame(int(ctrlreg[3]), width), level=levels)
        ctrlreg[3] = cr3_of(top, width)
        user = int(ctrlreg[1])
        if width == 8 and user:
            if not user & PTE_P:
                raise GuestError(f"{self.name}: {what} cr1 is {user:#x}, without the mark of a pfn")
            ctrlreg[1] = self._frame(f"{what} cr1", user >> PAGE_SHIFT, level=levels) << PAGE_SHIFT
        self.host.set_vcpu_context(self.domid, number, context.tobytes())
        parts = vcpu.extended, vcpu.xsave, vcpu.msrs
        state = VcpuState(*(b"" if part is None else part.context for part in parts))
        if state != VcpuState():
            self.host.set_vcpu_state(self.domid, number, state)


def _never_read(_frames: U64) -> NoReturn:
    raise AssertionError("the p2m of a stream is written, and not read")
