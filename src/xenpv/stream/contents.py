"""The contents of a stream, except page content, collected from its events."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.frames import NO_FRAME, PAGE_SIZE, U64
from xenpv.runs import FrameRuns
from xenpv.stream import framing, libxl, records
from xenpv.stream.envelope import Envelope
from xenpv.stream.events import (
    DomainHeader,
    Event,
    ImageHeader,
    LibxlHeader,
    PageContent,
    SectionHeader,
    SkippedPageData,
)
from xenpv.stream.index import PageIndex
from xenpv.stream.page_data import PageData


@dataclass(slots=True)
class RecordGroup:
    """A record, or several PAGE_DATA in a row, for a listing of the stream.

    Attributes:
        offset: of the first record's header.
        name: the type of record.
        length: bytes of all bodies, without padding.
        count: how many records.
        pages: pages with content in them.
    """

    offset: int
    name: str
    length: int
    count: int = 1
    pages: int = 0


@dataclass(slots=True)
class Vcpu:
    """One vcpu's records.

    A later record of the same kind replaces an earlier one, as in libxenguest.
    """

    basic: records.VcpuBasic | None = None
    extended: records.VcpuExtended | None = None
    xsave: records.VcpuXsave | None = None
    msrs: records.VcpuMsrs | None = None


_VCPU_ATTRIBUTES = {
    records.VcpuBasic: "basic",
    records.VcpuExtended: "extended",
    records.VcpuXsave: "xsave",
    records.VcpuMsrs: "msrs",
}


@dataclass
class Contents:
    """The records of a stream; None or empty where none came.

    Call ``add`` with every event of a Reader, in order.

    Attributes:
        p2m_record: the last record that named leaves of the p2m.
        p2m_frames: pfns of the p2m's leaves, in order, as X86_PV_P2M_FRAMES named them; NO_FRAME for those not named.
        end_pfn: the last pfn of the p2m, -1 if no record named any.
        index: type and place of each page.
        checkpoints: how many CHECKPOINT records came.
        complete: whether libxc's END record came.
        record_groups: all records, in order.
    """

    envelope: Envelope | None = None
    sections: list[SectionHeader] = field(default_factory=list)
    libxl_header: LibxlHeader | None = None
    image: ImageHeader | None = None
    domain: DomainHeader | None = None
    pv_info: records.X86PVInfo | None = None
    p2m_record: records.X86PVP2MFrames | records.P2MLeaves | None = None
    p2m_frames: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    end_pfn: int = -1
    index: PageIndex = field(default_factory=PageIndex)
    vcpus: dict[int, Vcpu] = field(default_factory=dict)
    shared_info: records.SharedInfo | None = None
    tsc: records.X86TscInfo | None = None
    cpuid_policy: records.CpuidPolicy | None = None
    msr_policy: records.MsrPolicy | None = None
    hvm_params: records.HvmParams | None = None
    hvm_context: records.HvmContext | None = None
    emulators: list[libxl.EmulatorRecord] = field(default_factory=list)
    checkpoints: int = 0
    complete: bool = False
    record_groups: list[RecordGroup] = field(default_factory=list)

    @property
    def width(self) -> Width:
        """Bytes of the guest's unsigned long: 4 or 8; 8 before X86_PV_INFO came."""
        return self.pv_info.guest_width if self.pv_info else 8

    def add(self, event: Event) -> None:
        """Add one event."""
        match event:
            case PageData():
                self.index.add(event)
                self._group_page_data(event)
                return
            case PageContent():
                return
            case SkippedPageData():
                self.record_groups.append(RecordGroup(event.offset, event.name, event.length, event.count, event.pages))
                return
            case Envelope():
                self.envelope = event
            case SectionHeader():
                self.sections.append(event)
            case LibxlHeader():
                self.libxl_header = event
            case ImageHeader():
                self.image = event
            case DomainHeader():
                self.domain = event
            case records.X86PVInfo():
                self._add_pv_info(event)
            case records.X86PVP2MFrames():
                self._add_p2m_frames(event)
            case records.P2MLeaves():
                self.p2m_record, self.end_pfn = event, event.end_pfn
            case records.VcpuBlob():
                vcpu = self.vcpus.setdefault(event.vcpu_id, Vcpu())
                setattr(vcpu, _VCPU_ATTRIBUTES[type(event)], event)
            case records.SharedInfo():
                self.shared_info = event
            case records.X86TscInfo():
                self.tsc = event
            case records.CpuidPolicy():
                self.cpuid_policy = event
            case records.MsrPolicy():
                self.msr_policy = event
            case records.HvmParams():
                self.hvm_params = event
            case records.HvmContext():
                self.hvm_context = event
            case libxl.EmulatorRecord():
                self.emulators.append(event)
            case records.Checkpoint():
                self.checkpoints += 1
            case records.End():
                self.complete = True
        length = event.length if isinstance(event, framing.Record | Envelope | SectionHeader) else 0
        self.record_groups.append(RecordGroup(event.offset, event.name, length))

    @property
    def p2m_leaf_runs(self) -> FrameRuns:
        """The pfn of each leaf of the p2m, by the leaf's number.

        Leaves that no record named are in no run.
        """
        if isinstance(self.p2m_record, records.P2MLeaves):
            return FrameRuns(*self.p2m_record.runs)
        return FrameRuns.from_frames(self.p2m_frames)

    def _add_pv_info(self, event: records.X86PVInfo) -> None:
        """Keep the first X86_PV_INFO, as a restorer does.

        Drop earlier contexts of another width.
        """
        if self.pv_info is None:
            self.pv_info = event
            size = VCPU_GUEST_CONTEXT.size(self.width)
            for vcpu in self.vcpus.values():
                if vcpu.basic is not None and len(vcpu.basic.context) != size:
                    vcpu.basic = None

    def _group_page_data(self, event: PageData) -> None:
        if self.record_groups and self.record_groups[-1].name == "PAGE_DATA":
            group = self.record_groups[-1]
            group.count += 1
            group.length += event.length
            group.pages += event.pages
        else:
            self.record_groups.append(RecordGroup(event.offset, event.name, event.length, pages=event.pages))

    def _add_p2m_frames(self, event: records.X86PVP2MFrames) -> None:
        """Add the frames of an X86_PV_P2M_FRAMES record.

        A later record may extend the p2m, if the domain grew meanwhile, or replace frames of it.
        """
        self.p2m_record = event
        per_page = PAGE_SIZE // self.width
        first, pfns = event.start_pfn // per_page, event.p2m_pfns
        last = first + len(pfns)
        if last > len(self.p2m_frames):
            grown = np.full(last, NO_FRAME)
            grown[: len(self.p2m_frames)] = self.p2m_frames
            self.p2m_frames = grown
        self.p2m_frames[first:last] = pfns
        self.end_pfn = max(self.end_pfn, event.end_pfn)
