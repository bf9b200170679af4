"""Makes a PV domain that is right in every part, small, on frames of the caller's choice.

>>> domain = pv_domain(pfns=[*range(40), 0x8000_0000, 0x8000_0001], vcpus=2)
>>> hex(domain.entries), len(domain.pages)
('0x80000003', 42)

Its memory: some pages with a part to play (see ``Places``), a set of page tables, and pages of data for the rest. The
kernel maps all of it at VIRT_BASE, tables and GDT read-only, page by page in the order in which the pfns are given: for
pfns 0 to n that is VIRT_BASE + pfn * 4096.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tests.support.writers.domain import LEVELS, RW, Domain, Places
from tests.support.writers.stream import L1TAB, NOTAB, PAGE, PIN, XTAB
from xenpv.abi.declare import Width
from xenpv.abi.domctl import EXT_VCPUCONTEXT
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT

VIRT_BASE: dict[Width, int] = {8: 0xFFFF_FFFF_8000_0000, 4: 0xC000_0000}
P2M_VADDR: dict[Width, int] = {8: 0xFFFF_C900_0000_0000, 4: 0xD000_0000}
USER_VADDR = 0x40_0000
SHARED_INFO_MFN = 0x000B_1234
GDT = bytes(8) + 0x00CF_FB00_0000_FFFF.to_bytes(8, "little")  # nothing, and a code segment of 32 bits
MAGIC = {8: b"xen-3.0-x86_64", 4: b"xen-3.0-x86_32p"}

NX = 1 << 63
LEAF = 0x67  # present, writable, user, accessed, dirty
UPPER: dict[Width, dict[int, int]] = {8: {4: 0x67, 3: 0x67, 2: 0x67}, 4: {3: 0x01, 2: 0x67}}


def pattern(pfn: int) -> bytearray:
    """A page that tells which it is, and that no two pfns share."""
    words = np.arange(PAGE // 8, dtype=np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15) ^ np.uint64(pfn)
    return bytearray(words.astype("<u8").tobytes())


def pv_domain(
    *,
    width: Width = 8,
    pfns: Sequence[int] = range(96),
    vcpus: int = 1,
    user: bool = True,
    linear: bool = True,
    tree: bool = False,
    ballooned: Iterable[int] | None = None,
    p2m_vaddr: int | None = None,
    gdt_frames: int = 1,
) -> Domain:
    """A domain with memory at ``pfns``, none at those ``ballooned`` (the one behind the last, if nothing is said).

    ``linear`` and ``tree``: the forms in which it publishes its p2m. ``user``: a 64-bit domain has a second top table
    for user mode. Raises ValueError when a form cannot hold so high a pfn, or the pfns are too few for the tables.
    """
    return _Builder(width, pfns, p2m_vaddr or P2M_VADDR[width]).build(
        vcpus=vcpus, user=user and width == 8, linear=linear, tree=tree, ballooned=ballooned, gdt_frames=gdt_frames
    )


def pv_domain_with_gdt() -> Domain:
    """Return a domain of 64 pages with two vcpus whose GDT frames are not zero, so that no page is lost by chance."""
    domain = pv_domain(pfns=range(64), vcpus=2)
    for pfn in domain.places.gdt:
        domain.pages[pfn][16:24] = b"segments"
    return domain


class _Builder:
    def __init__(self, width: Width, pfns: Sequence[int], p2m_vaddr: int) -> None:
        self.width, self.levels, self.order = width, LEVELS[width], pfns
        self.per_frame = PAGE // width
        self.at = Places()
        # Where the pages were: never at their pfn, and above 2^20, so that a cr3 of a 32-bit domain is really folded.
        taken = set(pfns)
        free = (mfn for mfn in random.Random(1).sample(range(0x40_0000, 0x80_0000), 2 * len(pfns)) if mfn not in taken)
        mfns = dict(zip(pfns, free, strict=False))
        vaddrs = {pfn: VIRT_BASE[width] + i * PAGE for i, pfn in enumerate(pfns)}
        self.domain = Domain(width, {}, {}, mfns, 0, np.empty(0, np.uint64), p2m_vaddr, self.at, vaddrs)
        self.unused: Iterator[int] = iter(pfns)
        self.missing_tables: dict[int, int] = {}

    def build(
        self, *, vcpus: int, user: bool, linear: bool, tree: bool, ballooned: Iterable[int] | None, gdt_frames: int
    ) -> Domain:
        d, at = self.domain, self.at
        gone = [max(self.order) + 1] if ballooned is None else list(ballooned)
        d.entries = max(*self.order, *gone) + 1
        d.types.update(dict.fromkeys(gone, XTAB))
        for name in ("text", "start_info", "store", "console", "user"):
            setattr(at, name, self.page())
        at.gdt = [self.page(bytearray(GDT.ljust(PAGE, b"\0"))) for _ in range(vcpus * gdt_frames)]
        self.make_p2m()
        if tree:
            self.make_tree()
        self.make_tables(user, linear)
        at.data = [self.page() for _ in range(max(vcpus, len(self.order) - len(d.pages)))]
        for i in range(vcpus):
            self.make_vcpu(i, gdt_frames)
        self.make_start_info(linear and not tree)
        self.make_shared_info(linear, tree)
        return d

    def page(self, content: bytearray | None = None, kind: int = NOTAB) -> int:
        pfn = next(self.unused, None)
        if pfn is None:
            raise ValueError(f"{len(self.order)} pfns are too few for this domain")
        self.domain.pages[pfn] = pattern(pfn) if content is None else content
        self.domain.types[pfn] = kind
        return pfn

    # --- the p2m -----------------------------------------------------------------------------------------------------

    def make_p2m(self) -> None:
        d, at = self.domain, self.at
        at.p2m_missing = self.page(bytearray(b"\xff" * PAGE))
        d.p2m_pfns = np.full(-(-d.entries // self.per_frame), at.p2m_missing, np.uint64)
        for i in sorted({pfn // self.per_frame for pfn in self.order}):
            d.p2m_pfns[i] = self.page(bytearray(b"\xff" * PAGE))
            at.p2m.append(int(d.p2m_pfns[i]))
        for pfn, mfn in d.mfns.items():
            d.p2m_frame(int(d.p2m_pfns[pfn // self.per_frame]))[pfn % self.per_frame] = mfn

    def make_tree(self) -> None:
        """Three levels, as Linux makes them: where no memory is, they lead to a shared frame list or p2m frame."""
        d, at, per = self.domain, self.at, self.per_frame
        if d.entries > per**3:
            raise ValueError(f"a tree of three levels ends at pfn {per**3 - 1:#x}, not {d.entries - 1:#x}")
        missing = self.page(bytearray(PAGE))
        d.p2m_frame(missing)[:] = d.mfns[at.p2m_missing]
        at.tree_top = self.page(bytearray(PAGE))
        d.p2m_frame(at.tree_top)[:] = d.mfns[missing]
        for i in sorted({pfn // per**2 for pfn in self.order}):
            mid = self.page(bytearray(PAGE))
            at.tree_mid.append(mid)
            d.p2m_frame(at.tree_top)[i] = d.mfns[mid]
            frames = [d.mfns[int(pfn)] for pfn in d.p2m_pfns[i * per : (i + 1) * per]]
            d.p2m_frame(mid)[:] = frames + [d.mfns[at.p2m_missing]] * (per - len(frames))
        at.tree_mid.append(missing)

    # --- page tables -------------------------------------------------------------------------------------------------

    def table(self, level: int, pin: int = 0) -> int:
        return self.page(bytearray(PAGE), L1TAB - 1 + level | pin)

    def below(self, table: int, level: int, index: int) -> int:
        """The table that an entry leads to, made where there is none."""
        entries = self.domain.table(table)
        if not entries[index]:
            entries[index] = self.table(level - 1) << 12 | UPPER[self.width][level]
        return int(entries[index]) >> 12 & (1 << 40) - 1

    def map(self, vaddr: int, pfn: int, flags: int) -> None:
        table = self.at.top
        for level in range(self.levels, 1, -1):
            table = self.below(table, level, vaddr >> (3 + 9 * level) & 511)
        self.domain.table(table)[vaddr >> 12 & 511] = pfn << 12 | flags

    def make_tables(self, user: bool, linear: bool) -> None:
        d, at = self.domain, self.at
        at.top = self.table(self.levels, PIN)
        for pfn, vaddr in d.vaddrs.items():
            self.map(vaddr, pfn, LEAF if pfn == at.text else LEAF | NX)
        self.map(USER_VADDR, at.user, LEAF)
        if user:
            at.user_top = self.table(self.levels, PIN)
            d.table(at.user_top)[0] = d.table(at.top)[0]
        if linear:
            last = d.p2m_vaddr + len(d.p2m_pfns) * PAGE - 1
            if self.width == 4 and last >= 0xF580_0000:
                raise ValueError(f"a 32-bit domain has no room for a p2m that ends at {last:#x}")
            self.first_page = (d.p2m_vaddr & (1 << 9 * self.levels + 12) - 1) >> 12
            self.used = np.flatnonzero(d.p2m_pfns != at.p2m_missing) + self.first_page
            self.map_p2m(at.top, self.levels, 0)
        # "Page tables are read-only" and so are descriptor tables, wherever they are mapped.
        for pfn in (*at.gdt, *(pfn for pfn in d.pages if d.types[pfn] != NOTAB)):
            step = d.walk(d.vaddrs[pfn])[-1]
            d.table(step.table)[step.entry] &= np.uint64((1 << 64) - 1 - RW)

    def map_p2m(self, table: int, level: int, start: int) -> None:
        """Map the part of the p2m that lies below a table whose range begins at virtual page ``start``.

        A range in which nothing is mapped gets a table that all such ranges share, so the cost follows the memory.
        """
        d, begin, span = self.domain, self.first_page, 512 ** (level - 1)
        end = begin + len(d.p2m_pfns)
        for entry in range(max(0, begin - start) // span, min(512, -(-(end - start) // span))):
            page = start + entry * span
            nothing = np.searchsorted(self.used, page) == np.searchsorted(self.used, page + span)
            if nothing and begin <= page and page + span <= end:
                d.table(table)[entry] = self.missing(level)
            elif level > 1:
                self.map_p2m(self.below(table, level, entry), level - 1, page)
            else:
                d.table(table)[entry] = int(d.p2m_pfns[page - begin]) << 12 | LEAF | NX

    def missing(self, level: int) -> int:
        """The entry of a table of that level which leads to nothing but the missing frame."""
        if level == 1:
            return self.at.p2m_missing << 12 | LEAF & ~RW | NX
        if level not in self.missing_tables:
            self.missing_tables[level] = self.table(level - 1)
            self.domain.table(self.missing_tables[level])[:] = self.missing(level - 1)
        return self.missing_tables[level] << 12 | UPPER[self.width][level]

    # --- vcpus and the pages shared with Xen -------------------------------------------------------------------------

    def make_vcpu(self, i: int, gdt_frames: int) -> None:
        d, at, wide = self.domain, self.at, self.width == 8
        vcpu: np.void = np.zeros(1, VCPU_GUEST_CONTEXT[self.width])[0]
        vcpu["fpu_ctxt"][:2] = 0x7F, 0x03
        vcpu["flags"] = 1 << 2 | 1 << 5  # in kernel, online
        regs, text = vcpu["user_regs"], d.vaddrs[at.text]
        regs["rip" if wide else "eip"] = text + 0x3AA
        regs["rsp" if wide else "esp"] = d.vaddrs[at.data[-1 - i]] + PAGE - 64
        regs["rflags" if wide else "eflags"] = 0x202
        regs["cs"], regs["ss"] = (0xE033, 0xE02B) if wide else (0xE019, 0xE021)
        regs["saved_upcall_mask"] = 1
        if i == 0:
            regs["rdx" if wide else "edx"] = at.start_info
        vcpu["gdt_frames"][:gdt_frames] = at.gdt[i * gdt_frames : (i + 1) * gdt_frames]
        vcpu["gdt_ents"] = gdt_frames * 512
        vcpu["kernel_ss"], vcpu["kernel_sp"] = regs["ss"], regs["rsp" if wide else "esp"]
        vcpu["ctrlreg"][[0, 3, 4]] = 0x8005003B, d.cr3(at.top), 0x2660
        vcpu["ctrlreg"][1] = at.user_top << 12 | 1 if at.user_top >= 0 else 0
        vcpu["debugreg"][6:] = 0xFFFF0FF0, 0x400
        vcpu["event_callback_eip"], vcpu["failsafe_callback_eip"] = text + 0x100, text + 0x140
        if wide:
            vcpu["syscall_callback_eip"] = text + 0x180
        else:
            vcpu["event_callback_cs"] = vcpu["failsafe_callback_cs"] = 0xE019
        vcpu["vm_assist"] = 1 << 2
        d.vcpus[i] = vcpu
        extended: np.void = np.zeros(1, EXT_VCPUCONTEXT[8])[0]
        extended["vcpu"], extended["size"] = i, EXT_VCPUCONTEXT.size(8)
        for name in ("syscall32", "sysenter"):  # Xen puts the privilege of the guest's kernel there
            extended[f"{name}_callback_cs"] = 3 if wide else 1
        d.extended[i] = extended.tobytes()
        area = bytearray(832)  # x87, SSE and AVX
        struct.pack_into("<QQ", area, 512, 7, 0)
        d.xsave[i] = struct.pack("<QQ", 7, 7) + bytes(area)
        d.msrs[i] = struct.pack("<IIQ", 0x140, 0, 1)

    def make_start_info(self, only_linear: bool) -> None:
        d, at = self.domain, self.at
        d.pages[at.start_info][:] = bytes(PAGE)
        info = d.start_info
        info["magic"], info["nr_pages"], info["shared_info"] = MAGIC[self.width], len(self.order), SHARED_INFO_MFN << 12
        info["flags"] = 1 << 4 if only_linear else 0
        info["store_mfn"], info["store_evtchn"] = at.store, 1
        info["console"]["domU"]["mfn"], info["console"]["domU"]["evtchn"] = at.console, 2
        info["pt_base"], info["mfn_list"] = d.vaddrs[at.top], d.p2m_vaddr
        info["nr_pt_frames"] = sum(d.is_table(pfn) for pfn in d.pages)
        info["cmd_line"] = b"console=hvc0"

    def make_shared_info(self, linear: bool, tree: bool) -> None:
        d, at = self.domain, self.at
        shared = d.shared_info
        shared["vcpu_info"]["evtchn_upcall_mask"] = 1
        shared["evtchn_mask"][:] = (1 << 8 * self.width) - 1
        arch = shared["arch"]
        arch["max_pfn"] = d.entries
        if tree:
            arch["pfn_to_mfn_frame_list_list"] = d.mfns[at.tree_top]
        elif linear:
            arch["pfn_to_mfn_frame_list_list"] = (1 << 8 * self.width) - 1
        if linear:
            arch["p2m_cr3"] = d.cr3(d.mfns[at.top])
            arch["p2m_vaddr"], arch["p2m_generation"] = d.p2m_vaddr, 4
