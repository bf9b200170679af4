"""Who may run a domain: the tables of the hand-over, tried in every order in which words can cross and be lost."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from xenpv.errors import Malformed, OutOfOrder, StreamError, Unsupported
from xenpv.migrate.protocol import (
    HEADER,
    MAGIC,
    RECEIVER,
    SENDER,
    HandOver,
    Message,
    Offer,
    OnDisconnect,
    Stage,
    common_version,
    decode_header,
    encode,
)

OFFER = Offer(1, "web", "01234567-89ab-cdef-0123-456789abcdef", 8, 2, 100, 120, 90, ["linear virtual list"], "4.17.5")
State = tuple[
    Stage, Stage, tuple[Message, ...], tuple[Message, ...]
]  # sender, receiver, and what is on its way to each


def reachable() -> set[State]:
    """All that can be, from before the first word on: either side speaks, or hears what came first."""
    seen: set[State] = set()
    todo: list[State] = [(Stage.NEW, Stage.NEW, (), ())]
    while todo:
        state = todo.pop()
        if state in seen:
            continue
        seen.add(state)
        sender, receiver, to_sender, to_receiver = state
        todo += [(after, receiver, to_sender, (*to_receiver, word)) for word, after in SENDER[sender].sends.items()]
        todo += [(sender, after, (*to_sender, word), to_receiver) for word, after in RECEIVER[receiver].sends.items()]
        if to_sender and to_sender[0] in SENDER[sender].receives:
            todo.append((SENDER[sender].receives[to_sender[0]], receiver, to_sender[1:], to_receiver))
        if to_receiver and to_receiver[0] in RECEIVER[receiver].receives:
            todo.append((sender, RECEIVER[receiver].receives[to_receiver[0]], to_sender, to_receiver[1:]))
    return seen


def ends(state: State) -> set[tuple[OnDisconnect, OnDisconnect]]:
    """What may become of both copies if the link is cut now: some of what is on its way still arrives."""
    sender, receiver, to_sender, to_receiver = state
    found = set()
    for arrives in range(len(to_receiver) + 1):
        there = HandOver(RECEIVER)
        there.stage = receiver
        for word in to_receiver[:arrives]:
            if word in RECEIVER[there.stage].receives:
                there.receive(word, b"")
        for heard in range(len(to_sender) + 1):
            here = HandOver(SENDER)
            here.stage = sender
            for word in to_sender[:heard]:
                if word in SENDER[here.stage].receives:
                    here.receive(word, b"")
            found.add((here.on_disconnect, there.on_disconnect))
    return found


def test_wherever_the_link_is_cut_one_side_runs_it_or_somebody_is_told() -> None:
    states = [state for state in reachable() if Message.QUERY not in state[3] and Stage.QUERIED not in state[:2]]
    asked = {state for state in reachable() if Stage.QUERIED in state[:2]}
    tally: Counter[tuple[OnDisconnect, OnDisconnect]] = Counter()
    for state in states:
        for here, there in ends(state):
            tally[here, there] += 1
            assert not (here is OnDisconnect.RESUME and there in {OnDisconnect.RUN, OnDisconnect.STAY_SUSPENDED}), (
                f"both: {state}"
            )
            assert not (here is OnDisconnect.DESTROY and there is not OnDisconnect.RUN), (
                f"none, and nobody knows: {state}"
            )
            assert there is not OnDisconnect.STAY_SUSPENDED or here is OnDisconnect.STAY_SUSPENDED, state
    assert len(states) > 20
    assert asked
    assert set(tally) == {
        (OnDisconnect.RESUME, OnDisconnect.DESTROY),
        (OnDisconnect.STAY_SUSPENDED, OnDisconnect.DESTROY),
        (OnDisconnect.STAY_SUSPENDED, OnDisconnect.RUN),
        (OnDisconnect.STAY_SUSPENDED, OnDisconnect.STAY_SUSPENDED),
        (OnDisconnect.DESTROY, OnDisconnect.RUN),
    }


def test_a_sender_is_unsure_only_once_it_gave_the_domain_away() -> None:
    unsure = {
        stage for stage in Stage if stage in SENDER and SENDER[stage].on_disconnect is OnDisconnect.STAY_SUSPENDED
    }
    assert unsure == {Stage.COMMITTED, Stage.QUERIED, Stage.INDETERMINATE}
    assert {stage for stage in RECEIVER if RECEIVER[stage].on_disconnect is OnDisconnect.STAY_SUSPENDED} == {
        Stage.INDETERMINATE
    }


def test_every_word_is_said_by_one_side_and_heard_by_the_other() -> None:
    for one, other in ((SENDER, RECEIVER), (RECEIVER, SENDER)):
        said = {word for row in one.values() for word in row.sends}
        assert said == {word for row in other.values() for word in row.receives}


def test_words_are_framed_and_read_back() -> None:
    here, there = HandOver(RECEIVER), HandOver(SENDER)
    data = here.send(Message.HELLO, protocol=[1, 1], xen="4.17")
    word, length = decode_header(data[: HEADER.size], 0)
    assert (word, length) == (Message.HELLO, len(data) - HEADER.size)
    assert there.receive(word, data[HEADER.size :]) == {"protocol": [1, 1], "xen": "4.17"}
    assert there.received_bytes == len(data)
    assert (here.stage, there.stage) == (Stage.GREETED, Stage.GREETED)
    assert encode(Message.COMMIT, {}) == HEADER.pack(MAGIC, 1, 5, 0)


def test_long_words_are_cut_to_what_a_frame_holds() -> None:
    data = encode(Message.ABORT, {"why": "no " * 100_000})
    assert len(json.loads(data[HEADER.size :])["why"]) == 4096


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (b"Welcome!", Unsupported, "'Welcome!'"),
        (HEADER.pack(MAGIC, 2, 1, 0), Unsupported, "version 2, not 1"),
        (HEADER.pack(MAGIC, 1, 99, 0), Malformed, "99"),
    ],
)
def test_what_is_no_word_is_refused(data: bytes, error: type[StreamError], said: str) -> None:
    with pytest.raises(error, match=said):
        decode_header(data, 0)


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"1", b"[" * 60_000])
def test_a_body_is_an_object(body: bytes) -> None:
    with pytest.raises(Malformed, match="no JSON object"):
        HandOver(SENDER).receive(Message.HELLO, body)


@pytest.mark.parametrize("word", [word for word in Message if word not in {Message.HELLO, Message.ABORT}])
def test_a_word_out_of_turn_changes_nothing(word: Message) -> None:
    here = HandOver(SENDER)
    with pytest.raises(OutOfOrder, match=rf"{word.name}; .*HELLO or ABORT"):
        here.receive(word, b"")
    assert here.stage is Stage.NEW


def test_an_offer_is_read_back() -> None:
    assert Offer.of(OFFER.body()) == OFFER
    assert Offer.of(json.loads(json.dumps(OFFER.body() | {"new": 1}))) == OFFER
    bare = replace(OFFER, name=None, uuid=None, forms=[])
    assert Offer.of(bare.body()) == bare


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pages", -1),
        ("pages", 1 << 60),
        ("pages", 1.5),
        ("pages", True),
        ("pages", None),
        ("width", 5),
        ("live", 1),
        ("forms", "tree"),
        ("forms", [1]),
        ("name", ""),
        ("name", "a\nb"),
        ("name", "x" * 2000),
        ("name", 5),
        ("uuid", "1234"),
        ("uuid", 5),
        ("xen", None),
    ],
)
def test_an_offer_that_cannot_be_meant_is_refused(key: str, value: object) -> None:
    with pytest.raises(Malformed, match=key if key != "width" else "bits wide"):
        Offer.of(OFFER.body() | {key: value})


@pytest.mark.parametrize(
    ("theirs", "common"),
    [([1, 1], 1), ([1, 9], 1), ([2, 3], None), ([0, 0], None), (1, None), ([1], None), (["1", "1"], None)],
)
def test_the_newest_version_that_both_speak(theirs: object, common: int | None) -> None:
    assert common_version(theirs) == common
