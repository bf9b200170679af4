"""The order table, for any sequence of records: what it says at each, and at the end, follows from the table alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xenpv.stream import rules
from xenpv.stream.record_order import PLACES, Guest, Order, RecordType

SPECIFIED = [
    record for record in RecordType if record is not RecordType.XENPV_P2M_LEAVES
]  # which stands instead of another

sequences = st.lists(st.sampled_from(SPECIFIED), max_size=30)


@given(st.sampled_from(list(Guest)), st.sampled_from([2, 3]), sequences)
def test_order_check_next_judges_a_record_by_those_before_it(
    guest: Guest, version: int, records: list[RecordType]
) -> None:
    order = Order(guest, version)
    before: set[RecordType] = set()
    for record in records:
        place = PLACES[record]
        broken_rules = {rule for rule, _ in order.check_next(record)}
        if guest not in place.guests:
            assert broken_rules == {rules.MISPLACED}
            continue
        if version == 2 and record is {Guest.PV: RecordType.X86_PV_P2M_FRAMES, Guest.HVM: RecordType.PAGE_DATA}[guest]:
            before.add(RecordType.STATIC_DATA_END)  # "infer the position of STATIC_DATA_END"
        assert (rules.MISPLACED in broken_rules) == (version < place.min_version)
        assert (rules.REPEATED in broken_rules) == (place.once and record in before)
        needed = {predecessor for predecessor in place.after if guest in PLACES[predecessor].guests}
        late = any(barrier in before for barrier in place.not_after)
        early = record not in before and not needed <= before
        assert (rules.ORDER in broken_rules) == (late or early)
        before.add(record)
    missing = {record for record, place in PLACES.items() if guest in place.mandatory_for} - before
    assert set(order.missing()) == missing


@given(st.sampled_from(list(Guest)), st.permutations(SPECIFIED))
def test_order_sorted_records_are_accepted(guest: Guest, records: list[RecordType]) -> None:
    """Sort any permutation by what each record comes after: no fault is left but records of the other guest."""
    mine = [record for record in records if guest in PLACES[record].guests]
    placed: list[RecordType] = []
    while len(placed) < len(mine):
        for record in mine:
            place = PLACES[record]
            needed = {predecessor for predecessor in place.after if guest in PLACES[predecessor].guests}
            holds_back = any(record in PLACES[pending].not_after for pending in mine if pending not in placed)
            if record not in placed and needed <= set(placed) and not holds_back:
                placed.append(record)
    order = Order(guest, 3)
    assert [fault for record in placed for fault in order.check_next(record)] == []
    assert order.missing() == []
