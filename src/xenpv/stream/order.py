"""What may follow what, in one table. It does not know whether a reader, a writer or a verifier asks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from xenpv.findings import Rule
from xenpv.stream import rules


class Guest(IntEnum):
    """The domain header's type."""

    PV = 1
    HVM = 2


class Type(IntEnum):
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
    # Ours: mandatory, so that whoever does not know it refuses the stream, and far above what Xen counts up from 0.
    XENPV_P2M_LEAVES = 0x7870_0001


OPTIONAL = 0x8000_0000  # the bit that lets a receiver pass over a record that it does not know

PV = frozenset({Guest.PV})
HVM = frozenset({Guest.HVM})
ANY = PV | HVM


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record may stand: for which guests, from which version on, after and before which others, how often."""

    guests: frozenset[Guest] = ANY
    since: int = 2
    after: tuple[Type, ...] = ()
    not_after: tuple[Type, ...] = ()
    once: bool = False
    needed: frozenset[Guest] = frozenset()  # guests that cannot be restored without it


_STATIC = (Type.STATIC_DATA_END,)
_VCPU = Place(PV, after=(Type.X86_PV_INFO, Type.X86_PV_P2M_FRAMES, Type.PAGE_DATA))

# "The following records must be present in the following order as each of them depends on information present in the
# preceding ones: X86_PV_INFO, X86_PV_P2M_FRAMES, PAGE_DATA, VCPU records." "HVM_PARAMS must precede HVM_CONTEXT." "A v3
# stream [...] mandates the presence of a STATIC_DATA_END record ahead of any memory/register content."
PLACES: dict[Type, Place] = {
    Type.X86_PV_INFO: Place(PV, not_after=_STATIC, once=True, needed=PV),
    Type.X86_CPUID_POLICY: Place(since=3, not_after=_STATIC),
    Type.X86_MSR_POLICY: Place(since=3, not_after=_STATIC),
    Type.STATIC_DATA_END: Place(since=3, once=True, needed=ANY),
    Type.X86_PV_P2M_FRAMES: Place(
        PV, after=(Type.X86_PV_INFO, *_STATIC), not_after=(Type.XENPV_P2M_LEAVES,), needed=PV
    ),
    Type.XENPV_P2M_LEAVES: Place(PV, since=3, after=(Type.X86_PV_INFO, *_STATIC), not_after=(Type.X86_PV_P2M_FRAMES,)),
    Type.PAGE_DATA: Place(after=(Type.X86_PV_INFO, Type.X86_PV_P2M_FRAMES, *_STATIC), needed=ANY),
    Type.X86_TSC_INFO: Place(),
    Type.SHARED_INFO: Place(PV, after=(Type.X86_PV_INFO, *_STATIC), needed=PV),
    Type.X86_PV_VCPU_BASIC: Place(PV, after=_VCPU.after, needed=PV),
    Type.X86_PV_VCPU_EXTENDED: _VCPU,
    Type.X86_PV_VCPU_XSAVE: _VCPU,
    Type.X86_PV_VCPU_MSRS: _VCPU,
    Type.HVM_PARAMS: Place(HVM, after=_STATIC, needed=HVM),
    Type.HVM_CONTEXT: Place(HVM, after=(Type.HVM_PARAMS,), needed=HVM),
    Type.VERIFY: Place(after=(Type.PAGE_DATA,)),
    Type.CHECKPOINT: Place(after=(Type.PAGE_DATA,)),
    Type.TOOLSTACK: Place(guests=frozenset()),
    Type.CHECKPOINT_DIRTY_PFN_LIST: Place(guests=frozenset()),
    Type.END: Place(),
}
# In a stream of version 2: "infer the position of STATIC_DATA_END based on finding the first X86_PV_P2M_FRAMES record
# (for PV guests), or PAGE_DATA record (for HVM guests)".
_ENDS_STATIC_DATA = {Guest.PV: Type.X86_PV_P2M_FRAMES, Guest.HVM: Type.PAGE_DATA}

_INSTEAD = {Type.X86_PV_P2M_FRAMES: Type.XENPV_P2M_LEAVES}  # what serves as well

_WHY_NOWHERE = {
    Type.TOOLSTACK: "TOOLSTACK is deprecated and no restorer takes it",
    Type.CHECKPOINT_DIRTY_PFN_LIST: "CHECKPOINT_DIRTY_PFN_LIST belongs to the back channel of a checkpointed migration",
}


class Order:
    """The order of one stream as it goes by. Call ``check_next`` for each record, ``missing`` at END."""

    def __init__(self, guest: Guest, version: int) -> None:
        self.guest = guest
        self.version = version
        self.seen: set[Type] = set()
        self._free: set[int] = set()  # types that may come again and again, whatever else comes

    def check_next(self, kind: int) -> list[tuple[Rule, str]]:
        """Note that a record of a known type comes next; what is wrong with its coming here, as rules and sentences."""
        if kind in self._free:  # a stream can hold millions of PAGE_DATA
            return []
        record = Type(kind)
        place = PLACES[record]
        name = record.name
        if self.guest not in place.guests:
            return [
                (rules.MISPLACED, _WHY_NOWHERE.get(record, f"{name} does not belong in a {self.guest.name} stream"))
            ]
        wrong = []
        if self.version < place.since:
            wrong.append((rules.MISPLACED, f"{name} needs stream version {place.since}, this one has {self.version}"))
        if self.version < 3 and record is _ENDS_STATIC_DATA[self.guest]:
            self.seen.add(Type.STATIC_DATA_END)
        if place.once and record in self.seen:
            wrong.append((rules.REPEATED, f"a second {name}"))
        after = [needed for needed in place.after if self.guest in PLACES[needed].guests]
        missing = [needed.name for needed in after if not self._came(needed)]
        if missing and record not in self.seen:  # once said is enough
            wrong.append((rules.ORDER, f"{name} before {' and '.join(missing)}"))
        late = [other.name for other in place.not_after if other in self.seen]
        if late:
            wrong.append((rules.ORDER, f"{name} after {' and '.join(late)}"))
        self.seen.add(record)
        if not (wrong or place.once or place.not_after):
            self._free.add(kind)
        return wrong

    def missing(self) -> list[Type]:
        """The records that a domain of this type needs and that have not come."""
        needed = (record for record, place in PLACES.items() if self.guest in place.needed)
        return [record for record in needed if not self._came(record)]

    def _came(self, record: Type) -> bool:
        return record in self.seen or _INSTEAD.get(record) in self.seen
