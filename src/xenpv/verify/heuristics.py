"""What a sound domain looks like beyond what anything demands: the marks that a flipped bit leaves.

A leaf entry that names another ordinary page, or a bit in an entry that is not present, breaks no rule of Xen's and
would restore. But kernels map memory in runs, leave empty entries empty, and give neighbours the same flags; what
leaves such an order alone is worth a warning. Nothing here is known of any one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from xenpv.abi.x86 import PAGE_SHIFT, PTE_P, PTE_US, VGCF_IN_KERNEL
from xenpv.findings import Findings
from xenpv.frames import ENTRIES, U64, Mask, Pfn
from xenpv.memory.pagetables import AVAILABLE, AVAILABLE_HIGH, GLOBAL, frames
from xenpv.source.saved import SavedDomain
from xenpv.verify import rules

_IN_ORDER = ENTRIES * 3 // 4  # entries that must follow a run before those that do not are called strays
_STRAYS = 8  # and how many of those at most: more, and the table just is not in order
# Flags that neighbours share: not P, RW and NX (single pages are protected in the midst of a run), A and D.
_SHARED_FLAGS = np.uint64(PTE_US | AVAILABLE | AVAILABLE_HIGH | GLOBAL)

_FIXED_UP_NULL = 3  # a null selector as Xen keeps it: fixup_guest_code_selector() gives it ring 3

Places = tuple[NDArray[np.intp], ...]
Strays = tuple[Places, str]
"""Rows and entries in some tables, and what is odd about them ("{names}" stands for the frame that they name)."""


def stray_entries(level: int, content: U64) -> Iterator[Strays]:
    """What is odd in tables of one level; content is uint64 of shape (n, 512)."""
    yield _lone_bits(content), "has a single bit set"
    if level == 1:
        in_order = _in_order(content)
        yield _out_of_run(content, in_order), "leaves the order of its table: names {names}"
        yield _other_flags(content, in_order), "has flags that none of its neighbours has"


def _lone_bits(content: U64) -> Places:
    """Entries of one bit: no kernel writes them, a flip in an empty entry does."""
    return np.nonzero((content != 0) & (content & (content - np.uint64(1)) == 0))


def _in_order(content: U64) -> tuple[Mask, Mask]:
    """For each entry whether it names base + index, and for each table whether nearly all present ones do."""
    offset = frames(content).astype(np.int64) - np.arange(ENTRIES)
    offset[content == 0] = -(1 << 60)
    base = np.median(offset[:, 3::8], axis=1).astype(np.int64)  # of 64 entries: a stray one does not move it
    follows = offset == base[:, None]
    present = (content & np.uint64(PTE_P)) != 0
    return follows, np.count_nonzero(follows & present, axis=1) >= _IN_ORDER


def _out_of_run(content: U64, in_order: tuple[Mask, Mask]) -> Places:
    """Entries that name another frame than their place does, or name that one without being present."""
    follows, ordered = in_order
    present = (content & np.uint64(PTE_P)) != 0
    stray = (content != 0) & (follows != present)
    few = ordered & (np.count_nonzero(stray, axis=1) <= _STRAYS)
    return np.nonzero(stray & few[:, None])


def _other_flags(content: U64, in_order: tuple[Mask, Mask]) -> Places:
    """Entries of an ordered table that alone have some flag, or alone lack one."""
    follows, ordered = in_order
    flags = content & _SHARED_FLAGS
    usual = np.sort(flags[:, 3::8], axis=1)[
        :, ENTRIES // 16
    ]  # the median of 64 is that of nearly all, where there is one
    other = (flags != usual[:, None]) & ((content & np.uint64(PTE_P)) != 0) & follows
    alone = ordered & (np.count_nonzero(other, axis=1) == 1)
    return np.nonzero(other & alone[:, None])


class _Mapped:
    """Whether an address is mapped; each page is walked once, as handlers share a few."""

    def __init__(self, saved: SavedDomain) -> None:
        self._memory = saved.memory
        self._known: dict[tuple[Pfn, int], bool] = {}

    def __call__(self, top: Pfn, address: int) -> bool:
        page = top, (address & (1 << 64) - 1) >> PAGE_SHIFT
        if page not in self._known:
            self._known[page] = self._memory.walk(page[1] << PAGE_SHIFT, top=top).pfn is not None
        return self._known[page]


def check_resume(saved: SavedDomain, findings: Findings) -> None:
    """Where each vcpu goes on, and where its handlers are, must be mapped; its trap table looks like one."""
    mapped = _Mapped(saved)
    for vcpu, records in sorted(saved.contents.vcpus.items()):
        top = saved.cr3(vcpu)
        if records.basic is None or top is None or saved.contents.width != 8:
            continue
        context = saved.vcpu_context(vcpu)
        assert context is not None
        place = {"offset": records.basic.offset, "record": records.basic.name, "vcpu": vcpu}
        regs = context["user_regs"]
        if int(context["flags"]) & VGCF_IN_KERNEL:
            for name, address in (("rip", int(regs["rip"])), ("rsp", int(regs["rsp"]) - 8)):
                if not mapped(top, address):
                    findings.add(rules.VCPU_RESUME, f"{name} {address:#x} is not mapped: the vcpu would fault", **place)
        handlers = {name: int(context[name]) for name in ("event_callback_eip", "failsafe_callback_eip")}
        handlers["syscall_callback_eip"] = int(context["syscall_callback_eip"])
        for name, address in handlers.items():
            if address and not mapped(top, address):
                findings.add(rules.VCPU_HANDLER, f"{name} {address:#x} is not mapped", **place)
        _check_traps(mapped, top, context["trap_ctxt"], findings, place)


def _check_traps(mapped: _Mapped, top: Pfn, traps: np.ndarray, findings: Findings, place: dict[str, object]) -> None:
    """Xen keeps an entry as set_trap_table() gave it: with its own vector, padding zero, and empty if never given."""
    raw = traps.view(np.uint8).reshape(256, 16)
    used = traps["address"] != 0
    for vector in np.flatnonzero(raw.any(axis=1)).tolist():
        trap = traps[vector]
        where = f"trap {vector}"
        if not used[vector]:
            if raw[vector].sum() != int(trap["cs"]) or int(trap["cs"]) not in {0, _FIXED_UP_NULL}:
                findings.add(rules.VCPU_HANDLER, f"{where} has no handler, and is not empty", **place)
        elif int(trap["vector"]) != vector or int(trap["flags"]) > 7 or raw[vector, 4:8].any():
            what = f"vector {trap['vector']}, flags {int(trap['flags']):#x}"
            findings.add(rules.VCPU_HANDLER, f"{where} does not look like one: {what}", **place)
        elif not mapped(top, int(trap["address"])):
            findings.add(rules.VCPU_HANDLER, f"{where}'s handler {int(trap['address']):#x} is not mapped", **place)
    selectors, counts = np.unique(traps["cs"][used], return_counts=True)
    if len(selectors) == 2 and counts.min() == 1 and counts.max() > 4:
        odd = int(selectors[np.argmin(counts)])
        vector = int(np.flatnonzero(used & (traps["cs"] == odd))[0])
        findings.add(rules.VCPU_HANDLER, f"trap {vector} alone has code selector {odd:#x}", **place)
