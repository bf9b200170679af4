"""Where a stream goes, as its writers see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from xenpv.stream.fields import Buffer


class Sink(Protocol):
    """Takes the bytes of a stream: a file, a pipe, a connection to another host.

    Attributes:
        is_regular_file: Whether writes cannot hang, so that a background thread may make them. A write that may hang
            belongs into the main thread, where signals interrupt it.
    """

    @property
    def is_regular_file(self) -> bool:
        """Whether the bytes go to a regular file, where no write can hang."""

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, in order.

        On return the caller may reuse them. Raises OSError.
        """
