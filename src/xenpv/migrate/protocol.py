"""Who may run a domain that is on its way: the words that its two hosts say to each other, and what each of them does
when the other falls silent. No I/O: docs/explanation/migration.md is this file in prose.

Rule of all rules: at every moment at most one side may run the domain, and exactly one but for the sender's ``GIVEN``,
in which it cannot know whether its last word arrived.
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
from xenpv.errors import Malformed, OutOfOrder, Unsupported

MAGIC = b"xnpv"
FRAMING = 1  # of a word's header and body; what the words mean is VERSIONS
VERSIONS = range(1, 2)  # of the protocol, that this side speaks
HEADER = Struct(">4sBBH")  # magic, framing, word, bytes of the body: never more than 64 KiB

_NAME_MAX = 1024
_TEXT_MAX = 4096


class Word(IntEnum):
    """What can be said. The receiver says HELLO, ACCEPT, READY, RUNNING, NO and UNSURE, the sender the others."""

    HELLO = 1  # who is there, and which versions of the protocol it speaks
    OFFER = 2  # the domain, and what it needs; the receiver answers before anything is sent
    ACCEPT = 3  # send it: the stream follows, as it is
    READY = 4  # whole and verified, paused
    YOURS = 5  # the sender will not run it any more
    RUNNING = 6  # the receiver has it for good
    NO = 7  # the receiver has nothing of it, and never will: the sender may run it
    UNSURE = 8  # the receiver can neither run nor destroy it, or knows nothing of it
    ASK = 9  # in place of OFFER: what has become of a domain that was given away?


class Stage(Enum):
    """How far one side is."""

    NEW = "before the first word"
    GREETED = "greeted"
    OFFERED = "offered"
    MOVING = "the stream is on its way"
    WHOLE = "whole on the other side, and nobody runs it"
    GIVEN = "given away, and no answer yet"
    ASKED = "asked, and no answer yet"
    DONE = "it is the receiver's"
    OVER = "it is the sender's"
    STUCK = "the receiver does not know"


class Fate(Enum):
    """What a side does with its copy when nothing more is heard."""

    RUN_ON = "it is the sender's: it runs on"
    DROP = "it is destroyed: the other side may run it"
    RUN = "it is the receiver's: it runs"
    UNKNOWN = "it stays suspended: the other side may or may not run it, and somebody has to look"


@dataclass(frozen=True)
class Row:
    """What may be said and heard in a stage, what comes of it, and what if nothing more is heard."""

    fate: Fate
    says: Mapping[Word, Stage] = field(default_factory=dict)
    hears: Mapping[Word, Stage] = field(default_factory=dict)


SENDER: Mapping[Stage, Row] = {
    Stage.NEW: Row(Fate.RUN_ON, hears={Word.HELLO: Stage.GREETED, Word.NO: Stage.OVER}),
    Stage.GREETED: Row(Fate.RUN_ON, says={Word.OFFER: Stage.OFFERED, Word.ASK: Stage.ASKED}),
    Stage.OFFERED: Row(Fate.RUN_ON, hears={Word.ACCEPT: Stage.MOVING, Word.NO: Stage.OVER}),
    Stage.MOVING: Row(Fate.RUN_ON, hears={Word.READY: Stage.WHOLE, Word.NO: Stage.OVER}),
    Stage.WHOLE: Row(Fate.RUN_ON, says={Word.YOURS: Stage.GIVEN}),
    Stage.GIVEN: Row(Fate.UNKNOWN, hears={Word.RUNNING: Stage.DONE, Word.NO: Stage.OVER, Word.UNSURE: Stage.STUCK}),
    Stage.ASKED: Row(Fate.UNKNOWN, hears={Word.RUNNING: Stage.DONE, Word.NO: Stage.OVER, Word.UNSURE: Stage.STUCK}),
    Stage.DONE: Row(Fate.DROP),
    Stage.OVER: Row(Fate.RUN_ON),
    Stage.STUCK: Row(Fate.UNKNOWN),
}

RECEIVER: Mapping[Stage, Row] = {
    Stage.NEW: Row(Fate.DROP, says={Word.HELLO: Stage.GREETED, Word.NO: Stage.OVER}),
    Stage.GREETED: Row(Fate.DROP, hears={Word.OFFER: Stage.OFFERED, Word.ASK: Stage.ASKED}),
    Stage.OFFERED: Row(Fate.DROP, says={Word.ACCEPT: Stage.MOVING, Word.NO: Stage.OVER}),
    Stage.MOVING: Row(Fate.DROP, says={Word.READY: Stage.WHOLE, Word.NO: Stage.OVER}),
    Stage.WHOLE: Row(Fate.DROP, says={Word.NO: Stage.OVER}, hears={Word.YOURS: Stage.GIVEN}),
    Stage.GIVEN: Row(Fate.RUN, says={Word.RUNNING: Stage.DONE, Word.NO: Stage.OVER, Word.UNSURE: Stage.STUCK}),
    Stage.ASKED: Row(Fate.RUN, says={Word.RUNNING: Stage.DONE, Word.NO: Stage.OVER, Word.UNSURE: Stage.STUCK}),
    Stage.DONE: Row(Fate.RUN),
    Stage.OVER: Row(Fate.DROP),
    Stage.STUCK: Row(Fate.UNKNOWN),
}


class HandOver:
    """One side of one hand-over."""

    def __init__(self, table: Mapping[Stage, Row]) -> None:
        self._table = table
        self.stage = Stage.NEW
        self.heard_bytes = 0

    @property
    def fate(self) -> Fate:
        """What to do with the copy here if nothing more is heard from now on."""
        return self._table[self.stage].fate

    def say(self, word: Word, **body: Any) -> bytes:
        """The bytes of a word. From here on it counts as said: whoever knows that no byte of it left calls unsaid."""
        data = encode(word, body)
        self.stage = self._table[self.stage].says[word]
        return data

    def may_say(self, word: Word) -> bool:
        """Whether a word may be said now."""
        return word in self._table[self.stage].says

    def unsaid(self, stage: Stage) -> None:
        """Back to where it was before the last word, no byte of which left this side."""
        self.stage = stage

    def hear(self, word: Word, body: bytes) -> dict[str, Any]:
        """What a word says. OutOfOrder for one that may not come now; Malformed."""
        offset, self.heard_bytes = self.heard_bytes, self.heard_bytes + HEADER.size + len(body)
        row = self._table[self.stage]
        if word not in row.hears:
            expected = " or ".join(one.name for one in row.hears) or "nothing"
            raise OutOfOrder(f"the other side says {word.name}, where {expected} was to come", offset=offset)
        try:
            said = json.loads(body) if body else {}
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            raise Malformed("what comes with it is no JSON object", offset=offset, record=word.name)
        self.stage = row.hears[word]
        return said


def encode(word: Word, body: Mapping[str, Any]) -> bytes:
    """A word's header and body. Text is cut where it would not fit."""
    cut = {key: value[:_TEXT_MAX] if isinstance(value, str) else value for key, value in body.items()}
    data = json.dumps(cut).encode() if cut else b""
    return HEADER.pack(MAGIC, FRAMING, word, len(data)) + data


def decode_header(data: bytes, offset: int) -> tuple[Word, int]:
    """The word and the length of its body. Unsupported, Malformed: what is there is none of ours."""
    magic, framing, number, length = HEADER.unpack(data)
    if magic != MAGIC:
        said = data.decode("ascii", "backslashreplace")
        what = f"the other side is no xenpv that hands over a domain: it says {said!r}…"
        raise Unsupported(what, offset=offset)
    if framing != FRAMING:
        raise Unsupported(f"the other side frames its words by version {framing}, not {FRAMING}", offset=offset)
    try:
        return Word(number), length
    except ValueError:
        raise Malformed(f"{number} is no word of this protocol", offset=offset) from None


def common_version(theirs: object) -> int | None:
    """The newest version that both sides speak, of what HELLO says: [oldest, newest]. None: there is none."""
    if not (isinstance(theirs, list) and len(theirs) == 2 and all(type(one) is int for one in theirs)):
        return None
    newest = min(theirs[1], VERSIONS[-1])
    return newest if newest >= max(theirs[0], VERSIONS[0]) else None


@dataclass(frozen=True)
class Offer:
    """A domain, and what it needs. ``pages`` are those that it has, ``max_pages`` those that it may have; ``entries``
    and ``forms`` are its p2m's. ``live``: it runs while it is sent; ``paused``: it is not to run there.
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
        """As it is sent."""
        return asdict(self)

    @classmethod
    def of(cls, body: Mapping[str, Any], offset: int = 0) -> Self:
        """From what was heard. Malformed for what cannot be meant; a member that is not known is passed over."""

        def bad(what: str) -> Malformed:
            return Malformed(what, offset=offset, record=Word.OFFER.name)

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
        for key in ("protocol", "vcpus", "pages", "max_pages", "entries"):
            if not 0 <= body[key] < 1 << 52:
                raise bad(f"{key} is {body[key]:#x}")
        if body["width"] not in {4, 8}:
            raise bad(f"a guest {8 * body['width']} bits wide")
        forms = body.get("forms")
        if not isinstance(forms, list) or not all(isinstance(form, str) for form in forms):
            raise bad(f"forms is {forms!r}")
        name, uuid = body.get("name"), body.get("uuid")
        # It becomes a value in xenstore, and is printed.
        if name is not None and not (isinstance(name, str) and 0 < len(name) <= _NAME_MAX and name.isprintable()):
            raise bad(f"name is {name!r:.60}")
        if uuid is not None:
            try:
                uuid = str(UUID(uuid))
            except (ValueError, TypeError, AttributeError):
                raise bad(f"uuid is {uuid!r:.60}") from None
        return cls(**{key: body[key] for key in kinds}, forms=forms, name=name, uuid=uuid)
