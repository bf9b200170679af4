"""Guests that have suspended, how they are saved, and hosts that say something else of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.kernel_guest import WIDTHS, Guest
from tests.support.model_guest import pfns
from tests.support.writers.envelopes import config_json
from xenpv.abi.declare import Width
from xenpv.abi.x86 import PAGE_SIZE, PTE_P, VCPU_GUEST_CONTEXT
from xenpv.abi.xen import SHARED_INFO
from xenpv.errors import XenPVError
from xenpv.frames import IS_TABLE, U8, U64, DomId
from xenpv.io.atomic_output import Output
from xenpv.memory.page_tables import as_ptes, cr3_to_frame, is_xen_slot, pte_frames
from xenpv.save.save import Summary, save
from xenpv.stream.fields import Buffer

BOTH = pytest.mark.parametrize("width", WIDTHS)
CONFIG = config_json(memory_kib=4096 * 4)


class PatchedHost:
    """A host of which a call or two answer something else."""

    def __init__(self, guest: Guest, **calls: Callable[..., Any]) -> None:
        self._host = guest.host
        for name, call in calls.items():
            setattr(self, name, call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


@dataclass
class MemorySink:
    """A sink that keeps all, in the pieces in which it came."""

    is_regular_file = False
    calls: list[list[int]] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)

    def write(self, buffers: Sequence[Buffer]) -> None:
        self.calls.append([len(buffer) for buffer in buffers])
        for buffer in buffers:
            self.data += buffer


def suspended(form: str, width: Width = 8, **how: Any) -> Guest:
    """A guest that has lived: pages of a pattern, some given back, some moved; and has suspended."""
    guest = Guest.boot(form, width, **how)
    guest.do("balloon_out", guest.do("free_pfns")[5:100])
    guest.do("move", guest.do("free_pfns")[:600], pfns(600, 70_000))  # few would look like flipped bits (likeness.py)
    guest.do("write_pattern", guest.do("free_pfns"), 7)
    guest.do("suspend")
    return guest


def saved(guest: Guest, path: Path, host: Any = None, **how: Any) -> Summary:
    with Output.open(str(path)) as out:
        return save(host or guest.host, guest.domid, out, **how)


def refused(guest: Guest, host: Any = None) -> XenPVError:
    """Why it cannot be saved: said before a byte was written."""
    heap = MemorySink()
    with pytest.raises(XenPVError) as e:
        save(host or guest.host, guest.domid, heap)
    assert heap.calls == []
    return e.value


def failed(guest: Guest, host: Any) -> XenPVError:
    """Why it cannot be saved, though that was seen only when it was half written."""
    heap = MemorySink()
    with pytest.raises(XenPVError) as e:
        save(host, guest.domid, heap)
    assert heap.calls
    return e.value


def of_host(guest: Guest) -> tuple[U64, U8, U8]:
    """All that the domain has, by the host's own books: pfns, types and pages, tables with pfns for mfns."""
    host, width = guest.host, guest.layout.width
    info = host.info(guest.domid)
    mfns = host.frames.owned(guest.domid + 1)
    mfns = mfns[mfns != np.uint64(info.shared_info_mfn)]
    kinds, pages = host.page_types(guest.domid, mfns), host.frames.read(mfns)
    top = cr3_to_frame(int(VCPU_GUEST_CONTEXT.read(host.vcpu_context(guest.domid, 0), width)["ctrlreg"][3]), width)
    last = 0
    if width == 4:
        last = int(pte_frames(as_ptes(host.frames.read(np.array([top], np.uint64))))[0, 3])
    for row in np.flatnonzero(IS_TABLE[kinds]).tolist():
        ptes = as_ptes(pages[row : row + 1])[0]
        ptes[is_xen_slot(int(kinds[row]) & 7, width, last_pae_l2=int(mfns[row]) == last)] = 0
        slots = np.flatnonzero(ptes & np.uint64(PTE_P))
        named = pte_frames(ptes[slots])
        ptes[slots] ^= (host.m2p(named) ^ named) << np.uint64(12)
    at = host.m2p(mfns)
    order = np.argsort(at)
    return at[order], kinds[order], pages[order]


def arch(guest: Guest, **fields: int) -> None:
    """Change p2m fields of shared info behind the guest's back."""
    width = guest.layout.width
    for name, value in fields.items():
        at = SHARED_INFO.offset(width, f"arch.{name}")
        guest.host.write_shared_info(guest.domid, value.to_bytes(width, "little"), at)


def tree_of(guest: Guest, mid: dict[int, int], entries: int) -> None:
    """Change leaves of a three-level tree's first frame list, by place, and how far it reaches."""
    host, width = guest.host, guest.layout.width
    top = np.array([guest.live.anchors.frame_list_list], np.uint64)
    lists = host.frames.read(top).view(f"<u{width}")[0].astype(np.uint64)[:1]
    page = host.frames.read(lists).view(f"<u{width}").copy()
    for place, mfn in mid.items():
        page[0, place] = mfn
    host.write_frames(guest.domid, lists, page.view(np.uint8))
    arch(guest, max_pfn=entries)


def second_list(guest: Guest, mfn: int) -> None:
    """Hang a frame list into a three-level tree, behind the first."""
    host, width = guest.host, guest.layout.width
    top = np.array([guest.live.anchors.frame_list_list], np.uint64)
    page = host.frames.read(top)
    page.view(f"<u{width}")[0, 1] = mfn
    host.write_frames(guest.domid, top, page)


def a_page(guest: Guest, nth: int = 1) -> int:
    """The mfn of the nth last page, of which the kernel makes no use: filled with ones, a leaf without a page."""
    mfns = guest.host.frames.owned(guest.domid + 1)
    mfn = mfns[guest.host.m2p(mfns) == np.uint64(4096 - nth)]
    guest.host.write_frames(guest.domid, mfn, np.full((1, PAGE_SIZE), 0xFF, np.uint8))
    return int(mfn[0])


def table_of(guest: Guest, level: int) -> U64:
    """The mfn of a page table of that level, the last."""
    mfns = guest.host.frames.owned(guest.domid + 1)
    kinds = guest.host.page_types(guest.domid, mfns)
    found: U64 = mfns[IS_TABLE[kinds] & (kinds & 7 == level)][-1:]
    return found


def rewriting(guest: Guest, mfn: U64, slots: slice | list[int], pte: int) -> PatchedHost:
    """A host on which some entries of a table are others."""

    def map_frames(domid: DomId, mfns: U64) -> tuple[U8, U8]:
        pages, mapped = guest.host.map_frames(domid, mfns)
        for row in np.flatnonzero(mfns == mfn[0]).tolist():
            as_ptes(pages[row : row + 1])[0, slots] = np.uint64(pte)
        return pages, mapped

    return PatchedHost(guest, map_frames=map_frames)


def with_context(guest: Guest, **fields: Any) -> PatchedHost:
    """A host on which vcpu 0's context has other values: ``gdt_ents=600``, ``ctrlreg_1=…``, ``user_regs_rdx=…``."""

    def vcpu_context(domid: DomId, vcpu: int) -> bytes:
        data = bytearray(guest.host.vcpu_context(domid, vcpu))
        context = np.frombuffer(data, VCPU_GUEST_CONTEXT[guest.layout.width])[0:1]
        for name, value in fields.items():
            member, _, part = name.rpartition("_") if name.startswith(("ctrlreg", "user_regs")) else (name, "", "")
            if not part:
                context[member][0] = value
            else:
                context[member][0][int(part) if part.isdigit() else part] = value
        return bytes(data)

    return PatchedHost(guest, vcpu_context=vcpu_context)
