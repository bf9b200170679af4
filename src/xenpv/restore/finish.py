"""Makes a runnable domain of loaded pages once a stream is complete.

It sets page tables, p2m, shared info, vcpus and grants.

Source: xen.git:tools/libs/guest/xg_sr_restore_x86_pv.c x86_pv_stream_complete(), handle_shared_info(). Differences:

- All memory is written before the first page table is validated.
- Shared info publishes no p2m, since the old one named frames of another host.
- Start info keeps two flags: how the kernel finds its ramdisk, and that tools can read its virtual p2m.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from xenpv.cpu.descriptors import describe_refused, refused_descriptors
from xenpv.cpu.records import iter_refused_tsc, iter_refused_vcpu_state, raise_if_refused
from xenpv.errors import GuestError, RequestError
from xenpv.frames import ABSENT, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_BATCH, PINNED, U8, U64, PageType, first_bad, type_name
from xenpv.host.protocol import DomainInfo, Mover, Ring, TscInfo, VcpuState
from xenpv.memory.p2m_reader import P2M
from xenpv.memory.p2m_writer import encode_entries
from xenpv.memory.page_tables import cr3_to_frame, frame_to_cr3
from xenpv.memory.physmap import CHUNK
from xenpv.memory.registers import gdt_frames
from xenpv.memory.rings import ring_conflict
from xenpv.restore.pages import MemoryLoader
from xenpv.stream.contents import Contents, Vcpu

_KEPT_FLAGS = SIF_VIRT_P2M_4TOOLS | SIF_MOD_START_PFN


class Ports(NamedTuple):
    """The domain's event channels to its daemons."""

    console: int
    xenstore: int


class Completed(NamedTuple):
    """The rings of a completed domain, and its number of (pinned) page tables."""

    console: Ring
    xenstore: Ring
    page_tables: int
    pinned: int


class StreamComplete:
    """Completes one domain after its stream.

    Args:
        host: The host of the domain.
        info: The domain.
        contents: All records of the stream but its pages.
        memory: The domain's memory, flushed.
        ports: The domain's event channels.
    """

    def __init__(self, host: Mover, info: DomainInfo, contents: Contents, memory: MemoryLoader, ports: Ports) -> None:
        self.host = host
        self.info = info
        self.domid = info.domid
        self.name = info.label
        self.width = info.width
        self.contents = contents
        self.memory = memory
        self.physmap = memory.physmap
        self.ports = ports

    def run(self) -> Completed:
        """Complete the domain; it can be unpaused then.

        Raises:
            StreamError: Xen would refuse the state of a vcpu or the TSC.
            GuestError: The guest's memory or state contradicts itself.
            RequestError: The domain has too few vcpus.
            HostError: Xen refuses something.
        """
        contexts = self._vcpu_contexts()
        raise_if_refused(iter_refused_tsc(self.contents))
        for number in contexts:
            raise_if_refused(iter_refused_vcpu_state(self.contents, number, self.contents.vcpus[number]))
        pfns, types = self.memory.tables.finish(self.contents.end_pfn, self.memory.populate)
        console, xenstore = self._update_start_info(contexts)
        self._write_p2m()
        self._write_shared_info()
        tsc = self.contents.tsc
        if tsc is not None:
            self.host.set_tsc_info(self.domid, TscInfo(tsc.mode, tsc.khz, tsc.nsec, tsc.incarnation))
        for vcpu, context in contexts.items():
            self._set_vcpu(vcpu, context, self.contents.vcpus[vcpu])
        pinned = self._pin(pfns, types)
        self.host.seed_grants(self.domid, console=console.mfn, xenstore=xenstore.mfn)
        return Completed(console, xenstore, len(pfns), pinned)

    def _pin(self, pfns: U64, types: U8) -> int:
        """Pin the page tables that were pinned when they were sent; return how many."""
        is_pinned = types & PINNED != 0
        pfns, levels = pfns[is_pinned], types[is_pinned] & np.uint8(7)
        for i in range(0, len(pfns), PAGES_PER_BATCH):
            batch = slice(i, i + PAGES_PER_BATCH)
            self.host.pin_tables(self.domid, self.physmap.lookup(pfns[batch]), levels[batch])
        return len(pfns)

    # --- memory ------------------------------------------------------------------------------------------------------

    def _lookup_page(self, role: str, pfn: int, *, level: int = 0) -> int:
        """Return the mfn of an ordinary page, or of a page table of ``level``.

        Args:
            role: What the page is for; the message begins with it.
            pfn: The page.
            level: The level that the page table must have; 0 for an ordinary page.

        Raises:
            GuestError: The page is absent or has another type. The message is libxenguest's.
        """
        end = self.contents.end_pfn
        as_array = np.array([pfn], np.uint64)
        page_type = int(self.physmap.types(as_array)[0])
        if pfn > end:
            problem = f"out of range (last pfn {end:#x})"
        elif page_type == ABSENT:
            problem = "has bad mfn: the stream has no such page"
        elif level and (page_type & 7 != level or page_type >= PageType.BROKEN):
            problem = f"has bad type {type_name(page_type)}, expected L{level}TAB"
        elif not level and page_type != PageType.NOTAB:
            problem = f"has bad type {type_name(page_type)}, expected NOTAB"
        else:
            return int(self.physmap.lookup(as_array)[0])
        raise GuestError(f"{self.name}: {role} (pfn {pfn:#x}) {problem}", pfn=pfn)

    def _lookup_ring(self, role: str, pfn: int, *, start_info: int, other_ring: int, gdt: U64) -> int:
        """Return the mfn of a daemon's ring.

        GuestError for a page that cannot be one.
        """
        as_array = np.array([pfn], np.uint64)
        page_type = int(self.physmap.types(as_array)[0])
        if pfn > self.contents.end_pfn or page_type == ABSENT:
            return self._lookup_page(role, pfn)  # raises
        leaves = self.contents.p2m_leaf_runs.frame
        conflict = ring_conflict(pfn, page_type, start_info=start_info, other_ring=other_ring, gdt=gdt, leaves=leaves)
        if conflict is not None:
            raise GuestError(f"{self.name}: {role} (pfn {pfn:#x}) {conflict}", pfn=pfn)
        return int(self.physmap.lookup(as_array)[0])

    def _lookup_gdt_frame(self, role: str, pfn: int) -> int:
        """Return the mfn of a frame of descriptors.

        Raises GuestError if Xen would refuse one of them.
        """
        mfn = self._lookup_page(role, pfn)
        pages, _ = self.host.map_frames(self.domid, np.array([mfn], np.uint64))
        if (index := first_bad(refused_descriptors(pages, self.width)[0])) is not None:
            problem = describe_refused(pages[0], index)
            raise GuestError(f"{self.name}: {role} (pfn {pfn:#x}): {problem}", pfn=pfn)
        return mfn

    def _update_start_info(self, contexts: Mapping[int, np.void]) -> tuple[Ring, Ring]:
        """Write this host's values to start info.

        Returns the console and xenstore rings that it names.

        ``contexts`` are those of the stream: vcpu 0's register gets the mfn of start info.
        """
        context, gdt = contexts[0], gdt_frames(contexts.values())
        register = "rdx" if self.width == 8 else "edx"
        pfn = int(context["user_regs"][register])
        mfn = self._lookup_page("Start Info", pfn)
        context["user_regs"][register] = mfn
        with self.host.map_writable(self.domid, np.array([mfn], np.uint64)) as pages:
            info: Any = pages[0, : START_INFO.size(self.width)].view(START_INFO[self.width])[0]
            magic = START_INFO_MAGIC[self.width]
            if not bytes(info["magic"]).startswith(magic):
                problem = f"pfn {pfn:#x}, its suspend record, is not a start info page"
                raise GuestError(f"{self.name}: {problem}: it does not begin with {magic.decode()!r}", pfn=pfn)
            domu = info["console"]["domU"]
            store_pfn, console_pfn = int(info["store_mfn"]), int(domu["mfn"])
            mfn = self._lookup_ring("XenStore", store_pfn, start_info=pfn, other_ring=console_pfn, gdt=gdt)
            xenstore = Ring(mfn, self.ports.xenstore)
            mfn = self._lookup_ring("Console", console_pfn, start_info=pfn, other_ring=store_pfn, gdt=gdt)
            console = Ring(mfn, self.ports.console)
            info["store_mfn"], info["store_evtchn"] = xenstore.mfn, xenstore.port
            domu["mfn"], domu["evtchn"] = console.mfn, console.port
            info["nr_pages"] = self.contents.end_pfn + 1
            info["shared_info"] = self.info.shared_info_mfn << PAGE_SHIFT
            info["flags"] = int(info["flags"]) & _KEPT_FLAGS
        return console, xenstore

    def _write_p2m(self) -> None:
        """Write the new mfns into the leaves of the p2m, INVALID_MFN for the rest.

        Marks of foreign and identity pages are lost, as in libxenguest: they named frames of the old host.
        """
        width, entries = self.width, self.contents.end_pfn + 1
        p2m = P2M(width, entries, self.contents.p2m_leaf_runs, _never_read)
        if len(holes := p2m.holes):
            leaf = f"p2m_frame_list[{int(holes.first[0])}]"
            raise GuestError(f"{self.name}: a leaf of the p2m is missing: the stream has no {leaf}")
        self._check_shared_leaves(p2m)
        distinct, per_leaf, chunks = p2m.distinct_leaves, p2m.entries_per_leaf, p2m.entries_per_leaf // CHUNK
        for i in range(0, len(distinct), PAGES_PER_BATCH):
            leaves = distinct[i : i + PAGES_PER_BATCH]
            bad = (leaves.frame >= np.uint64(entries)) | (self.physmap.types(leaves.frame) != PageType.NOTAB)
            if (row := first_bad(bad)) is not None:
                self._lookup_page(f"p2m_frame_list[{int(leaves.first[row])}]", int(leaves.frame[row]))
            chunk_numbers = leaves.first[:, None] * chunks + np.arange(chunks)
            mfns = self.physmap.lookup_chunks(chunk_numbers.astype(np.uint64).reshape(-1)).reshape(
                len(leaves), per_leaf
            )
            content = encode_entries(mfns, width)
            with self.host.map_writable(self.domid, self.physmap.lookup(leaves.frame)) as pages:
                excess = (int(leaves.first[-1]) + 1) * per_leaf - entries
                if excess > 0:  # the last leaf has other data after the end of the p2m
                    content[-1, PAGE_SIZE - excess * width :] = pages[-1, PAGE_SIZE - excess * width :]
                pages[:] = content

    def _check_shared_leaves(self, p2m: P2M) -> None:
        """Refuse a leaf with populated pfns that appears more than once in the p2m."""
        distinct, chunks = p2m.distinct_leaves, p2m.entries_per_leaf // CHUNK
        shared = p2m.leaves[np.isin(p2m.leaves.frame, distinct.frame[distinct.count > 1])]
        populated = self.physmap.count_chunks(shared.first * chunks, (shared.first + shared.count) * chunks)
        if (row := first_bad(populated > 0)) is not None:
            place, pfn = int(shared.first[row]), int(shared.frame[row])
            leaf = f"p2m_frame_list[{place}] (pfn {pfn:#x})"
            problem = "has populated pfns and appears more than once in the list: one place would overwrite the other"
            raise GuestError(f"{self.name}: {leaf} {problem}", pfn=pfn)

    def _write_shared_info(self) -> None:
        """Write what vcpus and kernel keep in shared info.

        No event is pending, all are masked, and no p2m is published.
        """
        record, width = self.contents.shared_info, self.width
        if record is None:  # it came before END, but after the last checkpoint
            raise GuestError(f"{self.name}: the stream has no shared info before its last checkpoint")
        data = np.zeros(PAGE_SIZE, np.uint8)
        new: Any = data[: SHARED_INFO.size(width)].view(SHARED_INFO[width])[0]
        old = SHARED_INFO.read(record.data, width)
        new["vcpu_info"] = old["vcpu_info"]
        new["vcpu_info"]["evtchn_pending_sel"] = 0
        new["evtchn_mask"] = np.iinfo(new["evtchn_mask"].dtype).max
        for field in ("max_pfn", "nmi_reason"):
            new["arch"][field] = old["arch"][field]
        wallclock = SHARED_INFO.offset(width, "wc_version")  # Xen's own, between evtchn_mask and arch
        arch = SHARED_INFO.offset(width, "arch")
        end = arch + P2M_LEVELS_AT[width] + 2 * width
        self.host.write_shared_info(self.domid, data[:wallclock].tobytes())
        self.host.write_shared_info(self.domid, data[arch:end].tobytes(), arch)

    # --- vcpus -------------------------------------------------------------------------------------------------------

    def _vcpu_contexts(self) -> dict[int, np.void]:
        """Return a writable copy of each received vcpu_guest_context, by vcpu number."""
        vcpus, max_vcpu = self.contents.vcpus, self.info.max_vcpu
        if 0 not in vcpus or vcpus[0].basic is None:
            raise GuestError(f"{self.name}: Sender didn't send vcpu0's basic state")
        if max(vcpus) > max_vcpu:
            problem = f"{self.name} has {max_vcpu + 1} vcpus, and the stream has state of vcpu{max(vcpus)}"
            raise RequestError(problem, needed=max(vcpus) + 1, available=max_vcpu + 1)
        return {
            number: np.frombuffer(bytearray(vcpu.basic.context), VCPU_GUEST_CONTEXT[self.width])[0]
            for number, vcpu in sorted(vcpus.items())
            if vcpu.basic is not None
        }

    def _set_vcpu(self, number: int, context: np.void, vcpu: Vcpu) -> None:
        """Put mfns in the place of a context's pfns, and set all state of the vcpu."""
        width, levels = self.width, LEVELS[self.width]
        context["flags"] = int(context["flags"]) | VGCF_ONLINE  # NumPy 1 has no uint64 | int
        entries = int(context["gdt_ents"])
        if entries > FIRST_RESERVED_GDT_ENTRY:
            count = f"GDT entry count ({entries}) of vcpu{number} out of range (max {FIRST_RESERVED_GDT_ENTRY})"
            raise GuestError(f"{self.name}: {count}")
        gdt = context["gdt_frames"]
        for i in range(-(-entries // GDT_ENTRIES_PER_FRAME)):
            gdt[i] = self._lookup_gdt_frame(f"vcpu{number}'s GDT frame {i}", int(gdt[i]))
        ctrlreg = context["ctrlreg"]
        top = self._lookup_page(f"vcpu{number}'s cr3", cr3_to_frame(int(ctrlreg[3]), width), level=levels)
        ctrlreg[3] = frame_to_cr3(top, width)
        cr1 = int(ctrlreg[1])
        if width == 8 and cr1:
            if not cr1 & PTE_P:
                raise GuestError(f"{self.name}: vcpu{number}'s cr1 {cr1:#x} lacks bit 0, which marks a pfn")
            ctrlreg[1] = self._lookup_page(f"vcpu{number}'s cr1", cr1 >> PAGE_SHIFT, level=levels) << PAGE_SHIFT
        self.host.set_vcpu_context(self.domid, number, context.tobytes())
        records = vcpu.extended, vcpu.xsave, vcpu.msrs
        state = VcpuState(*(b"" if record is None else record.context for record in records))
        if state != VcpuState():
            self.host.set_vcpu_state(self.domid, number, state)


def _never_read(_frames: U64) -> NoReturn:
    raise AssertionError("restore writes the p2m and never reads it")
