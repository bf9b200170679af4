"""The words of a hand-over (domain/handover.py) over a link (domain/transport.py), and the stream between them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xenpv.errors import HostError, OutOfOrder, RequestError, StreamError
from xenpv.migrate.protocol import HEADER, Fate, HandOver, Row, Stage, Word, decode_header
from xenpv.migrate.transport import Link
from xenpv.stream.fields import Buffer

_LAST_WORDS = 1.0  # seconds in which the other side may still say why it has closed

Tell = Callable[..., None]
"""tell(what has happened, **numbers and names)."""


class Undecided(HostError):
    """Nobody here can know which side is to run the domain. It stays suspended until somebody has looked."""


def nobody(_what: str, **_numbers: Any) -> None:
    """Tells nobody."""


class Conversation:
    """The words of one hand-over over a link; and, between two of them, a sink for the stream."""

    def __init__(self, link: Link, table: Mapping[Stage, Row]) -> None:
        self.link = link
        self.side = HandOver(table)

    @property
    def fate(self) -> Fate:
        return self.side.fate

    def say(self, word: Word, **body: Any) -> None:
        """Say it. OSError when the other side cannot hear it; and whether it has may then be unknown (``fate``)."""
        stage, before = self.side.stage, self.link.written
        try:
            self.link.write([self.side.say(word, **body)])
        except OSError:
            if self.link.written == before:
                self.side.unsaid(stage)
            raise

    def hear(self) -> dict[str, Any]:
        """The next word's body. RequestError, with the reason, for NO; Undecided for UNSURE; OSError, StreamError."""
        offset = self.side.heard_bytes
        word, length = decode_header(self.link.read(HEADER.size), offset)
        said = self.side.hear(word, self.link.read(length))
        why = str(said.get("why", "and does not say why"))
        why = "".join(c if c.isprintable() else "?" for c in why)
        if word is Word.NO:
            raise RequestError(f"{self.link.name}: {why}")
        if word is Word.UNSURE:
            raise Undecided(f"{self.link.name}: {why}", op="migrate")
        return said

    @property
    def is_regular_file(self) -> bool:
        return False

    def write(self, buffers: Sequence[Buffer]) -> None:
        """A part of the stream. RequestError, with the reason, when the other side wants no more."""
        if self.link.waits():
            self._interrupted()
        try:
            self.link.write(buffers)
        except OSError:
            with contextlib.suppress(OSError, StreamError):
                if self.link.waits(_LAST_WORDS):
                    self._interrupted()
            raise

    def _interrupted(self) -> None:
        offset = self.side.heard_bytes
        self.hear()
        raise OutOfOrder("the other side says it is whole before it is", offset=offset)
