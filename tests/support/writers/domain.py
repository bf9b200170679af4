"""A saved PV domain, every part of it open to be broken, and how it becomes a stream.

>>> from tests.support.writers.build import pv_domain
>>> domain = pv_domain(vcpus=2)
>>> domain.types[domain.places.start_info]
0
>>> domain.vcpus[0]["ctrlreg"][3] = 7 << 12          # break one thing
>>> stream = domain.to_stream("xl")                  # named pieces, see writers/stream.py
>>> bytes(stream)[stream.offset("X86_PV_VCPU_BASIC") :][:8].hex()   # type and length of the record
'0400000038140000'
>>> len(bytes(stream)) == len(domain.to_bytes("xl"))
True

What a saver does to a domain is done already. Frames in page tables, in ``ctrlreg``, ``gdt_frames``, ``rdx`` of vcpu 0
and in the start info are pfns. What no saver touches still has the old host's machine frames: the p2m itself, the
frames of the three-level tree, and the anchors in shared info.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tests.support.writers.envelopes import config_json, wrap
from tests.support.writers.stream import L1TAB, PAGE, PIN, WITH_DATA, Piece, Stream, Wire
from xenpv.abi.declare import Width
from xenpv.abi.xen import SHARED_INFO, START_INFO

U64 = npt.NDArray[np.uint64]
LEVELS: dict[Width, int] = {8: 4, 4: 3}
FRAME = 0x000F_FFFF_FFFF_F000
P, RW = 1, 2

CPUID_POLICY = [(0, 0xFFFFFFFF, 0xD, 0x756E6547, 0x6C65746E, 0x49656E69), (7, 0, 0, 0x200, 0, 0)]
MSR_POLICY = [(0xCE, 0, 1 << 31), (0x10A, 0, 0)]


class Step(NamedTuple):
    """One entry on the way down the page tables."""

    level: int
    table: int  # its pfn
    entry: int  # 0 to 511
    pte: int

    @property
    def pfn(self) -> int:
        return (self.pte & FRAME) >> 12


@dataclass
class Places:
    """The pfns of the pages that have a part to play."""

    top: int = -1  # cr3's table: an L4, or a 32-bit domain's L3
    user_top: int = -1  # the table for user mode, -1 without one
    text: int = -1  # where the vcpus execute
    user: int = -1  # a page that user mode sees
    start_info: int = -1
    store: int = -1
    console: int = -1
    gdt: list[int] = field(default_factory=list)  # all frames of all vcpus
    p2m: list[int] = field(default_factory=list)  # frames of the p2m in which something is mapped
    p2m_missing: int = -1  # stands for all the others
    tree_top: int = -1  # the frame list list
    tree_mid: list[int] = field(default_factory=list)  # the frame lists; the last stands for those of nothing
    data: list[int] = field(default_factory=list)


@dataclass
class Domain:
    """All that a stream says of a PV domain. Made by ``writers.build.pv_domain``, then changed at will.

    ``pages`` holds the content of each pfn that has some, ``types`` the page type of each pfn that is sent, ``mfns``
    where each page was on the old host. ``entries`` is the number of p2m entries, ``p2m_pfns`` the frames they are in.
    ``vcpus`` are structs vcpu_guest_context by vcpu id, changed as in ``vcpus[0]["user_regs"]["rip"] = 0``.
    """

    width: Width
    pages: dict[int, bytearray]
    types: dict[int, int]
    mfns: dict[int, int]
    entries: int
    p2m_pfns: U64
    p2m_vaddr: int
    places: Places
    vaddrs: dict[int, int]  # of each pfn, in the kernel's mapping of all its memory
    vcpus: dict[int, np.void] = field(default_factory=dict)
    extended: dict[int, bytes] = field(default_factory=dict)
    xsave: dict[int, bytes] = field(default_factory=dict)
    msrs: dict[int, bytes] = field(default_factory=dict)
    shared_page: bytearray = field(default_factory=lambda: bytearray(PAGE))
    cpuid_policy: list[tuple[int, int, int, int, int, int]] = field(default_factory=lambda: list(CPUID_POLICY))
    msr_policy: list[tuple[int, int, int]] = field(default_factory=lambda: list(MSR_POLICY))

    # --- looking and changing ----------------------------------------------------------------------------------------

    @property
    def levels(self) -> int:
        return LEVELS[self.width]

    @property
    def start_info(self) -> np.void:
        """The start info page as a struct; what is set in it is set in the page."""
        view: np.void = np.frombuffer(self.pages[self.places.start_info], START_INFO[self.width], count=1)[0]
        return view

    @property
    def shared_info(self) -> np.void:
        """The shared info page as a struct; what is set in it is set in the page."""
        view: np.void = np.frombuffer(self.shared_page, SHARED_INFO[self.width], count=1)[0]
        return view

    def table(self, pfn: int) -> U64:
        """The 512 entries of a page table, to be read and set."""
        return np.frombuffer(self.pages[pfn], np.dtype("<u8"))

    def p2m_frame(self, pfn: int) -> npt.NDArray[np.unsignedinteger]:
        """The entries of a p2m frame, of the guest's width, to be read and set."""
        return np.frombuffer(self.pages[pfn], np.dtype(f"<u{self.width}"))

    def tables(self, level: int) -> list[int]:
        """The pfns of all page tables of a level, pinned ones among them."""
        return sorted(pfn for pfn, kind in self.types.items() if kind in {level, level | PIN})

    def walk(self, vaddr: int, top: int | None = None) -> list[Step]:
        """The entries that translate an address, from the top down; it ends at one that is not present."""
        steps: list[Step] = []
        table = self.places.top if top is None else top
        for level in range(self.levels, 0, -1):
            entry = vaddr >> (3 + 9 * level) & 511
            step = Step(level, table, entry, int(self.table(table)[entry]))
            steps.append(step)
            if not step.pte & P:
                break
            table = step.pfn
        return steps

    def set_pte(self, vaddr: int, pte: int, *, level: int = 1) -> Step:
        """Change the entry of that level which translates an address; returns it as it was."""
        step = next(s for s in self.walk(vaddr) if s.level == level)
        self.table(step.table)[step.entry] = pte
        return step

    def cr3(self, frame: int) -> int:
        """A frame as ctrlreg[3] and p2m_cr3 hold it."""
        return frame << 12 if self.width == 8 else (frame << 12 | frame >> 20) & 0xFFFF_FFFF

    # --- as a stream -------------------------------------------------------------------------------------------------

    def to_bytes(self, envelope: str = "xl", *, version: int = 3, batch: int = 64) -> bytes:
        """The saved domain, in the envelope of xl, libvirt or xenopsd, or as a bare libxl or libxc stream."""
        return bytes(self.to_stream(envelope, version=version, batch=batch))

    def to_stream(
        self,
        envelope: str = "xl",
        *,
        version: int = 3,
        big_endian: bool = False,
        batch: int = 64,
        config: bytes | None = None,
    ) -> Stream:
        """The same in named pieces.

        ``batch``: how many pfns go into a PAGE_DATA record (libxenguest: 1024). ``config`` takes the place of one that
        fits the domain; xl ends it with a NUL.
        """
        wire = Wire(version, big_endian)
        if config is None and envelope == "xl":
            config = config_json(vcpus=len(self.vcpus), memory_kib=len(self.pages) * 4) + b"\0"
        libxc = Stream([*self.head(wire), *self.page_data(wire, batch), *self.tail(wire), wire.end()])
        return wrap(libxc, envelope, config=config, wire=wire)

    def to_checkpointed(self, rounds: int = 2, *, dirty: int = 4, batch: int = 64) -> Stream:
        """A bare libxl stream as Remus sends it: a checkpoint, then more rounds with the pages that changed."""
        wire = Wire()
        stream = Stream([wire.libxl_header(), wire.libxc_context(), *self.head(wire), *self.page_data(wire, batch)])
        for _ in range(rounds):
            stream += [*self.tail(wire), wire.checkpoint(), wire.checkpoint_end()]
            stream += self.page_data(wire, batch, sorted(self.types)[-dirty:])
        stream += [*self.tail(wire), wire.end(), wire.libxl_end()]
        return stream

    def head(self, wire: Wire) -> list[Piece]:
        """Headers and static data, and the p2m's frames."""
        static = [wire.pv_info(self.width, self.levels)]
        if wire.version >= 3:
            static += [wire.cpuid_policy(self.cpuid_policy), wire.msr_policy(self.msr_policy), wire.static_data_end()]
        frames = wire.p2m_frames(0, self.entries - 1, self.p2m_pfns)
        return [wire.image_header(), wire.domain_header(), *static, frames]

    def page_data(self, wire: Wire, batch: int = 64, pfns: list[int] | None = None) -> list[Piece]:
        """Pages in PAGE_DATA records; without ``pfns`` all that have a type, in ascending order."""
        pfns = sorted(self.types) if pfns is None else pfns
        records = []
        for first in range(0, len(pfns), batch):
            entries = [(pfn, self.types[pfn]) for pfn in pfns[first : first + batch]]
            contents = [bytes(self.pages[pfn]) for pfn, kind in entries if kind in WITH_DATA]
            records.append(wire.page_data(entries, contents))
        return records

    def tail(self, wire: Wire) -> list[Piece]:
        """What is sent while the domain does not run."""
        records = [wire.tsc_info(), wire.shared_info(bytes(self.shared_page))]
        for vcpu, context in self.vcpus.items():
            records.append(wire.vcpu_basic(vcpu, context.tobytes()))
            if vcpu in self.extended:
                records.append(wire.vcpu_extended(vcpu, self.extended[vcpu]))
            if vcpu in self.xsave:
                records.append(wire.vcpu_xsave(vcpu, self.xsave[vcpu]))
            if vcpu in self.msrs:
                records.append(wire.vcpu_msrs(vcpu, self.msrs[vcpu]))
        return records

    def is_table(self, pfn: int) -> bool:
        return L1TAB <= self.types[pfn] & ~PIN <= self.levels
