"""A tiny PV domain, built with the calls of a Toolstack, without xenpv's own builder.

Its code prints a text to the console ring, notifies the console, and shuts down. It makes both hypercalls through the
hypercall page.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import (
    ENTRIES,
    PAGE_SIZE,
    PTE_A,
    PTE_D,
    PTE_P,
    PTE_RW,
    PTE_US,
    VCPU_GUEST_CONTEXT,
    VGCF_IN_KERNEL,
    VGCF_ONLINE,
)
from xenpv.abi.xen import SHARED_INFO, START_INFO, START_INFO_MAGIC
from xenpv.frames import U8, U64, DomId
from xenpv.host.protocol import Ring, Toolstack

CODE, START, STORE, CONSOLE, L1, L2, L3, L4, STACK, HYPERCALLS, PAGES = range(11)
FIRST: dict[Width, int] = {8: 0xFFFF_FFFF_8000_0000, 4: 0xC000_0000}
CS: dict[Width, int] = {8: 0xE033, 4: 0xE019}
SS: dict[Width, int] = {8: 0xE02B, 4: 0xE021}
TABLE = PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D
LEAF = PTE_P | PTE_RW | PTE_A
OUT, OUT_PROD = 1024, 3084  # of struct xencons_interface
TEXT_AT, PORT_AT, REASON_AT = 2048, 3072, 3080  # in the page of code
EVTCHNOP_SEND, SCHEDOP_SHUTDOWN, SCHED_OP, EVENT_CHANNEL_OP = 4, 2, 29, 32


@dataclass(frozen=True)
class TinyGuest:
    """A tiny guest: the mfn of each page, and its rings."""

    domid: DomId
    mfns: U64
    console: Ring
    xenstore: Ring

    def mfn(self, page: int) -> int:
        return int(self.mfns[page])


def vaddr(page: int, offset: int = 0, width: Width = 8) -> int:
    return FIRST[width] + page * PAGE_SIZE + offset


def page(entries: dict[int, int]) -> U8:
    words = np.zeros(ENTRIES, "<u8")
    for at, value in entries.items():
        words[at] = value
    return words.view(np.uint8)


def tables(mfns: U64, width: Width = 8, *, writable: int | None = None) -> dict[int, U8]:
    """Return page tables that map all pages. Tables are read-only, except the table in page ``writable``."""
    ptes = {}
    for number, mfn in enumerate(mfns.tolist()):
        read_only = L1 <= number <= L4 and number != writable
        ptes[number] = mfn << 12 | LEAF & ~(PTE_RW if read_only else 0)
    out = {L1: page(ptes), L2: page({0: int(mfns[L1]) << 12 | TABLE})}
    if width == 4:
        return out | {L3: page({3: int(mfns[L2]) << 12 | PTE_P})}
    return out | {L3: page({510: int(mfns[L2]) << 12 | TABLE}), L4: page({511: int(mfns[L3]) << 12 | TABLE})}


def top_table(width: Width) -> int:
    return L4 if width == 8 else L3


def code(text: bytes, port: int, reason: int) -> U8:
    """Return the page of code for a 64-bit domain."""

    def number(value: int, size: int = 8) -> str:
        return value.to_bytes(size, "little").hex()

    def hypercall(index: int, command: int, argument: int) -> str:
        entry = number(vaddr(HYPERCALLS, 32 * index))
        return f"bf {number(command, 4)} 48be {number(argument)} 48b8 {entry} ffd0"  # mov edi, rsi, rax; call rax

    steps = [
        "fc",  # cld
        f"48be {number(vaddr(CODE, TEXT_AT))} 48bf {number(vaddr(CONSOLE, OUT))}",  # mov rsi, text; mov rdi, out
        f"b9 {number(len(text), 4)} f3a4",  # mov ecx, length; rep movsb
        f"48b8 {number(vaddr(CONSOLE, OUT_PROD))} c700 {number(len(text), 4)}",  # mov dword [out_prod], length
        hypercall(EVENT_CHANNEL_OP, EVTCHNOP_SEND, vaddr(CODE, PORT_AT)),
        hypercall(SCHED_OP, SCHEDOP_SHUTDOWN, vaddr(CODE, REASON_AT)),
        "ebfe",  # jmp .
    ]
    out = np.zeros(PAGE_SIZE, np.uint8)
    for at, data in (
        (0, bytes.fromhex("".join(steps))),
        (TEXT_AT, text),
        (PORT_AT, port.to_bytes(4, "little")),
        (REASON_AT, reason.to_bytes(4, "little")),
    ):
        out[at : at + len(data)] = np.frombuffer(data, np.uint8)
    return out


def context(mfn: int, width: Width = 8) -> bytes:
    """Return the context of vcpu 0, with this top-level table."""
    data = np.zeros(1, VCPU_GUEST_CONTEXT[width])
    regs, r = data["user_regs"][0], "r" if width == 8 else "e"
    data["flags"] = VGCF_ONLINE | VGCF_IN_KERNEL
    regs[f"{r}ip"], regs[f"{r}sp"] = vaddr(CODE, 0, width), vaddr(STACK, PAGE_SIZE, width)
    regs[f"{r}si"], regs[f"{r}flags"] = vaddr(START, 0, width), 0x200
    regs["cs"], regs["ss"] = CS[width], SS[width]
    data["kernel_ss"], data["kernel_sp"] = regs["ss"], regs[f"{r}sp"]
    if width == 4:
        regs["ds"] = regs["es"] = SS[width]
    data["ctrlreg"][0, 3] = mfn << 12 if width == 8 else (mfn << 12 | mfn >> 20) & 0xFFFF_FFFF
    return data.tobytes()


def build(host: Toolstack, domid: DomId, width: Width = 8, text: bytes = b"", reason: int = 0) -> TinyGuest:
    """Build the guest in a domain without memory. It runs when it is unpaused."""
    mfns = host.populate_physmap(domid, np.arange(PAGES, dtype=np.uint64))
    assert len(mfns) == PAGES
    daemons = host.daemons()
    console = Ring(int(mfns[CONSOLE]), host.alloc_event_channel(domid, daemons.console))
    xenstore = Ring(int(mfns[STORE]), host.alloc_event_channel(domid, daemons.xenstore))
    start = np.zeros(1, START_INFO[width])
    start["magic"], start["nr_pages"] = START_INFO_MAGIC[width], PAGES
    start["shared_info"] = host.info(domid).shared_info_mfn << 12
    start["store_mfn"], start["store_evtchn"] = xenstore.mfn, xenstore.port
    start["console"]["domU"]["mfn"], start["console"]["domU"]["evtchn"] = console.mfn, console.port
    with host.map_writable(domid, mfns) as pages:
        pages[:] = 0
        pages[CODE] = code(text, console.port, reason)
        pages[START, : start.nbytes] = np.frombuffer(start.tobytes(), np.uint8)
        for number, content in tables(mfns, width).items():
            pages[number] = content
    host.init_hypercall_page(domid, int(mfns[HYPERCALLS]))
    level: U8 = np.array([4 if width == 8 else 3], np.uint8)
    host.pin_tables(domid, mfns[[top_table(width)]], level)
    shared = np.zeros(1, SHARED_INFO[width])
    shared["vcpu_info"]["evtchn_upcall_mask"] = 1
    host.write_shared_info(domid, shared.tobytes())
    host.set_vcpu_context(domid, 0, context(int(mfns[top_table(width)]), width))
    host.seed_grants(domid, console=console.mfn, xenstore=xenstore.mfn)
    host.introduce(domid, console=console, xenstore=xenstore)
    return TinyGuest(domid, mfns, console, xenstore)
