"""The order of records in a libxc stream, as one table.

Reader, writer, verifier and restorer ask it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from xenpv.findings import Rule
from xenpv.stream import rules


class Guest(IntEnum):
    """The domain header's type."""

    PV = 1
    HVM = 2


class RecordType(IntEnum):
    """Types of libxc record (xen.git:tools/libs/guest/xg_sr_stream_format.h)."""

    END = 0x00
    PAGE_DATA = 0x01
    X86_PV_INFO = 0x02
    X86_PV_P2M_FRAMES = 0x03
    X86_PV_VCPU_BASIC = 0x04
    X86_PV_VCPU_EXTENDED = 0x05
    X86_PV_VCPU_XSAVE = 0x06
    SHARED_INFO = 0x07
    X86_TSC_INFO = 0x08
    HVM_CONTEXT = 0x09
    HVM_PARAMS = 0x0A
    TOOLSTACK = 0x0B
    X86_PV_VCPU_MSRS = 0x0C
    VERIFY = 0x0D
    CHECKPOINT = 0x0E
    CHECKPOINT_DIRTY_PFN_LIST = 0x0F
    STATIC_DATA_END = 0x10
    X86_CPUID_POLICY = 0x11
    X86_MSR_POLICY = 0x12
    # Of xenpv: mandatory, so that other receivers refuse the stream, and far above the types that Xen counts from 0.
    XENPV_P2M_LEAVES = 0x7870_0001
    # Of xenpv, and optional (bit 31): other receivers pass over it.
    XENPV_SEAL = 0xF870_0002


OPTIONAL = 0x8000_0000  # this bit of a type allows a receiver to skip a record that it does not know

PV = frozenset({Guest.PV})
HVM = frozenset({Guest.HVM})
ANY = PV | HVM


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record may come.

    Attributes:
        guests: in streams of these types of guest.
        min_version: from this version of the stream on.
        after: after these records, which it depends on.
        not_after: before all of these records.
        once: only once.
        mandatory_for: types of guest that cannot be restored without it.
    """

    guests: frozenset[Guest] = ANY
    min_version: int = 2
    after: tuple[RecordType, ...] = ()
    not_after: tuple[RecordType, ...] = ()
    once: bool = False
    mandatory_for: frozenset[Guest] = frozenset()


_STATIC = (RecordType.STATIC_DATA_END,)
_VCPU = Place(PV, after=(RecordType.X86_PV_INFO, RecordType.X86_PV_P2M_FRAMES, RecordType.PAGE_DATA))

# "The following records must be present in the following order as each of them depends on information present in the
# preceding ones: X86_PV_INFO, X86_PV_P2M_FRAMES, PAGE_DATA, VCPU records." "A v3 stream [...] mandates the presence of
# a STATIC_DATA_END record ahead of any memory/register content." It also says "HVM_PARAMS must precede HVM_CONTEXT",
# but libxenguest writes them the other way round in every release, and takes both orders
# (tools/libs/guest/xg_sr_save_x86_hvm.c x86_hvm_end_of_checkpoint()).
PLACES: dict[RecordType, Place] = {
    RecordType.X86_PV_INFO: Place(PV, not_after=_STATIC, once=True, mandatory_for=PV),
    RecordType.X86_CPUID_POLICY: Place(min_version=3, not_after=_STATIC),
    RecordType.X86_MSR_POLICY: Place(min_version=3, not_after=_STATIC),
    RecordType.STATIC_DATA_END: Place(min_version=3, once=True, mandatory_for=ANY),
    RecordType.X86_PV_P2M_FRAMES: Place(
        PV, after=(RecordType.X86_PV_INFO, *_STATIC), not_after=(RecordType.XENPV_P2M_LEAVES,), mandatory_for=PV
    ),
    RecordType.XENPV_P2M_LEAVES: Place(
        PV, min_version=3, after=(RecordType.X86_PV_INFO, *_STATIC), not_after=(RecordType.X86_PV_P2M_FRAMES,)
    ),
    RecordType.PAGE_DATA: Place(
        after=(RecordType.X86_PV_INFO, RecordType.X86_PV_P2M_FRAMES, *_STATIC), mandatory_for=ANY
    ),
    RecordType.X86_TSC_INFO: Place(),
    RecordType.SHARED_INFO: Place(PV, after=(RecordType.X86_PV_INFO, *_STATIC), mandatory_for=PV),
    RecordType.X86_PV_VCPU_BASIC: Place(PV, after=_VCPU.after, mandatory_for=PV),
    RecordType.X86_PV_VCPU_EXTENDED: _VCPU,
    RecordType.X86_PV_VCPU_XSAVE: _VCPU,
    RecordType.X86_PV_VCPU_MSRS: _VCPU,
    RecordType.HVM_PARAMS: Place(HVM, after=_STATIC, mandatory_for=HVM),
    RecordType.HVM_CONTEXT: Place(HVM, after=_STATIC, mandatory_for=HVM),
    RecordType.VERIFY: Place(after=(RecordType.PAGE_DATA,)),
    RecordType.CHECKPOINT: Place(after=(RecordType.PAGE_DATA,)),
    RecordType.TOOLSTACK: Place(guests=frozenset()),
    RecordType.CHECKPOINT_DIRTY_PFN_LIST: Place(guests=frozenset()),
    RecordType.XENPV_SEAL: Place(),
    RecordType.END: Place(),
}
# In a stream of version 2: "infer the position of STATIC_DATA_END based on finding the first X86_PV_P2M_FRAMES record
# (for PV guests), or PAGE_DATA record (for HVM guests)".
_FIRST_AFTER_STATIC_DATA = {Guest.PV: RecordType.X86_PV_P2M_FRAMES, Guest.HVM: RecordType.PAGE_DATA}

_SUBSTITUTES = {RecordType.X86_PV_P2M_FRAMES: RecordType.XENPV_P2M_LEAVES}  # a record, and the one that replaces it

_NEVER_ALLOWED = {
    RecordType.TOOLSTACK: "TOOLSTACK is deprecated; no restorer accepts it",
    RecordType.CHECKPOINT_DIRTY_PFN_LIST: "CHECKPOINT_DIRTY_PFN_LIST belongs to the back channel of COLO",
}


class Order:
    """The order of one stream.

    Call ``check_next`` for each record of a known type, and ``missing`` at END.

    ``seen``: the types of record that came.
    """

    def __init__(self, guest: Guest, version: int) -> None:
        self.guest = guest
        self.version = version
        self.seen: set[RecordType] = set()
        self._always_allowed: set[int] = set()  # types that were checked and may come again at any place

    def check_next(self, kind: int) -> list[tuple[Rule, str]]:
        """Note that this type of record comes next; return the rules that this breaks.

        Each has a message.
        """
        if kind in self._always_allowed:  # a stream can hold millions of PAGE_DATA
            return []
        record = RecordType(kind)
        place = PLACES[record]
        name = record.name
        if self.guest not in place.guests:
            return [
                (rules.MISPLACED, _NEVER_ALLOWED.get(record, f"{name} does not belong in a {self.guest.name} stream"))
            ]
        breaches = []
        if self.version < place.min_version:
            breaches.append(
                (rules.MISPLACED, f"{name} needs stream version {place.min_version}, this one has {self.version}")
            )
        if self.version < 3 and record is _FIRST_AFTER_STATIC_DATA[self.guest]:
            self.seen.add(RecordType.STATIC_DATA_END)
        if place.once and record in self.seen:
            breaches.append((rules.REPEATED, f"a second {name}"))
        after = [earlier_record for earlier_record in place.after if self.guest in PLACES[earlier_record].guests]
        missing = [earlier_record.name for earlier_record in after if not self._has(earlier_record)]
        if missing and record not in self.seen:  # report it once
            breaches.append((rules.ORDER, f"{name} before {' and '.join(missing)}"))
        earlier = [earlier_record.name for earlier_record in place.not_after if earlier_record in self.seen]
        if earlier:
            breaches.append((rules.ORDER, f"{name} after {' and '.join(earlier)}"))
        self.seen.add(record)
        if not (breaches or place.once or place.not_after):
            self._always_allowed.add(kind)
        return breaches

    def missing(self) -> list[RecordType]:
        """Return the mandatory records that did not come."""
        mandatory = (record for record, place in PLACES.items() if self.guest in place.mandatory_for)
        return [record for record in mandatory if not self._has(record)]

    def _has(self, record: RecordType) -> bool:
        """Return whether the record or its substitute came."""
        return record in self.seen or _SUBSTITUTES.get(record) in self.seen
