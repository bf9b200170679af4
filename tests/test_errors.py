"""Errors: they pass to another process with all that they know."""

from __future__ import annotations

import pickle

import pytest

from xenpv.convert.file import NotRestorable
from xenpv.errors import (
    Fault,
    GuestError,
    HostError,
    ImageError,
    Malformed,
    OutOfOrder,
    RequestError,
    SealBroken,
    StreamError,
    Truncated,
    Unsupported,
    XenPVError,
)
from xenpv.findings import Finding
from xenpv.migrate.channel import OutcomeUnknown
from xenpv.stream import rules

ERRORS = [
    ImageError("bad", offset=5, note="FEATURES"),
    RequestError("too much", needed=7, available=3),
    GuestError("bad p2m", pfn=5, mfn=9),
    Fault("no page", space="vaddr", address=1 << 40, level=2, entry=5, page_type=3),
    *(kind("bad", offset=9, record="END", rule="truncated") for kind in (StreamError, Truncated, Malformed)),
    *(kind("bad", offset=9) for kind in (OutOfOrder, Unsupported)),
    SealBroken("changed", offset=9, record="PAGE_DATA", rule="seal", batch=3, pfns=(5, 6)),
    HostError("no", op="pause", domid=5, errno=22),
    OutcomeUnknown("unheard", op="migrate", domid=5),
    NotRestorable([Finding(rules.ORDER, "bad", offset=3)], 3),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_pickled_error_keeps_text_attributes_and_notes(error: XenPVError) -> None:
    error.add_note("and the clean-up failed")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301  our own
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert copy.__notes__ == error.__notes__
