"""Who may run a domain: the tables of the hand-over, tried in every order in which messages can cross and be lost."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from xenpv.errors import Malformed, OutOfOrder, StreamError, Unsupported
from xenpv.migrate.handover import (
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
    """Return all states that can be reached: either side sends, or receives the oldest message."""
    states: set[State] = set()
    todo: list[State] = [(Stage.NEW, Stage.NEW, (), ())]
    while todo:
        state = todo.pop()
        if state in states:
            continue
        states.add(state)
        sender, receiver, to_sender, to_receiver = state
        todo += [
            (after, receiver, to_sender, (*to_receiver, message)) for message, after in SENDER[sender].sends.items()
        ]
        todo += [
            (sender, after, (*to_sender, message), to_receiver) for message, after in RECEIVER[receiver].sends.items()
        ]
        if to_sender and to_sender[0] in SENDER[sender].receives:
            todo.append((SENDER[sender].receives[to_sender[0]], receiver, to_sender[1:], to_receiver))
        if to_receiver and to_receiver[0] in RECEIVER[receiver].receives:
            todo.append((sender, RECEIVER[receiver].receives[to_receiver[0]], to_sender, to_receiver[1:]))
    return states


def ends(state: State) -> set[tuple[OnDisconnect, OnDisconnect]]:
    """Return the outcomes of a cut in this state, after any number of messages still arrives."""
    sender, receiver, to_sender, to_receiver = state
    outcomes = set()
    for arrives in range(len(to_receiver) + 1):
        there = HandOver(RECEIVER)
        there.stage = receiver
        for message in to_receiver[:arrives]:
            if message in RECEIVER[there.stage].receives:
                there.receive(message, b"")
        for heard in range(len(to_sender) + 1):
            here = HandOver(SENDER)
            here.stage = sender
            for message in to_sender[:heard]:
                if message in SENDER[here.stage].receives:
                    here.receive(message, b"")
            outcomes.add((here.on_disconnect, there.on_disconnect))
    return outcomes


def test_protocol_any_cut_leaves_one_owner_or_outcome_unknown() -> None:
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


def test_protocol_sender_stays_suspended_only_after_commit() -> None:
    unsure = {
        stage for stage in Stage if stage in SENDER and SENDER[stage].on_disconnect is OnDisconnect.STAY_SUSPENDED
    }
    assert unsure == {Stage.COMMITTED, Stage.QUERIED, Stage.INDETERMINATE}
    assert {stage for stage in RECEIVER if RECEIVER[stage].on_disconnect is OnDisconnect.STAY_SUSPENDED} == {
        Stage.INDETERMINATE
    }


def test_protocol_each_message_is_sent_by_one_side_and_received_by_the_other() -> None:
    for here, there in ((SENDER, RECEIVER), (RECEIVER, SENDER)):
        sent = {message for rule in here.values() for message in rule.sends}
        assert sent == {message for rule in there.values() for message in rule.receives}


def test_handover_message_round_trip() -> None:
    here, there = HandOver(RECEIVER), HandOver(SENDER)
    data = here.send(Message.HELLO, protocol=[1, 1], xen="4.17")
    message, length = decode_header(data[: HEADER.size], 0)
    assert (message, length) == (Message.HELLO, len(data) - HEADER.size)
    assert there.receive(message, data[HEADER.size :]) == {"protocol": [1, 1], "xen": "4.17"}
    assert there.received_bytes == len(data)
    assert (here.stage, there.stage) == (Stage.GREETED, Stage.GREETED)
    assert encode(Message.COMMIT, {}) == HEADER.pack(MAGIC, 1, 5, 0)


def test_encode_long_text_is_cut() -> None:
    data = encode(Message.ABORT, {"why": "no " * 100_000})
    assert len(json.loads(data[HEADER.size :])["why"]) == 4096


@pytest.mark.parametrize(
    ("data", "error", "value"),
    [
        (b"Welcome!", Unsupported, "Welcome"),
        (HEADER.pack(MAGIC, 2, 1, 0), Unsupported, "2"),
        (HEADER.pack(MAGIC, 1, 99, 0), Malformed, "99"),
    ],
)
def test_decode_header_of_another_protocol_is_refused(data: bytes, error: type[StreamError], value: str) -> None:
    with pytest.raises(error, match=rf"\b{value}\b") as e:
        decode_header(data, 0x30)
    assert e.value.offset == 0x30


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"1", b"[" * 60_000])
def test_handover_body_that_is_no_object_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed) as e:
        HandOver(SENDER).receive(Message.HELLO, body)
    assert (e.value.record, e.value.offset) == ("HELLO", 0)


@pytest.mark.parametrize("message", [message for message in Message if message not in {Message.HELLO, Message.ABORT}])
def test_handover_message_out_of_order_keeps_the_stage(message: Message) -> None:
    here = HandOver(SENDER)
    with pytest.raises(OutOfOrder) as e:
        here.receive(message, b"")
    assert e.value.offset == 0
    assert {message.name, "HELLO", "ABORT"} <= set(re.findall("[A-Z]+", e.value.reason))
    assert here.stage is Stage.NEW


def test_offer_round_trip() -> None:
    assert Offer.of(OFFER.body()) == OFFER
    assert Offer.of(json.loads(json.dumps(OFFER.body() | {"new": 1}))) == OFFER
    bare = replace(OFFER, name=None, uuid=None, forms=[])
    assert Offer.of(bare.body()) == bare


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vcpus", 0),
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
def test_offer_invalid_member_is_malformed(key: str, value: object) -> None:
    with pytest.raises(Malformed, match=rf"^{key} ") as e:
        Offer.of(OFFER.body() | {key: value}, offset=0x30)
    assert (e.value.record, e.value.offset) == ("OFFER", 0x30)


@pytest.mark.parametrize(
    ("theirs", "common"),
    [([1, 1], 1), ([1, 9], 1), ([2, 3], None), ([0, 0], None), (1, None), ([1], None), (["1", "1"], None)],
)
def test_common_version_is_the_newest_of_both(theirs: object, common: int | None) -> None:
    assert common_version(theirs) == common
