"""The hand-over of a migration: messages, and what each side does on disconnect.

No I/O.

The rule behind it: at every moment at most one side may run the domain. Exactly one may, but for the sender's stage
``COMMITTED``, in which it cannot know whether its COMMIT arrived.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum, IntEnum
from struct import Struct
from typing import Any, Self
from uuid import UUID

from xenpv.abi.declare import Width
from xenpv.errors import Malformed, OutOfOrder, RequestError, Unsupported
from xenpv.host.domain_names import check_name

MAGIC = b"xnpv"
FRAMING = 1  # of a message's header and body; what messages mean is VERSIONS
VERSIONS = range(1, 2)  # of the protocol that this side speaks
HEADER = Struct(">4sBBH")  # magic, framing, message, bytes of the body: never more than 64 KiB

_TEXT_MAX = 4096


class Message(IntEnum):
    """The messages.

    OFFER, COMMIT and QUERY are the sender's, all others the receiver's.
    """

    HELLO = 1  # who is there, and which versions of the protocol it speaks
    OFFER = 2  # the domain, and what it needs; the receiver answers before anything is sent
    ACCEPT = 3  # send it: the stream follows, as it is
    READY = 4  # the domain is complete, verified and paused
    COMMIT = 5  # the sender will not run it any more
    RUNNING = 6  # the receiver has it for good
    ABORT = 7  # the receiver has nothing of it, and never will: the sender may run it
    INDETERMINATE = 8  # the receiver can neither run nor destroy it, or knows nothing of it
    QUERY = 9  # in place of OFFER: what is the outcome for a domain that was committed?


class Stage(Enum):
    """How far one side is."""

    NEW = "before the first message"
    GREETED = "greeted"
    OFFERED = "offered"
    STREAMING = "the stream is being sent"
    COMPLETE = "complete on the receiver, and nobody runs it"
    COMMITTED = "committed, and no answer yet"
    QUERIED = "queried, and no answer yet"
    RECEIVER_OWNS = "it is the receiver's"
    SENDER_OWNS = "it is the sender's"
    INDETERMINATE = "the receiver does not know"


class OnDisconnect(Enum):
    """What a side does with its copy when the connection drops."""

    RESUME = "it is the sender's: it runs on"
    DESTROY = "it is destroyed: the other side may run it"
    RUN = "it is the receiver's: it runs"
    STAY_SUSPENDED = "it stays suspended: the other side may or may not run it, and an operator has to look"


@dataclass(frozen=True)
class StateRule:
    """What a side may send and receive in a stage, and what it does on disconnect.

    Each message leads to another stage.
    """

    on_disconnect: OnDisconnect
    sends: Mapping[Message, Stage] = field(default_factory=dict)
    receives: Mapping[Message, Stage] = field(default_factory=dict)


_OUTCOMES = {
    Message.RUNNING: Stage.RECEIVER_OWNS,
    Message.ABORT: Stage.SENDER_OWNS,
    Message.INDETERMINATE: Stage.INDETERMINATE,
}

SENDER: Mapping[Stage, StateRule] = {
    Stage.NEW: StateRule(
        OnDisconnect.RESUME, receives={Message.HELLO: Stage.GREETED, Message.ABORT: Stage.SENDER_OWNS}
    ),
    Stage.GREETED: StateRule(OnDisconnect.RESUME, sends={Message.OFFER: Stage.OFFERED, Message.QUERY: Stage.QUERIED}),
    Stage.OFFERED: StateRule(
        OnDisconnect.RESUME, receives={Message.ACCEPT: Stage.STREAMING, Message.ABORT: Stage.SENDER_OWNS}
    ),
    Stage.STREAMING: StateRule(
        OnDisconnect.RESUME, receives={Message.READY: Stage.COMPLETE, Message.ABORT: Stage.SENDER_OWNS}
    ),
    Stage.COMPLETE: StateRule(OnDisconnect.RESUME, sends={Message.COMMIT: Stage.COMMITTED}),
    Stage.COMMITTED: StateRule(OnDisconnect.STAY_SUSPENDED, receives=_OUTCOMES),
    Stage.QUERIED: StateRule(OnDisconnect.STAY_SUSPENDED, receives=_OUTCOMES),
    Stage.RECEIVER_OWNS: StateRule(OnDisconnect.DESTROY),
    Stage.SENDER_OWNS: StateRule(OnDisconnect.RESUME),
    Stage.INDETERMINATE: StateRule(OnDisconnect.STAY_SUSPENDED),
}

RECEIVER: Mapping[Stage, StateRule] = {
    Stage.NEW: StateRule(OnDisconnect.DESTROY, sends={Message.HELLO: Stage.GREETED, Message.ABORT: Stage.SENDER_OWNS}),
    Stage.GREETED: StateRule(
        OnDisconnect.DESTROY, receives={Message.OFFER: Stage.OFFERED, Message.QUERY: Stage.QUERIED}
    ),
    Stage.OFFERED: StateRule(
        OnDisconnect.DESTROY, sends={Message.ACCEPT: Stage.STREAMING, Message.ABORT: Stage.SENDER_OWNS}
    ),
    Stage.STREAMING: StateRule(
        OnDisconnect.DESTROY, sends={Message.READY: Stage.COMPLETE, Message.ABORT: Stage.SENDER_OWNS}
    ),
    Stage.COMPLETE: StateRule(
        OnDisconnect.DESTROY, sends={Message.ABORT: Stage.SENDER_OWNS}, receives={Message.COMMIT: Stage.COMMITTED}
    ),
    Stage.COMMITTED: StateRule(OnDisconnect.RUN, sends=_OUTCOMES),
    Stage.QUERIED: StateRule(OnDisconnect.RUN, sends=_OUTCOMES),
    Stage.RECEIVER_OWNS: StateRule(OnDisconnect.RUN),
    Stage.SENDER_OWNS: StateRule(OnDisconnect.DESTROY),
    Stage.INDETERMINATE: StateRule(OnDisconnect.STAY_SUSPENDED),
}


class HandOver:
    """One side of one hand-over.

    It encodes and decodes messages, and refuses those that may not come now.
    """

    def __init__(self, rules: Mapping[Stage, StateRule]) -> None:
        self._rules = rules
        self.stage = Stage.NEW
        self.received_bytes = 0

    @property
    def on_disconnect(self) -> OnDisconnect:
        """What to do with the copy on this side if the connection drops now."""
        return self._rules[self.stage].on_disconnect

    def send(self, message: Message, **body: Any) -> bytes:
        """Return the bytes of a message, which then counts as sent.

        If no byte of it left this side, call ``undo_send``. KeyError for one that may not be sent now: the order of
        messages is the caller's own.
        """
        data = encode(message, body)
        self.stage = self._rules[self.stage].sends[message]
        return data

    def may_send(self, message: Message) -> bool:
        """Return whether a message may be sent now."""
        return message in self._rules[self.stage].sends

    def undo_send(self, stage: Stage) -> None:
        """Return to the stage before the last message, no byte of which left this side."""
        self.stage = stage

    def receive(self, message: Message, body: bytes) -> dict[str, Any]:
        """Return the decoded body of a message.

        OutOfOrder if it may not come now; Malformed.
        """
        offset, self.received_bytes = self.received_bytes, self.received_bytes + HEADER.size + len(body)
        rule = self._rules[self.stage]
        if message not in rule.receives:
            expected = " or ".join(expected.name for expected in rule.receives) or "nothing"
            raise OutOfOrder(f"the peer sent {message.name}; expected {expected}", offset=offset)
        try:
            decoded = json.loads(body) if body else {}
        except (ValueError, RecursionError) as e:
            raise Malformed("the body is not a JSON object", offset=offset, record=message.name) from e
        if not isinstance(decoded, dict):
            raise Malformed("the body is not a JSON object", offset=offset, record=message.name)
        self.stage = rule.receives[message]
        return decoded


def encode(message: Message, body: Mapping[str, Any]) -> bytes:
    """Return a message's header and body. Text that is too long is cut."""
    limited = {key: value[:_TEXT_MAX] if isinstance(value, str) else value for key, value in body.items()}
    data = json.dumps(limited).encode() if limited else b""
    return HEADER.pack(MAGIC, FRAMING, message, len(data)) + data


def decode_header(data: bytes, offset: int) -> tuple[Message, int]:
    """Return the message and the length of its body.

    Unsupported or Malformed if the peer does not speak xenpv.
    """
    magic, framing, number, length = HEADER.unpack(data)
    if magic != MAGIC:
        received = data.decode("ascii", "backslashreplace")
        raise Unsupported(f"the peer does not speak xenpv's hand-over protocol: it sent {received!r}…", offset=offset)
    if framing != FRAMING:
        raise Unsupported(f"the peer frames its messages by version {framing}, not {FRAMING}", offset=offset)
    try:
        return Message(number), length
    except ValueError:
        raise Malformed(f"message number {number} is not part of this protocol", offset=offset) from None


def common_version(theirs: object) -> int | None:
    """Return the newest version that both sides speak; None if there is none.

    Args:
        theirs: The value of HELLO: [oldest, newest].
    """
    if not (isinstance(theirs, list) and len(theirs) == 2 and all(type(version) is int for version in theirs)):
        return None
    newest = min(theirs[1], VERSIONS[-1])
    return newest if newest >= max(theirs[0], VERSIONS[0]) else None


@dataclass(frozen=True)
class Offer:
    """A domain, and what it needs.

    Attributes:
        protocol: The version of the protocol that the sender chose.
        pages: Pages that it has.
        max_pages: Pages that it may have.
        entries: Entries of its p2m.
        forms: Forms of its p2m, by name.
        xen: The sender's Xen version.
        live: It runs while it is sent.
        paused: It is to stay paused on the receiver.
    """

    protocol: int
    name: str | None
    uuid: str | None
    width: Width
    vcpus: int
    pages: int
    max_pages: int
    entries: int
    forms: list[str]
    xen: str
    live: bool = False
    paused: bool = False

    def body(self) -> dict[str, Any]:
        """Return the message body."""
        return asdict(self)

    @classmethod
    def of(cls, body: Mapping[str, Any], offset: int = 0) -> Self:
        """Return the offer in a message body.

        Malformed for invalid members; unknown members are ignored.
        """

        def bad(problem: str) -> Malformed:
            return Malformed(problem, offset=offset, record=Message.OFFER.name)

        kinds: dict[str, type] = {
            "protocol": int,
            "vcpus": int,
            "pages": int,
            "max_pages": int,
            "entries": int,
            "width": int,
        }
        kinds |= {"xen": str, "live": bool, "paused": bool}
        for key, kind in kinds.items():
            if type(body.get(key)) is not kind:
                raise bad(f"{key} is {body.get(key)!r}")
        # A domain may have more pages than it may (xl mem-set lowers the limit first), or than entries in its p2m.
        for key in ("protocol", "vcpus", "pages", "max_pages", "entries"):
            if not (key == "vcpus") <= body[key] < 1 << 52:
                raise bad(f"{key} is {body[key]:#x}")
        if body["width"] not in {4, 8}:
            raise bad(f"width is {body['width']} bytes; 4 and 8 are valid")
        forms = body.get("forms")
        if not isinstance(forms, list) or not all(isinstance(form, str) for form in forms):
            raise bad(f"forms is {forms!r}")
        name, uuid = identity_in(body, Message.OFFER, offset)
        return cls(**{key: body[key] for key in kinds}, forms=forms, name=name, uuid=uuid)


def identity_in(body: Mapping[str, Any], message: Message, offset: int = 0) -> tuple[str | None, str | None]:
    """Return name and uuid in the body of an OFFER or a QUERY.

    Raises Malformed for invalid ones.

    None for what the domain does not have. The uuid is in lower case.
    """
    name, uuid = body.get("name"), body.get("uuid")
    if name is not None:
        if not isinstance(name, str):
            raise Malformed(f"name is {name!a:.60}", offset=offset, record=message.name)
        try:
            check_name(name)
        except RequestError as e:
            raise Malformed(f"name is {name!a:.60}: {e}", offset=offset, record=message.name) from None
    if uuid is not None:
        try:
            uuid = str(UUID(uuid))
        except (ValueError, TypeError, AttributeError):
            raise Malformed(f"uuid is {uuid!a:.60}", offset=offset, record=message.name) from None
    return name, uuid
