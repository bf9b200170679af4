"""Checks vcpus and start info of a saved PV domain, as Xen does at restore."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from xenpv.abi.x86 import FIRST_RESERVED_GDT_ENTRY, GDT_ENTRIES_PER_FRAME, LEVELS, PTE_P
from xenpv.abi.xen import START_INFO, START_INFO_MAGIC
from xenpv.cpu.context import LDT_ENTRIES_MAX
from xenpv.cpu.descriptors import describe_refused, refused_descriptors
from xenpv.cpu.records import RefusedRecord, iter_refused_policies, iter_refused_tsc, iter_refused_vcpu_state
from xenpv.cpu.state import TSC_NEVER_EMULATE
from xenpv.errors import Fault
from xenpv.findings import Findings, Rule
from xenpv.frames import I64, IS_POPULATED, IS_TABLE, PAGE_SIZE, PAGES_PER_BATCH, U8, U64, PageType, type_name
from xenpv.memory.page_tables import is_canonical, is_xen_vaddr
from xenpv.memory.rings import ring_conflict
from xenpv.source.config import Config
from xenpv.source.saved import SavedDomain
from xenpv.stream.framing import Record
from xenpv.verify import rules


def check_vcpus(saved: SavedDomain, findings: Findings, config: Config | None) -> None:
    """Check all vcpus; findings name the vcpu and the offset of its record."""
    if saved.cr3(0) is None and saved.contents.complete:
        findings.add(rules.VCPU0, "Sender didn't send vcpu0's basic state", vcpu=0)
    max_vcpus = config.max_vcpus if config else None
    for vcpu, records in sorted(saved.contents.vcpus.items()):
        if max_vcpus is not None and vcpu >= max_vcpus:
            problem = f"X86_PV_VCPU record vcpu_id ({vcpu}) exceeds domain max ({max_vcpus - 1}) of the configuration"
            first = next(r for r in (records.basic, records.extended, records.xsave, records.msrs) if r is not None)
            findings.add(rules.VCPU_COUNT, problem, offset=first.offset, vcpu=vcpu)
        if records.basic is not None:
            _BasicState(saved, findings, vcpu, records.basic).check()
        elif vcpu and saved.contents.complete:
            findings.add(rules.VCPU_BASIC, f"vcpu{vcpu} would not run: its basic state was not sent", vcpu=vcpu)
        _add_refused(findings, iter_refused_vcpu_state(saved.contents, vcpu, records))


def check_domain_state(saved: SavedDomain, findings: Findings) -> None:
    """Check the CPU policy and the TSC of the domain."""
    _add_refused(findings, iter_refused_policies(saved.contents))
    _add_refused(findings, iter_refused_tsc(saved.contents))
    tsc = saved.contents.tsc
    if tsc is None:
        if saved.contents.complete:
            findings.add(rules.TSC_CLOCK, "the stream has no X86_TSC_INFO: the guest gets the TSC of the new host")
    elif not tsc.khz and tsc.mode != TSC_NEVER_EMULATE:
        problem = "TSC frequency 0 kHz: the guest gets that of the new host"
        findings.add(rules.TSC_CLOCK, problem, offset=tsc.offset, record=tsc.name)


def _add_refused(findings: Findings, refused: Iterable[RefusedRecord]) -> None:
    for rule, reason, record, vcpu in refused:
        findings.add(rule, reason, offset=record.offset, record=record.name, vcpu=vcpu)


def check_descriptors(saved: SavedDomain, findings: Findings) -> None:
    """Check the descriptors in all frames of GDTs and LDTs."""
    gdt = saved.gdt_pfns()
    _check_descriptors_of(saved, findings, rules.GDT_DESCRIPTOR, "GDT", gdt)
    ldt = np.setdiff1d(np.fromiter(_iter_ldt_pfns(saved), np.uint64), gdt)
    _check_descriptors_of(saved, findings, rules.LDT_DESCRIPTOR, "LDT", ldt)


def _iter_ldt_pfns(saved: SavedDomain) -> Iterator[int]:
    """Yield the pfns at which the vcpus' LDTs are mapped."""
    for vcpu in saved.vcpus:
        context, top = saved.vcpu_context(vcpu), saved.cr3(vcpu)
        if context is not None and top is not None:
            base, entries = int(context["ldt_base"]), min(int(context["ldt_ents"]), LDT_ENTRIES_MAX)
            for vaddr in range(base, base + entries * 8, PAGE_SIZE):
                if (pfn := saved.memory.walk(vaddr, top=top).pfn) is not None:
                    yield pfn


def _check_descriptors_of(saved: SavedDomain, findings: Findings, rule: Rule, table: str, pfns: U64) -> None:
    """Report the descriptors that Xen refuses in frames of a GDT or LDT."""
    pfns = pfns[saved.frames.types(pfns) == PageType.NOTAB]
    has_content = saved.has_content(pfns)
    if saved.pages_complete and not saved.source.seekable:
        for pfn in pfns[~has_content].tolist():
            problem = f"{table} frame {pfn:#x}: its descriptors passed by in the pipe before it was known"
            findings.add(rules.NOT_CHECKED, problem, pfn=pfn)
    pfns = pfns[has_content]
    offsets = saved.contents.index.offsets(pfns)
    for i in range(0, len(pfns), PAGES_PER_BATCH):
        pages = saved.frames.pages(pfns[i : i + PAGES_PER_BATCH])
        refused = np.flatnonzero(refused_descriptors(pages, saved.contents.width))
        describe = partial(_describe_descriptor, table, pages, pfns[i:], offsets[i:])
        findings.add_each(rule, refused, describe)


def _describe_descriptor(table: str, pages: U8, pfns: U64, offsets: I64, place: int) -> tuple[str, dict[str, Any]]:
    """Return message and fields of a finding for a refused descriptor.

    ``place`` is its index among those of all pages.
    """
    row, index = divmod(int(place), GDT_ENTRIES_PER_FRAME)
    fields = {"pfn": int(pfns[row]), "offset": int(offsets[row]) + index * 8}
    return f"{table}: {describe_refused(pages[row], index)}", fields


def check_start_info(saved: SavedDomain, findings: Findings) -> None:
    """Check the start info page, and the pages of the rings that it names."""
    pfn = saved.start_info_pfn
    if pfn is None:
        return
    record = saved.contents.vcpus[0].basic
    assert record is not None
    place = {"offset": record.offset, "record": record.name, "vcpu": 0}
    if not _check_page(saved, findings, rules.START_INFO, "Start Info", pfn, level=0, place=place):
        return
    offset = int(saved.contents.index.offsets(np.array([pfn], np.uint64))[0])
    try:
        page = saved.memory.page(pfn)
    except Fault as e:
        if saved.source.seekable:
            findings.add(rules.START_INFO, f"Start Info cannot be read: {e}", pfn=pfn, vcpu=0)
            return
        page = bytes(PAGE_SIZE)  # every start info page of a pipe is kept, so this page is none
    width = saved.contents.width
    info = START_INFO.read(page, width)
    magic = START_INFO_MAGIC[width]
    if not bytes(info["magic"]).startswith(magic):
        problem = f"pfn {pfn:#x} is no start info page: it does not begin with {magic.decode()!r}"
        findings.add(rules.START_INFO_MAGIC, problem, offset=offset, pfn=pfn)
        return
    xenstore, console = int(info["store_mfn"]), int(info["console"]["domU"]["mfn"])
    rings = (("store_mfn", "XenStore", xenstore, console), ("console.domU.mfn", "Console", console, xenstore))
    gdt, leaves = saved.gdt_pfns(), saved.contents.p2m_leaf_runs.frame
    for member, role, ring, other in rings:
        place = {"offset": offset + START_INFO.offset(width, member)}
        if not _check_page(saved, findings, rules.START_INFO_FRAMES, role, ring, level=None, place=place):
            continue
        page_type = int(saved.frames.types(np.array([ring], np.uint64))[0])
        conflict = ring_conflict(ring, page_type, start_info=pfn, other_ring=other, gdt=gdt, leaves=leaves)
        if conflict is not None:
            findings.add(rules.START_INFO_FRAMES, f"{role} (pfn {ring:#x}) {conflict}", pfn=ring, **place)


def _check_page(
    saved: SavedDomain,
    findings: Findings,
    rule: Rule,
    role: str,
    pfn: int,
    *,
    level: int | None,
    place: Mapping[str, Any],
) -> bool:
    """Return whether a pfn is a populated page of the right type; report if not.

    Args:
        saved: The domain.
        findings: Gets a finding if it is not.
        rule: The rule of the finding.
        role: The page's role, in libxenguest's words.
        pfn: The pfn.
        level: 0 for an ordinary page, n for a page table of level n, None for any page.
        place: Further fields of the finding.
    """
    end_pfn = saved.contents.end_pfn
    if pfn > end_pfn:
        findings.add(rule, f"{role} pfn {pfn:#x} out of range (last pfn {end_pfn:#x})", pfn=pfn, **place)
        return False
    page_type = int(saved.frames.types(np.array([pfn], np.uint64))[0])
    if not IS_POPULATED[page_type]:
        if saved.pages_complete:
            findings.add(rule, f"{role} (pfn {pfn:#x}) has bad mfn: the stream has no such page", pfn=pfn, **place)
        return False
    is_table = bool(IS_TABLE[page_type]) and page_type & 7 == level
    if level is not None and not (is_table if level else page_type == PageType.NOTAB):
        expected = f"L{level}TAB" if level else "NOTAB"
        problem = f"has bad type {type_name(page_type)}, expected {expected}"
        findings.add(rule, f"{role} (pfn {pfn:#x}) {problem}", pfn=pfn, **place)
        return False
    return True


class _BasicState:
    """Checks the basic context of one vcpu."""

    def __init__(self, saved: SavedDomain, findings: Findings, vcpu: int, record: Record) -> None:
        self.saved = saved
        self.findings = findings
        self.vcpu = vcpu
        context = saved.vcpu_context(vcpu)
        assert context is not None
        self.context = context
        self.width = saved.contents.width
        self._place = {"offset": record.offset, "record": record.name, "vcpu": vcpu}

    def check(self) -> None:
        self._check_gdt()
        self._check_page_tables()
        self._check_breakpoints()

    def _check_gdt(self) -> None:
        entries = int(self.context["gdt_ents"])
        if entries > FIRST_RESERVED_GDT_ENTRY:
            self._add(rules.GDT_COUNT, f"GDT entry count ({entries}) out of range (max {FIRST_RESERVED_GDT_ENTRY})")
            return
        for i in range(-(-entries // GDT_ENTRIES_PER_FRAME)):
            self._check_page(rules.GDT_FRAME, f"GDT frame {i}", int(self.context["gdt_frames"][i]), level=0)

    def _check_page_tables(self) -> None:
        """Check the top page tables of the kernel and of the user half."""
        levels = LEVELS[self.width]
        kernel_top, user_top = self.saved.cr3(self.vcpu), self.saved.cr3(self.vcpu, user=True)
        if kernel_top is not None:
            self._check_page(rules.CR3, "cr3", kernel_top, level=levels)
        if user_top is not None:
            self._check_page(rules.USER_CR3, "cr1", user_top, level=levels)
        if self.width == 8:
            cr1 = int(self.context["ctrlreg"][1])
            if cr1 and not cr1 & PTE_P:
                problem = f"cr1 {cr1:#x} lacks bit 0, which marks a pfn: a restorer would take it for an mfn"
                self._add(rules.USER_CR3, problem)

    def _check_breakpoints(self) -> None:
        """Check the debug registers.

        Xen restores the vcpu without one that it refuses: arch_set_info_guest() ignores the error.
        """
        for i in (6, 7) if self.width == 8 else ():
            if int(self.context["debugreg"][i]) >> 32:
                self._add(rules.VCPU_STATE, f"dr{i} {int(self.context['debugreg'][i]):#x} is wider than 32 bits")
        for i in range(4):
            address = int(self.context["debugreg"][i])
            if is_xen_vaddr(address, self.width) or (self.width == 8 and not is_canonical(address)):
                self._add(rules.VCPU_STATE, f"dr{i} {address:#x} is in Xen's address range, or not canonical")

    def _add(self, rule: Rule, message: str) -> None:
        self.findings.add(rule, message, **self._place)

    def _check_page(self, rule: Rule, role: str, pfn: int, *, level: int) -> None:
        _check_page(self.saved, self.findings, rule, role, pfn, level=level, place=self._place)
