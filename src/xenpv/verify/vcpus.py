"""Checks of a saved PV domain's vcpus and start info: what libxenguest translates and Xen then accepts."""

from __future__ import annotations

import numpy as np

from xenpv.abi.domctl import EXT_VCPUCONTEXT
from xenpv.abi.x86 import FIRST_RESERVED_GDT_ENTRY, GDT_ENTRIES_PER_FRAME, LEVELS, PTE_P, VGCF_IN_KERNEL
from xenpv.abi.xen import START_INFO, START_INFO_MAGIC
from xenpv.errors import Fault
from xenpv.findings import Findings, Rule
from xenpv.frames import IS_POPULATED, IS_TABLE, PAGE_SIZE, PageType, Pfn, type_name
from xenpv.memory.pagetables import canonical, in_xen
from xenpv.source.config import Config
from xenpv.source.saved import SavedDomain
from xenpv.stream.framing import Record
from xenpv.verify import rules

_VM_ASSIST = {8: 0x1_0000_003F, 4: 0x3F}  # xen.git:xen/arch/x86/include/asm/domain.h PV64_VM_ASSIST_MASK, PV32_...
_CANONICAL = ("kernel_sp", "fs_base", "gs_base_kernel", "gs_base_user", "event_callback_eip", "failsafe_callback_eip")
_LDT_MAX = 8192


def check_vcpus(saved: SavedDomain, findings: Findings, config: Config | None) -> None:
    """Everything that is wrong with the vcpus; findings name the vcpu and its record's offset."""
    if saved.cr3(0) is None and saved.contents.complete:
        findings.add(rules.VCPU0, "Sender didn't send vcpu0's basic state", vcpu=0)
    limit = config.max_vcpus if config else None
    for vcpu, records in sorted(saved.contents.vcpus.items()):
        if limit is not None and vcpu >= limit:
            what = f"X86_PV_VCPU record vcpu_id ({vcpu}) exceeds domain max ({limit - 1}), says the configuration"
            first = next(r for r in (records.basic, records.extended, records.xsave, records.msrs) if r is not None)
            findings.add(rules.VCPU_COUNT, what, offset=first.offset, vcpu=vcpu)
        if records.basic is None and vcpu and saved.contents.complete:
            findings.add(rules.VCPU_BASIC, f"vcpu{vcpu} would not run: its basic state was not sent", vcpu=vcpu)
        if records.basic is not None:
            _Vcpu(saved, findings, vcpu, records.basic).check()
        if records.extended is not None:
            _check_extended(findings, vcpu, records.extended.context, records.extended)


def check_start_info(saved: SavedDomain, findings: Findings) -> None:
    """The suspend record and what it names."""
    pfn = saved.start_info_pfn
    if pfn is None:
        return
    record = saved.contents.vcpus[0].basic
    assert record is not None
    if not _is_page(saved, findings, rules.START_INFO, "Start Info", pfn, ordinary=True, record=record, vcpu=0):
        return
    offset = int(saved.contents.index.offsets(np.array([pfn], np.uint64))[0])
    try:
        page = saved.memory.page(pfn)
    except Fault as e:
        if saved.source.seekable:
            findings.add(rules.START_INFO, f"Start Info cannot be read: {e}", pfn=pfn, vcpu=0)
            return
        page = bytes(PAGE_SIZE)  # of a pipe no start info page is let go, so this is none
    width = saved.contents.width
    info = START_INFO.read(page, width)
    magic = START_INFO_MAGIC[width]
    if not bytes(info["magic"]).startswith(magic):
        what = f"pfn {pfn:#x} does not begin with {magic.decode()!r}, as a start info page does"
        findings.add(rules.START_INFO_MAGIC, what, offset=offset, pfn=pfn)
        return
    frames = {
        "store_mfn": ("XenStore", info["store_mfn"]),
        "console.domU.mfn": ("Console", info["console"]["domU"]["mfn"]),
    }
    for member, (name, frame) in frames.items():
        at = offset + START_INFO.offset(width, member)
        _is_page(saved, findings, rules.START_INFO_FRAMES, name, int(frame), offset=at)


def _is_page(
    saved: SavedDomain,
    findings: Findings,
    rule: Rule,
    name: str,
    pfn: int,
    *,
    ordinary: bool = False,
    top: bool = False,
    record: Record | None = None,
    vcpu: int | None = None,
    offset: int | None = None,
) -> bool:
    """Whether pfn is a populated page of the domain: ``ordinary``, no table; ``top``, a top table. A finding if not."""
    place = {"offset": record.offset if record else offset, "record": record.name if record else None, "vcpu": vcpu}
    end_pfn = saved.contents.end_pfn
    if pfn > end_pfn:
        findings.add(rule, f"{name} pfn {pfn:#x} out of range (last pfn {end_pfn:#x})", pfn=pfn, **place)
        return False
    kind = int(saved.frames.types(np.array([pfn], np.uint64))[0])
    levels = LEVELS[saved.contents.width]
    bad_type = (ordinary and kind != PageType.NOTAB and bool(IS_POPULATED[kind])) or (
        top and not (IS_TABLE[kind] and kind & 7 == levels) and bool(IS_POPULATED[kind])
    )
    if bad_type:
        expected = f", expected L{levels}TAB" if top else ", expected NOTAB"
        findings.add(rule, f"{name} (pfn {pfn:#x}) has bad type {type_name(kind)}{expected}", pfn=pfn, **place)
        return False
    if not IS_POPULATED[kind]:
        if saved.pages_complete:
            findings.add(rule, f"{name} (pfn {pfn:#x}) has bad mfn: the stream has no such page", pfn=pfn, **place)
        return False
    return True


class _Vcpu:
    """The checks of one vcpu's basic context."""

    def __init__(self, saved: SavedDomain, findings: Findings, vcpu: int, record: Record) -> None:
        self.saved = saved
        self.findings = findings
        self.vcpu = vcpu
        self.record = record
        context = saved.vcpu_context(vcpu)
        assert context is not None
        self.context = context
        self.width = saved.contents.width

    def check(self) -> None:
        self._gdt()
        self._cr3()
        self._state()

    def _gdt(self) -> None:
        entries = int(self.context["gdt_ents"])
        if entries > FIRST_RESERVED_GDT_ENTRY:
            what = f"GDT entry count ({entries}) out of range (max {FIRST_RESERVED_GDT_ENTRY})"
            self._add(rules.GDT_COUNT, what)
            return
        for i in range(-(-entries // GDT_ENTRIES_PER_FRAME)):
            pfn = int(self.context["gdt_frames"][i])
            self._is_page(rules.GDT_FRAME, f"GDT frame {i}", pfn, ordinary=True)

    def _cr3(self) -> None:
        for name, rule, pfn in (
            ("cr3", rules.CR3, self.saved.cr3(self.vcpu)),
            ("cr1", rules.USER_CR3, self.saved.cr3(self.vcpu, user=True)),
        ):
            if pfn is not None:
                self._is_page(rule, name, pfn, top=True)
        cr1 = int(self.context["ctrlreg"][1])
        if self.width == 8 and cr1 and not cr1 & PTE_P:
            self._add(rules.USER_CR3, f"cr1 is {cr1:#x}, without bit 0 that marks a pfn: it would be taken as a frame")
        in_kernel = int(self.context["flags"]) & VGCF_IN_KERNEL
        if self.width == 8 and not in_kernel and not cr1 & PTE_P:
            self._add(rules.USER_CR3, "the vcpu is in user mode, and has no user page tables")

    def _state(self) -> None:
        """What arch_set_info_guest() refuses with EINVAL."""
        c = self.context
        regs = c["user_regs"]
        if self.width == 8:
            addresses = {name: int(c[name]) for name in _CANONICAL} | {
                "syscall_callback_eip": int(c["syscall_callback_eip"]),
                "rip": int(regs["rip"]),
                "rsp": int(regs["rsp"]),
            }
            for name, address in addresses.items():
                if not canonical(address):
                    self._add(rules.VCPU_STATE, f"{name} {address:#x} is not canonical")
            traps = c["trap_ctxt"]["address"]
            high = traps >> np.uint64(47)
            for vector in np.flatnonzero((high != 0) & (high != 0x1FFFF)).tolist():
                self._add(rules.VCPU_STATE, f"trap {vector}'s handler {int(traps[vector]):#x} is not canonical")
            for i in (6, 7):
                if int(c["debugreg"][i]) >> 32:
                    self._add(rules.VCPU_STATE, f"dr{i} {int(c['debugreg'][i]):#x} is wider than 32 bits")
        for i in range(4):
            address = int(c["debugreg"][i])
            if in_xen(address, self.width) or (self.width == 8 and not canonical(address)):
                self._add(rules.VCPU_STATE, f"dr{i} {address:#x} breaks inside Xen, or is not canonical")
        ldt, entries = int(c["ldt_base"]), int(c["ldt_ents"])
        if ldt % PAGE_SIZE or entries > _LDT_MAX:
            self._add(rules.VCPU_STATE, f"LDT at {ldt:#x} with {entries} entries: not a page's start, or too many")
        elif self.width == 8 and (in_xen(ldt, 8) or not canonical(ldt)):
            self._add(rules.VCPU_STATE, f"LDT at {ldt:#x} lies in Xen, or is not canonical")
        unknown = int(c["vm_assist"]) & ~_VM_ASSIST[self.width]
        if self.vcpu == 0 and unknown:
            self._add(rules.VCPU_STATE, f"vm_assist {int(c['vm_assist']):#x} has bits that no Xen knows")

    def _add(self, rule: Rule, message: str) -> None:
        self.findings.add(rule, message, offset=self.record.offset, record=self.record.name, vcpu=self.vcpu)

    def _is_page(self, rule: Rule, name: str, pfn: Pfn | int, *, ordinary: bool = False, top: bool = False) -> None:
        place = {"ordinary": ordinary, "top": top}
        _is_page(self.saved, self.findings, rule, name, pfn, record=self.record, vcpu=self.vcpu, **place)


def _check_extended(findings: Findings, vcpu: int, blob: bytes, record: Record) -> None:
    """Libxenguest hands the blob to Xen as it is: the vcpu that it names inside is the one that gets it."""
    place = {"offset": record.offset, "record": record.name, "vcpu": vcpu}
    if len(blob) < 8:
        findings.add(rules.VCPU_EXTENDED, f"{len(blob)} bytes hold no vcpu and size", **place)
        return
    inside, size = (int.from_bytes(blob[at : at + 4], "little") for at in (0, 4))
    if inside != vcpu:
        findings.add(rules.VCPU_EXTENDED, f"the record of vcpu{vcpu} would set the state of vcpu{inside}", **place)
    if size > len(blob) or size < EXT_VCPUCONTEXT.offset(8, "vmce"):
        findings.add(rules.VCPU_EXTENDED, f"names a size of {size} bytes, in a blob of {len(blob)}", **place)
