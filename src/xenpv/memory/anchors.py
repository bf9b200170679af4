"""Where a guest says its p2m is: the p2m fields of shared info, and the forms of p2m that they can mean."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS
from xenpv.abi.xen import INVALID_MFN, P2M_LEVELS_AT, SHARED_INFO
from xenpv.errors import GuestError
from xenpv.frames import PAGE_SIZE, Vaddr
from xenpv.memory.pagetables import canonical, cr3_frame, in_xen, place_of

MARK = 1 << 61  # of the marked tree
MARKED_LEVELS = 4
DEPTHS = range(2, 9)  # levels that a rooted tree may have (docs/reference/abi-p2m-root.md)


class Form(StrEnum):
    """How a guest shows its p2m to the outside (docs/explanation/p2m.md)."""

    LINEAR = "linear virtual list"
    ROOTED = "rooted tree"
    MARKED = "marked tree"
    TREE = "three-level tree"


class Way(NamedTuple):
    """One way to the p2m: its form, the frame of its top table, and how many tables lie above the leaves.

    ``first`` is the place of the first leaf below that table: 0 in a tree, a page number of the address space in
    page tables.
    """

    form: Form
    root: int
    tables: int
    first: int = 0

    @property
    def levels(self) -> int:
        """Levels of the tree, its leaves being the first."""
        return self.tables + 1

    @property
    def name(self) -> str:
        """For people. What was proposed and never merged is called so."""
        proposed = self.form in {Form.ROOTED, Form.MARKED}
        return f"{self.form} of {self.levels} levels (proposed)" if proposed else str(self.form)


@dataclass(frozen=True, slots=True)
class Anchors:
    """The p2m fields of arch_shared_info. ``max_pfn`` is the number of entries; frames are mfns of the guest's host.

    p2m_levels and p2m_root are a proposal (docs/reference/abi-p2m-root.md), 0 in every guest that knows nothing of it.
    """

    width: Width
    max_pfn: int
    frame_list_list: int
    p2m_cr3: int = 0
    p2m_vaddr: int = 0
    p2m_generation: int = 0
    p2m_levels: int = 0
    p2m_root: int = 0

    @classmethod
    def of(cls, shared_info: bytes, width: Width) -> Anchors:
        """From the bytes of a shared info page."""
        return cls(width, *(int.from_bytes(shared_info[at : at + width], "little") for at in _offsets(width)))

    def stores(self) -> list[tuple[int, bytes]]:
        """(offset in shared info, bytes) each, in the order in which a guest publishes.

        What makes others valid comes last: p2m_levels and p2m_cr3, which are 0 until then.
        """
        at = dict(zip(_FIELDS, _offsets(self.width), strict=True))
        order = ["p2m_root", "frame_list_list", "max_pfn", "p2m_generation", "p2m_vaddr", "p2m_levels", "p2m_cr3"]
        return [(at[name], getattr(self, name).to_bytes(self.width, "little")) for name in order]

    @property
    def ways(self) -> list[Way]:
        """The ways that are valid at once, best first: linear list, rooted tree, marked tree, tree.

        The list is valid if p2m_cr3 is not 0. The rooted tree is if p2m_levels is not 0 and
        pfn_to_mfn_frame_list_list is INVALID_MFN; the marked tree has bit 61 set there. An anchor of 0 is "not set up
        yet", all ones "look elsewhere".
        """
        width, anchor = self.width, self.frame_list_list
        found = []
        if self.p2m_cr3:
            root = cr3_frame(self.p2m_cr3, width)
            found.append(Way(Form.LINEAR, root, LEVELS[width], place_of(self.p2m_vaddr)))
        if anchor == INVALID_MFN[width]:
            if self.p2m_levels:
                found.append(Way(Form.ROOTED, self.p2m_root, self.p2m_levels - 1))
        elif width == 8 and anchor & MARK:
            found.append(Way(Form.MARKED, anchor & ~MARK, MARKED_LEVELS - 1))
        elif anchor:
            found.append(Way(Form.TREE, anchor, 2))
        return found

    @property
    def names(self) -> str:
        """All forms that are valid at once, for people; "none"."""
        return " and ".join(way.name for way in self.ways) or "none"

    def why_none(self) -> str:
        """What an anchor that leads nowhere means."""
        state = (
            "not set up yet" if not self.frame_list_list else "to be looked for elsewhere, and nothing else is there"
        )
        return f"its anchor is {self.frame_list_list:#x}, which is {state}"

    def places(self, way: Way) -> range:
        """The places of the leaves below the way's top table.

        Raises GuestError, in words, when the anchors cannot be right or do not reach far enough.
        """
        count = -(-self.max_pfn * self.width // PAGE_SIZE)
        if way.form is Form.LINEAR:
            self.list_at(count)
        elif way.levels not in DEPTHS:
            raise GuestError(f"p2m_levels {way.levels} is not a depth: {DEPTHS.start} to {DEPTHS.stop - 1} are")
        elif self.max_pfn > (reach := capacity(way.levels, self.width)):
            raise GuestError(
                f"max_pfn {self.max_pfn - 1:#x} too large for p2m tree: the guest exposes {way.levels} levels of its "
                f"p2m, which reach pfn {reach - 1:#x}; its max_pfn is {self.max_pfn:#x}: publish the linear list "
                f"(p2m_cr3), which has no such limit"
            )
        return range(way.first, way.first + count)

    def list_at(self, frames: int) -> Vaddr:
        """p2m_vaddr, where a list of so many frames may lie.

        Aligned, canonical, not in Xen's hole. Raises GuestError.
        """
        first, last = self.p2m_vaddr, self.p2m_vaddr + max(frames, 1) * PAGE_SIZE - 1
        outside = last >> 64 or not (canonical(first) and canonical(last)) if self.width == 8 else last >> 32
        if outside or in_xen(first, self.width) or in_xen(last, self.width) or first % PAGE_SIZE:
            raise GuestError(f"Bad virtual p2m address range {first:#x}-{last:#x}")
        return Vaddr(first)


def capacity(levels: int, width: Width) -> int:
    """How many pfns a tree of so many levels can hold: 2^27 (512 GiB) for the classic three of a 64-bit guest."""
    return int((PAGE_SIZE // width) ** levels)


_FIELDS = (
    "max_pfn",
    "frame_list_list",
    "p2m_cr3",
    "p2m_vaddr",
    "p2m_generation",
    "p2m_levels",
    "p2m_root",
)


def _offsets(width: Width) -> list[int]:
    merged = ("max_pfn", "pfn_to_mfn_frame_list_list", "p2m_cr3", "p2m_vaddr", "p2m_generation")
    levels = SHARED_INFO.offset(width, "arch") + P2M_LEVELS_AT[width]
    return [*(SHARED_INFO.offset(width, f"arch.{name}") for name in merged), levels, levels + width]
