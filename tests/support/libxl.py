"""The other end of the save helper's pipes: what libxl does there, in a thread."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from xenpv.save_helper.protocol import ANSWERED, Message, decode_messages

Answer = int | None | Callable[[], int | None]
"""What is answered; None: libxl dies instead."""


class FakeLibxl:
    """Answers as ``answers`` says, else as libxl does when all goes well; keeps what it is told in ``told``."""

    def __init__(self, answers: dict[Message, Answer] | None = None) -> None:
        self.told: list[tuple[Message, tuple[Any, ...]]] = []
        self._answers: dict[Message, Answer] = {Message.SUSPEND: 1, **(answers or {})}
        self._listen, self.helper_says = os.pipe()
        self.helper_hears, self._speak = os.pipe()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        for fd in (self.helper_says, self.helper_hears):
            os.close(fd)
        self._thread.join()

    def _run(self) -> None:
        with os.fdopen(self._listen, "rb", buffering=0) as said, os.fdopen(self._speak, "wb", buffering=0) as speak:
            while head := said.read(2):
                body = b""
                while len(body) < int.from_bytes(head, "little"):
                    body += said.read(int.from_bytes(head, "little") - len(body)) or b""
                ((kind, values),) = decode_messages(head + body)
                self.told.append((kind, values))
                answer = self._answers.get(kind, 0)
                if callable(answer):
                    answer = answer()
                if answer is None:
                    return
                if kind in ANSWERED:
                    speak.write(struct.pack("<i", answer))

    def values(self, kind: Message) -> list[tuple[Any, ...]]:
        return [values for told, values in self.told if told is kind]

    @property
    def kinds(self) -> list[Message]:
        return [kind for kind, _ in self.told if kind not in (Message.LOG, Message.PROGRESS)]

    @property
    def errors(self) -> list[str]:
        """What it prints as errors."""
        return [text for level, _, context, text in self.values(Message.LOG) if level == 8 and context == "xenpv"]

    @property
    def completed(self) -> tuple[int, int]:
        ((status, errno),) = self.values(Message.COMPLETE)
        return status, errno
