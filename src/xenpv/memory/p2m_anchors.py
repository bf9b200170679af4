"""The p2m fields of shared info, and the forms of p2m that they can mean.

A guest exposes its p2m by these fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS
from xenpv.abi.xen import INVALID_MFN, P2M_LEVELS_AT, SHARED_INFO
from xenpv.errors import GuestError
from xenpv.frames import PAGE_SIZE, Vaddr
from xenpv.memory.page_tables import cr3_to_frame, is_canonical, is_xen_vaddr, page_number

MARKED_TREE_BIT = 1 << 61  # in pfn_to_mfn_frame_list_list
MARKED_TREE_LEVELS = 4
ROOTED_TREE_LEVELS = range(2, 9)  # levels that a rooted tree may have (docs/reference/abi-p2m-root.md)


class P2MForm(StrEnum):
    """How a guest exposes its p2m (docs/explanation/p2m.md)."""

    LINEAR = "linear virtual list"
    ROOTED = "rooted tree"
    MARKED = "marked tree"
    TREE = "three-level tree"


class P2MRoot(NamedTuple):
    """Where a walk of the p2m begins.

    Attributes:
        form: how the p2m is exposed.
        frame: the frame of the top table.
        table_levels: levels of tables above the leaves.
        first_place: the place of the p2m's first leaf among all that the top table reaches: 0 in a tree, a page number
            of the address space in page tables.
    """

    form: P2MForm
    frame: int
    table_levels: int
    first_place: int = 0

    @property
    def levels(self) -> int:
        """Levels of the tree; its leaves are the first."""
        return self.table_levels + 1

    @property
    def name(self) -> str:
        """The form for people, marked as proposed where no kernel has it."""
        proposed = self.form in {P2MForm.ROOTED, P2MForm.MARKED}
        return f"{self.form} of {self.levels} levels (proposed)" if proposed else str(self.form)


@dataclass(frozen=True, slots=True)
class Anchors:
    """The p2m fields of arch_shared_info. Frames are mfns of the guest's host.

    Attributes:
        max_pfn: the number of p2m entries.
        frame_list_list: pfn_to_mfn_frame_list_list.
        p2m_levels: a proposal (docs/reference/abi-p2m-root.md), as p2m_root is; both are 0 in every other guest.
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
    def from_shared_info(cls, shared_info: bytes, width: Width) -> Anchors:
        """Read the fields from the bytes of a shared info page."""
        return cls(
            width, *(int.from_bytes(shared_info[offset : offset + width], "little") for offset in _offsets(width))
        )

    def shared_info_writes(self) -> list[tuple[int, bytes]]:
        """Return the writes to shared info that publish this p2m.

        Each is an offset and bytes, in the order of writing.

        p2m_levels and p2m_cr3 come last: while they are 0, no reader uses the others.
        """
        offset_of = dict(zip(_FIELDS, _offsets(self.width), strict=True))
        order = ["p2m_root", "frame_list_list", "max_pfn", "p2m_generation", "p2m_vaddr", "p2m_levels", "p2m_cr3"]
        return [(offset_of[name], getattr(self, name).to_bytes(self.width, "little")) for name in order]

    @property
    def roots(self) -> list[P2MRoot]:
        """Return the roots that are valid at once, best first.

        The order is linear list, rooted tree, marked tree, tree.

        The list is valid if p2m_cr3 is not 0. The rooted tree is valid if p2m_levels is not 0 and
        pfn_to_mfn_frame_list_list is INVALID_MFN. The marked tree has bit 61 set there. A frame_list_list of 0 means
        "not set up yet", all ones "look elsewhere".
        """
        width, anchor = self.width, self.frame_list_list
        roots = []
        if self.p2m_cr3:
            frame = cr3_to_frame(self.p2m_cr3, width)
            roots.append(P2MRoot(P2MForm.LINEAR, frame, LEVELS[width], page_number(self.p2m_vaddr)))
        if anchor == INVALID_MFN[width]:
            if self.p2m_levels:
                roots.append(P2MRoot(P2MForm.ROOTED, self.p2m_root, self.p2m_levels - 1))
        elif width == 8 and anchor & MARKED_TREE_BIT:
            roots.append(P2MRoot(P2MForm.MARKED, anchor & ~MARKED_TREE_BIT, MARKED_TREE_LEVELS - 1))
        elif anchor:
            roots.append(P2MRoot(P2MForm.TREE, anchor, 2))
        return roots

    @property
    def form_names(self) -> str:
        """All forms that are valid at once, for people; "none"."""
        return " and ".join(root.name for root in self.roots) or "none"

    def explain_no_root(self) -> str:
        """Explain a frame_list_list that leads nowhere."""
        state = (
            "not set up yet" if not self.frame_list_list else "to be looked for elsewhere, and nothing else is there"
        )
        return f"its anchor is {self.frame_list_list:#x}, which is {state}"

    def leaf_places(self, root: P2MRoot) -> range:
        """Return the places of the p2m's leaves.

        Places count from 0 among all leaves that the root's top table reaches.

        Raises:
            GuestError: the anchors cannot be right, or do not reach as far as max_pfn.
        """
        leaves = -(-self.max_pfn * self.width // PAGE_SIZE)
        if root.form is P2MForm.LINEAR:
            self.linear_p2m_vaddr(leaves)
        elif root.levels not in ROOTED_TREE_LEVELS:
            allowed = f"{ROOTED_TREE_LEVELS.start} to {ROOTED_TREE_LEVELS.stop - 1}"
            raise GuestError(f"p2m_levels {root.levels} is not a depth: {allowed} are")
        elif self.max_pfn > (reach := tree_capacity(root.levels, self.width)):
            raise GuestError(
                f"max_pfn {self.max_pfn - 1:#x} too large for p2m tree: the guest exposes {root.levels} levels of its "
                f"p2m, which reach pfn {reach - 1:#x}; its max_pfn is {self.max_pfn:#x}: publish the linear list "
                f"(p2m_cr3), which has no such limit"
            )
        return range(root.first_place, root.first_place + leaves)

    def linear_p2m_vaddr(self, leaves: int) -> Vaddr:
        """Return p2m_vaddr once it is known to suit a list of so many leaves.

        Raises:
            GuestError: it is not aligned, not canonical, or the list would reach into Xen's own addresses.
        """
        first, last = self.p2m_vaddr, self.p2m_vaddr + max(leaves, 1) * PAGE_SIZE - 1
        outside = last >> 64 or not (is_canonical(first) and is_canonical(last)) if self.width == 8 else last >> 32
        if outside or is_xen_vaddr(first, self.width) or is_xen_vaddr(last, self.width) or first % PAGE_SIZE:
            raise GuestError(f"Bad virtual p2m address range {first:#x}-{last:#x}")
        return Vaddr(first)


def tree_capacity(levels: int, width: Width) -> int:
    """Return how many pfns a tree of so many levels holds.

    Three levels of a 64-bit guest hold 2^27 (512 GiB).
    """
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
