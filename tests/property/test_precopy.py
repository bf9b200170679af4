"""A guest that does what it likes while it is copied: what arrives is what it was when it stopped."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.kernel_guest import SOME_FORMS, Guest
from tests.support.live_guests import attend, copied, meddling
from tests.support.model_guest import pfns
from xenpv.abi.declare import Width
from xenpv.errors import RequestError
from xenpv.save.precopy import PrecopyPolicy

_STEP = st.one_of(
    st.just(None),
    st.tuples(st.just("write"), st.integers(0, 1100), st.integers(1, 700)),
    st.tuples(st.just("out"), st.integers(0, 1100), st.integers(1, 90)),
    st.tuples(st.just("in"), st.integers(2400, 60_000), st.integers(1, 40)),
    st.tuples(st.just("move"), st.integers(0, 1100), st.integers(2400, 60_000)),
    st.tuples(st.just("again"), st.integers(0, 1100), st.integers(1, 30)),
)


def _step(guest: Guest, action: tuple[str, int, int] | None, n: int) -> Any:
    def step() -> None:
        if action is None:
            return
        name, a, b = action
        free = guest.do("free_pfns")
        chosen = free[a % max(len(free) - 100, 1) :]
        try:
            match name:
                case "write":
                    guest.do("write_pattern", chosen[:b], n)
                case "out":
                    guest.do("balloon_out", chosen[:b])
                case "in":
                    guest.do("balloon_in", pfns(b, a))
                case "move":
                    guest.do("move", chosen[:25], pfns(25, b))
                case "again":
                    guest.do("balloon_out", chosen[:b])
                    guest.do("balloon_in", chosen[:b])
        except RequestError:  # those pfns are taken, or it has no pages left for tables
            pass

    return step


@settings(max_examples=settings().max_examples // 4)  # each takes a quarter of a second
@given(
    st.sampled_from(SOME_FORMS),
    st.lists(_STEP, max_size=8),
    st.lists(st.one_of(st.just(None), st.just(None), _STEP), max_size=60),
    st.integers(1, 6),
)
def test_save_live_any_guest_restores_as_it_stopped(
    kind: tuple[Width, str], between: list[Any], amid: list[Any], most: int
) -> None:
    """Whatever it does between passes, and between any two reads of its memory."""
    width, form = kind
    guest = Guest.boot(form, width, pages=2400)
    guest.do("write_pattern", guest.do("free_pfns")[::3], 1)
    attend(guest, [_step(guest, action, n) for n, action in enumerate(between, 10)])
    host = meddling(guest, [_step(guest, action, n) for n, action in enumerate(amid, 100)])
    copied(guest, host, live=PrecopyPolicy(max_iterations=most, target_dirty=1))
