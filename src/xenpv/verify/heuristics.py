"""Heuristics: marks of a flipped bit that no rule of Xen's forbids.

An L1 entry that names another ordinary page would restore, and so would a bit in an entry that is not present. But
kernels map memory in runs, leave empty entries empty, and give neighbours the same flags. An entry that breaks such an
order is worth a warning. Nothing here depends on a particular kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from xenpv.abi.x86 import PAGE_SHIFT, PTE_P, PTE_US, VGCF_IN_KERNEL
from xenpv.findings import Findings
from xenpv.frames import ENTRIES, U64, Mask, Pfn
from xenpv.memory.page_tables import PTE_AVAILABLE, PTE_AVAILABLE_HIGH, PTE_GLOBAL, pte_frames
from xenpv.source.saved import SavedDomain
from xenpv.verify import rules

_MIN_ORDERED = ENTRIES * 3 // 4  # a table is ordered if so many entries continue one run
_MAX_STRAYS = 8  # a table with more entries out of order is not ordered after all
_SAMPLE = slice(3, None, 8)  # 64 entries of a table; their median ignores single outliers
_MIDDLE = ENTRIES // 16  # of the sample, once sorted
# Flags that neighbours share. P, RW and NX are set page by page, A and D by the processor.
_SHARED_FLAGS = np.uint64(PTE_US | PTE_AVAILABLE | PTE_AVAILABLE_HIGH | PTE_GLOBAL)
_FIXED_UP_NULL_SELECTOR = 3  # fixup_guest_code_selector() gives a null selector ring 3


# --- page tables -----------------------------------------------------------------------------------------------------


def outliers(level: int, ptes: U64) -> Iterator[tuple[Mask, str]]:
    """Yield the entries that do not fit in with their neighbours, kind by kind.

    Args:
        level: Level of the tables.
        ptes: Their entries, uint64 of shape (n, 512).

    Yields:
        Masks, bool of shape (n, 512), each with what is odd; "{target}" stands for what the entry names.
    """
    yield (ptes != 0) & (ptes & (ptes - np.uint64(1)) == 0), "has a single bit set"  # a flip in an empty entry
    if level == 1:
        present = ptes & np.uint64(PTE_P) != 0
        in_order, ordered = _find_order(ptes, present)
        yield _out_of_order(ptes, present, in_order, ordered), "leaves the order of its table: names {target}"
        yield _odd_flags(ptes, present & in_order, ordered), "has flags that none of its neighbours has"


def _find_order(ptes: U64, present: Mask) -> tuple[Mask, Mask]:
    """Find entries that name base + index, and tables where nearly all do.

    Returns:
        bool of shape (n, 512), and bool of shape (n,).
    """
    offset = pte_frames(ptes).astype(np.int64) - np.arange(ENTRIES)
    offset[ptes == 0] = -(1 << 60)
    base = np.median(offset[:, _SAMPLE], axis=1).astype(np.int64)
    in_order = offset == base[:, None]
    return in_order, np.count_nonzero(in_order & present, axis=1) >= _MIN_ORDERED


def _out_of_order(ptes: U64, present: Mask, in_order: Mask, ordered: Mask) -> Mask:
    """Find entries of ordered tables that are present or in order, but not both."""
    stray = (ptes != 0) & (in_order != present)
    few = ordered & (np.count_nonzero(stray, axis=1) <= _MAX_STRAYS)
    result: Mask = stray & few[:, None]
    return result


def _odd_flags(ptes: U64, candidates: Mask, ordered: Mask) -> Mask:
    """Find the only candidate of an ordered table whose flags are unusual."""
    flags = ptes & _SHARED_FLAGS
    usual = np.sort(flags[:, _SAMPLE], axis=1)[:, _MIDDLE]
    odd = (flags != usual[:, None]) & candidates
    alone = ordered & (np.count_nonzero(odd, axis=1) == 1)
    result: Mask = odd & alone[:, None]
    return result


# --- vcpus -----------------------------------------------------------------------------------------------------------


class _MappedAddresses:
    """Tells whether addresses are mapped.

    Walks each page once, since handlers share a few pages.
    """

    def __init__(self, saved: SavedDomain) -> None:
        self._memory = saved.memory
        self._known: dict[tuple[Pfn, int], bool] = {}

    def is_mapped(self, top: Pfn, address: int) -> bool:
        """Whether an address is mapped by the page tables below ``top``."""
        page = top, (address & (1 << 64) - 1) >> PAGE_SHIFT
        if page not in self._known:
            self._known[page] = self._memory.walk(page[1] << PAGE_SHIFT, top=top).pfn is not None
        return self._known[page]


def check_resume(saved: SavedDomain, findings: Findings) -> None:
    """Check resume addresses, handlers and trap tables of all 64-bit vcpus."""
    if saved.contents.width != 8:
        return
    addresses = _MappedAddresses(saved)
    for vcpu, records in sorted(saved.contents.vcpus.items()):
        top = saved.cr3(vcpu)
        if records.basic is None or top is None:
            continue
        context = saved.vcpu_context(vcpu)
        assert context is not None
        place = {"offset": records.basic.offset, "record": records.basic.name, "vcpu": vcpu}
        registers = context["user_regs"]
        if int(context["flags"]) & VGCF_IN_KERNEL:
            for name, address in (("rip", int(registers["rip"])), ("rsp", int(registers["rsp"]) - 8)):
                if not addresses.is_mapped(top, address):
                    problem = f"{name} {address:#x} is not mapped: the vcpu would fault"
                    findings.add(rules.VCPU_RESUME, problem, **place)
        for name in ("event_callback_eip", "failsafe_callback_eip", "syscall_callback_eip"):
            address = int(context[name])
            if address and not addresses.is_mapped(top, address):
                findings.add(rules.VCPU_HANDLER, f"{name} {address:#x} is not mapped", **place)
        for problem in _trap_table_problems(addresses, top, context["trap_ctxt"]):
            findings.add(rules.VCPU_HANDLER, problem, **place)


def _trap_table_problems(addresses: _MappedAddresses, top: Pfn, traps: np.ndarray) -> Iterator[str]:
    """Yield what is odd in a trap table.

    Xen keeps an entry as do_set_trap_table() received it: with its own vector, and zero padding; all zero if unset.
    """
    raw = traps.view(np.uint8).reshape(256, 16)
    has_handler = traps["address"] != 0
    for vector in np.flatnonzero(raw.any(axis=1)).tolist():
        trap = traps[vector]
        if not has_handler[vector]:
            if raw[vector].sum() != int(trap["cs"]) or int(trap["cs"]) not in {0, _FIXED_UP_NULL_SELECTOR}:
                yield f"trap {vector} has no handler, and is not empty"
        elif int(trap["vector"]) != vector or int(trap["flags"]) > 7 or raw[vector, 4:8].any():
            yield f"trap {vector} is no trap: vector {trap['vector']}, flags {int(trap['flags']):#x}"
        elif not addresses.is_mapped(top, int(trap["address"])):
            yield f"trap {vector}'s handler {int(trap['address']):#x} is not mapped"
    selectors, counts = np.unique(traps["cs"][has_handler], return_counts=True)
    if len(selectors) == 2 and counts.min() == 1 and counts.max() > 4:
        odd = int(selectors[np.argmin(counts)])
        vector = int(np.flatnonzero(has_handler & (traps["cs"] == odd))[0])
        yield f"only trap {vector} has code selector {odd:#x}"
