"""Sends and receives a hand-over's messages, and the stream between them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xenpv.errors import HostError, OutOfOrder, RequestError, StreamError
from xenpv.migrate.handover import HEADER, HandOver, Message, OnDisconnect, Stage, StateRule, decode_header
from xenpv.migrate.transport import Link
from xenpv.stream.fields import Buffer

_LAST_MESSAGE_TIMEOUT = 1.0  # seconds in which the peer's reason may still arrive after it has closed

EventCallback = Callable[..., None]
"""``on_event(event, **details)`` receives what happens in a migration."""


class OutcomeUnknown(HostError):
    """Nobody here can know which side is to run the domain.

    It stays suspended until an operator has looked.
    """


def ignore_event(_event: str, /, **_details: Any) -> None:
    """Ignore an event."""


class MigrationChannel:
    """The messages of one hand-over over a link.

    Between two of them it is a sink for the stream.

    Attributes:
        link: The connection to the peer.
        handover: The state of this side.
    """

    is_regular_file = False

    def __init__(self, link: Link, rules: Mapping[Stage, StateRule]) -> None:
        self.link = link
        self.handover = HandOver(rules)

    @property
    def on_disconnect(self) -> OnDisconnect:
        """What to do with the copy on this side if the connection drops now."""
        return self.handover.on_disconnect

    def send(self, message: Message, **body: Any) -> None:
        """Send a message.

        OSError if that fails; ``on_disconnect`` then says what to do, should the peer have it.
        """
        stage, before = self.handover.stage, self.link.written
        try:
            self.link.write([self.handover.send(message, **body)])
        except OSError:
            if self.link.written == before:
                self.handover.undo_send(stage)
            raise

    def receive(self) -> dict[str, Any]:
        """Return the body of the next message.

        Raises:
            RequestError: The peer aborts, with its reason.
            OutcomeUnknown: The peer answers INDETERMINATE, with its reason.
            OSError: The connection failed.
            StreamError: The peer breaks the protocol.
        """
        offset = self.handover.received_bytes
        message, length = decode_header(self.link.read(HEADER.size), offset)
        body = self.handover.receive(message, self.link.read(length))
        reason = str(body.get("why", "no reason given"))
        reason = "".join(c if c.isprintable() else "?" for c in reason)
        if message is Message.ABORT:
            raise RequestError(f"{self.link.name}: {reason}")
        if message is Message.INDETERMINATE:
            raise OutcomeUnknown(f"{self.link.name}: {reason}", op="migrate")
        return body

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Write a part of the stream.

        RequestError, with the peer's reason, if it aborts; OSError.
        """
        if self.link.is_readable():
            self._raise_reason()
        try:
            self.link.write(buffers)
        except OSError:
            with contextlib.suppress(OSError, StreamError):  # then the failed write says enough
                if self.link.is_readable(_LAST_MESSAGE_TIMEOUT):
                    self._raise_reason()
            raise

    def _raise_reason(self) -> None:
        """Raise the peer's reason for an ABORT during the stream.

        It may send nothing else.
        """
        offset = self.handover.received_bytes
        self.receive()
        raise OutOfOrder("the peer sent READY before the end of the stream", offset=offset)
