"""The table of order is that of the specification; the docstrings quote its sentences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from xenpv.stream import rules
from xenpv.stream.record_order import ANY, HVM, OPTIONAL, PLACES, PV, Guest, Order, RecordType
from xenpv.stream.records import LIBXC

V3_PV = [
    RecordType.X86_PV_INFO,
    RecordType.X86_CPUID_POLICY,
    RecordType.X86_MSR_POLICY,
    RecordType.STATIC_DATA_END,
    RecordType.X86_PV_P2M_FRAMES,
    RecordType.PAGE_DATA,
    RecordType.PAGE_DATA,
    RecordType.X86_TSC_INFO,
    RecordType.SHARED_INFO,
    RecordType.X86_PV_VCPU_BASIC,
    RecordType.X86_PV_VCPU_EXTENDED,
    RecordType.X86_PV_VCPU_XSAVE,
    RecordType.X86_PV_VCPU_MSRS,
    RecordType.END,
]
V3_HVM = [
    RecordType.X86_CPUID_POLICY,
    RecordType.X86_MSR_POLICY,
    RecordType.STATIC_DATA_END,
    RecordType.PAGE_DATA,
    RecordType.PAGE_DATA,
    RecordType.X86_TSC_INFO,
    RecordType.HVM_PARAMS,
    RecordType.HVM_CONTEXT,
    RecordType.END,
]
SPECIFIED = {record for record in RecordType if record < 0x13}  # the others are xenpv's own
STATIC_DATA = {RecordType.X86_CPUID_POLICY, RecordType.X86_MSR_POLICY, RecordType.STATIC_DATA_END}


def broken_rules(
    records: Sequence[RecordType], guest: Guest = Guest.PV, version: int = 3
) -> list[tuple[str, RecordType | None]]:
    """Return the broken rules, each with the record that breaks it; None for a missing record."""
    order = Order(guest, version)
    found = [(rule.name, record) for record in records for rule, _ in order.check_next(record)]
    return [*found, *((rules.MISSING.name, None) for _ in order.missing())]


def with_record_before(records: list[RecordType], a: RecordType, b: RecordType) -> list[RecordType]:
    """Return the records with all of type a before the first of type b."""
    rest = [record for record in records if record is not a]
    at = rest.index(b)
    return [*rest[:at], *(record for record in records if record is a), *rest[at:]]


def test_order_typical_streams_break_no_rule() -> None:
    """ "A typical save record for an x86 PV guest image would look like", and for an HVM one."""
    assert broken_rules(V3_PV) == []
    assert broken_rules(V3_HVM, Guest.HVM) == []


def test_order_every_specified_record_has_a_place_and_a_class() -> None:
    """ "type: 0x00000000: END [...] 0x00000012: X86_MSR_POLICY"."""
    assert set(range(0x13)) == SPECIFIED
    assert set(RecordType) == set(PLACES) == {*LIBXC, RecordType.PAGE_DATA}
    assert all(record.type_name() == RecordType(kind).name for kind, record in LIBXC.items())


def test_order_p2m_leaves_is_mandatory_and_replaces_p2m_frames() -> None:
    """ "0x00000013 - 0x7FFFFFFF: Reserved for future mandatory records"."""
    ours = RecordType.XENPV_P2M_LEAVES
    assert 0x13 <= ours < OPTIONAL
    instead = [ours if record is RecordType.X86_PV_P2M_FRAMES else record for record in V3_PV]
    assert broken_rules(instead) == []
    assert broken_rules([*instead[:-1], ours, RecordType.END]) == [], "it may come again"
    assert broken_rules([*instead[:-1], RecordType.X86_PV_P2M_FRAMES, RecordType.END]) == [
        ("record-order", RecordType.X86_PV_P2M_FRAMES)
    ]
    assert broken_rules([*V3_PV[:-1], ours, RecordType.END]) == [("record-order", ours)]
    assert broken_rules([RecordType.X86_PV_INFO, ours, *instead[3:]])[0] == ("record-order", ours), (
        "before STATIC_DATA_END"
    )
    assert ("record-misplaced", ours) in broken_rules([RecordType.X86_PV_INFO, ours], version=2)
    assert ("record-misplaced", ours) in broken_rules([ours], Guest.HVM)


def test_order_optional_bit_is_31() -> None:
    """ "Optional records have bit 31 set in their type"."""
    assert OPTIONAL == 1 << 31


def test_order_swapped_dependent_records_break_record_order() -> None:
    """They are of the PV guest's records.

    "The following records must be present in the following order as each of them depends on information present in the
    preceding ones. X86_PV_INFO record, X86_PV_P2M_FRAMES record, PAGE_DATA records, VCPU records."
    """
    vcpu = [record for record in V3_PV if record.name.startswith("X86_PV_VCPU")]
    chain = [[RecordType.X86_PV_INFO], [RecordType.X86_PV_P2M_FRAMES], [RecordType.PAGE_DATA], vcpu]
    for earlier, later in itertools.combinations(chain, 2):
        for a, b in itertools.product(earlier, later):
            found = broken_rules(with_record_before(V3_PV, b, a))
            assert (rules.ORDER.name, b) in found, f"{b.name} before {a.name}"
            assert {name for name, _ in found} == {rules.ORDER.name}


def test_order_independent_records_may_come_anywhere() -> None:
    """ "No assumptions should be made about the ordering or interleaving of independent records."."""
    free = [RecordType.X86_TSC_INFO, RecordType.SHARED_INFO]
    for record in free:
        for before in (RecordType.PAGE_DATA, RecordType.X86_PV_VCPU_XSAVE, RecordType.END):
            assert broken_rules(with_record_before(V3_PV, record, before)) == []
    vcpu = V3_PV[9:13]
    for permuted in itertools.permutations(vcpu):
        assert broken_rules([*V3_PV[:9], *permuted, RecordType.END]) == []
    two: list[RecordType] = [*V3_PV[:9], *vcpu, *vcpu, RecordType.END]
    assert broken_rules(two) == []


def test_order_hvm_context_and_params_in_either_order_is_accepted() -> None:
    """ "HVM_PARAMS must precede HVM_CONTEXT", says the specification; libxenguest always writes HVM_CONTEXT first."""
    swapped = with_record_before(V3_HVM, RecordType.HVM_CONTEXT, RecordType.HVM_PARAMS)
    assert swapped != V3_HVM
    assert broken_rules(swapped, Guest.HVM) == broken_rules(V3_HVM, Guest.HVM) == []


@pytest.mark.parametrize("guest", list(Guest))
def test_order_missing_static_data_end_is_reported(guest: Guest) -> None:
    """ "mandates the presense of a STATIC_DATA_END record ahead of any memory/register content"."""
    records = V3_PV if guest is Guest.PV else V3_HVM
    without = [record for record in records if record is not RecordType.STATIC_DATA_END]
    names = {name for name, _ in broken_rules(without, guest)}
    assert names == {rules.ORDER.name, rules.MISSING.name}
    first = RecordType.X86_PV_P2M_FRAMES if guest is Guest.PV else RecordType.PAGE_DATA
    late = broken_rules(with_record_before(records, first, RecordType.STATIC_DATA_END), guest)
    assert (rules.ORDER.name, first) in late


@pytest.mark.parametrize("guest", list(Guest))
def test_order_version_2_infers_static_data_end(guest: Guest) -> None:
    """The place where it would have stood.

    "A v3-compatible receiver interpreting a v2 stream should infer the position of STATIC_DATA_END based on finding
    the first X86_PV_P2M_FRAMES record (for PV guests), or PAGE_DATA record (for HVM guests)".
    """
    records = [r for r in (V3_PV if guest is Guest.PV else V3_HVM) if r not in STATIC_DATA]
    assert broken_rules(records, guest, version=2) == []
    for static in STATIC_DATA:
        assert (rules.MISPLACED.name, static) in broken_rules([static, *records], guest, version=2)


def test_order_static_data_after_its_end_breaks_record_order() -> None:
    """ "A static data end record marks the end of the static state."."""
    for record in (RecordType.X86_PV_INFO, RecordType.X86_CPUID_POLICY, RecordType.X86_MSR_POLICY):
        assert (rules.ORDER.name, record) in broken_rules(with_record_before(V3_PV, record, RecordType.X86_TSC_INFO))


def test_order_records_of_the_other_guest_type_are_misplaced() -> None:
    """ "The set of valid records depends on the guest architecture and type."."""
    for record, place in PLACES.items():
        for guest in Guest:
            found = broken_rules([record], guest)
            assert ((rules.MISPLACED.name, record) in found) == (guest not in place.guests)
    pv = {record for record in SPECIFIED if "PV" in record.name} | {RecordType.SHARED_INFO}
    assert {record for record in SPECIFIED if PLACES[record].guests == PV} == pv
    hvm = {record for record in SPECIFIED if "HVM" in record.name}
    assert {record for record in SPECIFIED if PLACES[record].guests == HVM} == hvm
    assert {r for r, place in PLACES.items() if not place.guests <= ANY} == set()


def test_order_repeated_record_is_reported() -> None:
    """handle_x86_pv_info(): "Already received X86_PV_INFO record"; "Multiple STATIC_DATA_END records found"."""
    for record in (RecordType.X86_PV_INFO, RecordType.STATIC_DATA_END):
        at = V3_PV.index(record)
        assert (rules.REPEATED.name, record) in broken_rules([*V3_PV[: at + 1], record, *V3_PV[at + 1 :]])
    assert {record for record in SPECIFIED if PLACES[record].once} == {
        RecordType.X86_PV_INFO,
        RecordType.STATIC_DATA_END,
    }


def test_order_missing_mandatory_record_is_reported() -> None:
    """ "The following records must be present"; update_vcpu_context(): "Sender didn't send vcpu0's basic state"."""
    for guest, records, needed in (
        (Guest.PV, V3_PV, {"X86_PV_INFO", "X86_PV_P2M_FRAMES", "PAGE_DATA", "X86_PV_VCPU_BASIC", "SHARED_INFO"}),
        (Guest.HVM, V3_HVM, {"PAGE_DATA", "HVM_PARAMS", "HVM_CONTEXT"}),
    ):
        for record in set(records) - {RecordType.STATIC_DATA_END}:
            found = broken_rules([r for r in records if r is not record], guest)
            assert ((rules.MISSING.name, None) in found) == (record.name in needed), record.name


def test_order_repeated_breach_is_reported_once() -> None:
    order = Order(Guest.PV, 3)
    assert len(order.check_next(RecordType.PAGE_DATA)) == 1
    assert [order.check_next(RecordType.PAGE_DATA) for _ in range(100)] == [[]] * 100


def test_order_checkpoint_before_page_data_breaks_record_order() -> None:
    """ "all the preceding records in the stream represent a consistent view"; "all memory has now been sent"."""
    for record in (RecordType.CHECKPOINT, RecordType.VERIFY):
        assert broken_rules([*V3_PV[:-1], record, RecordType.PAGE_DATA, *V3_PV[7:]]) == []
        assert (rules.ORDER.name, record) in broken_rules([*V3_PV[:5], record, *V3_PV[5:]])
