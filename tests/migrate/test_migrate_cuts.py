"""The link cut everywhere: afterwards one side runs the domain, or nobody, and its operator knows; nothing is left."""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

from tests.support.migration import PAGES, Cut, Ended, Move
from xenpv.migrate.channel import OutcomeUnknown
from xenpv.migrate.sender import take_back
from xenpv.save.precopy import PrecopyPolicy
from xenpv.save.source_domain import SourceState

SEED = 11
SAMPLES = 200 if os.environ.get("HYPOTHESIS_PROFILE") == "deep" else 6  # random places in the stream


def sample(words: list[int]) -> list[int]:
    """Where a direction is cut: behind every word and part, a byte before and after, and at random."""
    ends = sorted({0, *words})
    around = {end + off for end in [*ends[:3], *ends[-4:]] for off in (-1, 0, 1)}
    chance = random.Random(SEED)
    inside = {chance.randrange(ends[-1]) for _ in range(min(SAMPLES, ends[-1]))}
    return sorted(at for at in around | inside if 0 <= at < ends[-1])


def how_it_ended(move: Move, ended: Ended) -> str:
    """Which of the ends that there may be; fails for any other."""
    if ended.given is not None:
        assert move.is_gone_here()
        assert move.there() is not None
        return "there"
    assert ended.here is not None
    if isinstance(ended.here, OutcomeUnknown):
        assert move.waits_here()
        assert f"--settle {move.guest.domid}" in str(ended.here)
        if move.there() is not None:
            return "undecided, there"
        assert move.nothing_there()
        take_back(move.source, move.guest.domid)
        assert move.runs_here()
        return "undecided, here"
    assert move.nothing_there()
    assert move.runs_here()
    assert ended.there is not None
    assert ended.heard("kept")["rollback"].state is SourceState.RUNNING
    return "here"


@pytest.fixture(scope="module", params=[False, True], ids=["suspended", "live"])
def live(request: pytest.FixtureRequest) -> PrecopyPolicy | None:
    return PrecopyPolicy() if request.param else None


@pytest.fixture(scope="module")
def whole(live: PrecopyPolicy | None) -> tuple[Cut, Cut]:
    """Both directions of one that went well: how long they are."""
    ended = Move.ready().start(live=live)
    assert ended.sent is not None
    assert ended.answered is not None
    assert ended.sent.written > PAGES * 4096
    return ended.sent, ended.answered


@pytest.mark.parametrize("lost", [False, True], ids=["cut", "swallowed"])
def test_migrate_link_cut_towards_receiver_leaves_one_owner(
    whole: tuple[Cut, Cut], live: PrecopyPolicy | None, lost: bool
) -> None:
    """Until COMMIT is out, it runs here. Where the network swallowed COMMIT, the sender cannot know."""
    sent, commit = whole[0].written, whole[0].message_ends[-2]
    tally: Counter[str] = Counter()
    move, before = Move.ready(), len(os.listdir("/proc/self/fd"))
    for at in sample(whole[0].message_ends):
        end = how_it_ended(move, move.start(out=at, lost=lost, live=live))
        # A sender that has got the first byte of COMMIT out no longer knows; one that has got none, does.
        may_not_know = at >= commit if lost else at > commit
        assert end == ("undecided, here" if may_not_know else "here"), f"cut at {at} of {sent}"
        tally[end] += 1
        assert len(os.listdir("/proc/self/fd")) == before, "a descriptor is left open"
        move = Move(move.guest, Move.ready().target, move.pfns)
        move.source.set_time_slice(move.guest.domid, move.live)
    assert tally["here"] > 12
    assert tally["undecided, here"] >= (1 if lost else 0)
    print(f"\n{sum(tally.values())} cuts: {dict(tally)}")


@pytest.mark.parametrize("lost", [False, True], ids=["cut", "swallowed"])
def test_migrate_link_cut_towards_sender_leaves_one_owner(
    whole: tuple[Cut, Cut], live: PrecopyPolicy | None, lost: bool
) -> None:
    """Until READY is heard, it runs here; where RUNNING is not, it runs there."""
    answered, ready = whole[1].written, whole[1].message_ends[-2]
    tally: Counter[str] = Counter()
    for at in sample(whole[1].message_ends):
        move = Move.ready()
        end = how_it_ended(move, move.start(back=at, lost=lost, live=live))
        assert end == ("here" if at < ready else "undecided, there"), f"cut at {at} of {answered}"
        tally[end] += 1
    assert tally["here"] > 10
    assert tally["undecided, there"] >= 2
    print(f"\n{sum(tally.values())} cuts: {dict(tally)}")
