"""A domain on the model that publishes its p2m in a given form, made without xenpv's own code for that."""

from __future__ import annotations

import numpy as np

from tests.support.model_guest import BASE, ModelGuest, make_guest
from xenpv.abi.declare import Width
from xenpv.abi.x86 import PAGE_SIZE
from xenpv.abi.xen import INVALID_MFN, SHARED_INFO
from xenpv.findings import Findings, Severity
from xenpv.frames import U64
from xenpv.host.model.host import ModelHost
from xenpv.source.live import LiveDomain
from xenpv.verify.physmap import PhysmapCheck

PAGES = 1024
ROOM = 500  # the first pfn of the pages that hold the p2m


class P2MGuest:
    """A domain that publishes its p2m."""

    def __init__(self, width: Width = 8, form: str = "tree", *, levels: int = 4) -> None:
        self.host = ModelHost(1 << 30)
        self.model: ModelGuest = make_guest(self.host, width, PAGES)
        self.width, self.per = width, PAGE_SIZE // width
        self.entries = self.model.mfns.copy()
        self.next = ROOM
        self.leaves: list[int] = []
        self.publish(form, levels)

    def table(self, mfns: U64, fill: int | None = None) -> int:
        """Write mfns to a page of the guest. The mfn of that page."""
        page = np.full(self.per, INVALID_MFN[self.width] if fill is None else fill, f"<u{self.width}")
        page[: len(mfns)] = mfns
        mfn = int(self.model.mfns[self.next])
        self.next += 1
        self.host.write_frames(self.model.domid, np.array([mfn], np.uint64), page.view(np.uint8)[None])
        return mfn

    def publish(self, form: str, levels: int) -> None:
        first = self.next
        self.leaves = [self.table(self.entries[i : i + self.per]) for i in range(0, PAGES, self.per)]
        root, depth = np.array(self.leaves, np.uint64), {"tree": 3, "marked": 4, "rooted": levels}.get(form, 3)
        for _ in range(depth - 1):
            root = np.array([self.table(root)], np.uint64)
        arch = {"max_pfn": PAGES}
        if form == "linear":
            top = (
                self.model.top << 12 if self.width == 8 else (self.model.top << 12 | self.model.top >> 20) & 0xFFFF_FFFF
            )
            vaddr = BASE[self.width] + first * PAGE_SIZE
            arch |= {"p2m_cr3": top, "p2m_vaddr": vaddr, "pfn_to_mfn_frame_list_list": INVALID_MFN[self.width]}
        elif form == "rooted":
            arch |= {"pfn_to_mfn_frame_list_list": INVALID_MFN[self.width]}
            at = SHARED_INFO.offset(self.width, "arch") + (48 if self.width == 8 else 28)
            words = np.array([levels, int(root[0])], f"<u{self.width}").tobytes()
            self.host.write_shared_info(self.model.domid, words, at)
        else:
            arch |= {"pfn_to_mfn_frame_list_list": int(root[0]) | (1 << 61 if form == "marked" else 0)}
        self.arch(**arch)

    def arch(self, **fields: int) -> None:
        for name, value in fields.items():
            at = SHARED_INFO.offset(self.width, f"arch.{name}")
            self.host.write_shared_info(self.model.domid, value.to_bytes(self.width, "little"), at)

    def put(self, pfn: int, mfn: int) -> None:
        """Set one entry of the p2m."""
        leaf = np.array([self.leaves[pfn // self.per]], np.uint64)
        page = self.host.map_frames(self.model.domid, leaf)[0].copy()
        page.view(f"<u{self.width}")[0, pfn % self.per] = mfn
        self.host.write_frames(self.model.domid, leaf, page)

    @property
    def live(self) -> LiveDomain:
        return LiveDomain(self.host, self.host.info(self.model.domid))

    def findings(self, *, owner: bool = True) -> list[tuple[str, int | None]]:
        """Return rule and pfn of all errors and warnings."""
        return [(f.rule.name, f.pfn) for f in self.checked(owner=owner) if f.severity is not Severity.NOTE]

    def checked(self, *, owner: bool = True) -> Findings:
        findings = Findings()
        PhysmapCheck(self.live, findings, owner=owner).run()
        return findings

    def rules(self) -> set[str]:
        return {rule for rule, _ in self.findings()}

    def notes(self) -> dict[str, str]:
        return {f.rule.name: f.message for f in self.checked() if f.severity is Severity.NOTE}
