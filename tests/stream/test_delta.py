"""Pages as what has changed in them, against the way in which the saver made it (xc_compression.c compress_page())."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.writers import legacy
from tests.support.writers.stream import PAGE
from xenpv.stream import delta

OLD = bytes(range(256)) * 16


def made(data: bytes, old: bytes = OLD) -> bytes:
    page = bytearray(old)
    delta.apply_changes(data, 0, memoryview(page))
    return bytes(page)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, PAGE - 1), st.binary(min_size=1, max_size=1200)), max_size=6))
def test_apply_changes_inverts_the_senders_compression(changes: list[tuple[int, bytes]]) -> None:
    new = bytearray(OLD)
    for at, data in changes:
        new[at : at + len(data)] = data[: PAGE - at]
    said = legacy.delta(OLD, bytes(new))
    assert made(said) == new
    assert delta.page_ends(said + b"\x00", 9) == [len(said), len(said) + 1]


def test_apply_changes_page_with_all_words_changed_takes_4105_bytes() -> None:
    """xc_compression.c WORST_COMP_PAGE_SIZE."""
    said = legacy.delta(OLD, bytes(b ^ 0xFF for b in OLD))
    assert len(said) == PAGE + 9
    assert made(said) == bytes(b ^ 0xFF for b in OLD)


def test_apply_changes_full_and_empty_page() -> None:
    page = bytes(PAGE - 1) + b"!"
    assert made(legacy.whole(page)) == page
    assert made(b"\x00") == OLD
    assert delta.is_full_page(legacy.whole(page), 0)
    assert not delta.is_full_page(b"\x00", 0)


def test_page_ends_partial_page_is_left_out() -> None:
    whole = legacy.whole(OLD)
    changed = legacy.delta(OLD, bytes(4) + OLD[4:])
    for data in (whole, changed):
        for cut in range(len(data)):
            assert delta.page_ends(b"\0" + data[:cut], 9) == [1]
        assert delta.page_ends(b"\0" + data, 1) == [1]


@pytest.mark.parametrize(
    ("data", "at"),
    [
        (b"\x81\x80" + bytes(9), 1),  # a run of nothing
        (b"\xff" * 8 + b"\xa1", 8),  # beyond the page's end
        (b"\xff\x00", 1),
    ],
)
def test_page_ends_malformed_run_raises_with_offset(data: bytes, at: int) -> None:
    with pytest.raises(delta.MalformedDelta) as e:
        delta.page_ends(data, 1)
    assert e.value.offset == at


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_page_ends_any_bytes_are_pages_or_malformed(data: bytes) -> None:
    try:
        ends = delta.page_ends(data, 50)
    except delta.MalformedDelta as e:
        assert 0 <= e.offset < len(data)  # noqa: PT017
        return
    for at in [0, *ends[:-1]] if ends else []:
        made(data[at:])
    assert ends == sorted(ends)
    assert all(0 < end <= len(data) for end in ends)
