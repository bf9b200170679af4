"""The protocol between libxl and its save helper: arguments, messages. No I/O.

libxl runs a program for each save, restore and migration. The program writes messages, and libxl answers some of them
with one int. Everything is in the byte order and the sizes of x86-64. There is no version: message numbers changed
in Xen 4.6, 4.7 and 4.14, arguments have not since 4.7. At a restore the callbacks that libxl offers, a bit per message,
give away a libxl before 4.14. At a save they do not, so the helper asks Xen for its version.

Source: xen.git:tools/libs/light/libxl_save_helper.c, libxl_save_callout.c, libxl_save_msgs_gen.pl
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from xenpv.errors import RequestError

OLDEST_XEN = 4, 14  # its libxl was the first with these message numbers; 4.22 still has them
REPLY_SIZE = 4  # bytes of an answer
NO_ERRNO = 0xFFFF_FFFF

_LENGTH = struct.Struct("<H")
_TEXT_MAX = 0xF000  # bytes of one text: a message is shorter than 64 KiB, and has at most one long one
_INT_MAX = 0x7FFF_FFFF


class Message(IntEnum):
    """The messages of a helper.

    The number is also that of the message's bit among the offered callbacks.
    """

    LOG = 1
    PROGRESS = 2
    SUSPEND = 3
    POSTCOPY = 4
    CHECKPOINT = 5
    WAIT_CHECKPOINT = 6
    SWITCH_QEMU_LOGDIRTY = 7
    STATIC_DATA_DONE = 8
    RESTORE_RESULTS = 9
    COMPLETE = 10


class Level(IntEnum):
    """The level of a LOG (xen.git:tools/include/xentoollog.h).

    xl prints PROGRESS and above, with -v more.
    """

    DEBUG = 1
    VERBOSE = 2
    DETAIL = 3
    PROGRESS = 4
    INFO = 5
    NOTICE = 6
    WARN = 7
    ERROR = 8
    CRITICAL = 9


# The format of each body: codes of struct, and "s" for a string (its length with the NUL in 32 bits, then the bytes).
_BODY_FORMATS = {
    Message.LOG: "IIss",  # level, errno, context, text
    Message.PROGRESS: "ssQQ",  # context, operation, done, total
    Message.SUSPEND: "",
    Message.POSTCOPY: "",
    Message.CHECKPOINT: "",
    Message.WAIT_CHECKPOINT: "",
    Message.SWITCH_QEMU_LOGDIRTY: "II",  # domid, on
    Message.STATIC_DATA_DONE: "I",  # what was missing: CPUID 1, MSR 2
    Message.RESTORE_RESULTS: "QQ",  # mfn of the xenstore ring, of the console ring
    Message.COMPLETE: "ii",  # 0 or -1, errno
}
ANSWERED = frozenset(Message) - {Message.LOG, Message.PROGRESS, Message.RESTORE_RESULTS}

MISSING_CPUID = 1
MISSING_MSR = 2

_LIVE, _DEBUG = 1, 2  # XCFLAGS_*, xen.git:tools/include/xenguest.h
_SAVE_CALLBACKS = sum(1 << m for m in range(Message.SUSPEND, Message.STATIC_DATA_DONE))
_RESTORE_CALLBACKS = sum(1 << m for m in (*range(Message.SUSPEND, Message.SWITCH_QEMU_LOGDIRTY), 8, 9))
_STREAM_TYPES = ("plain", "Remus", "COLO")


class Save(NamedTuple):
    """``--save-domain``: write domain ``domid`` to descriptor ``fd``.

    ``debug``: send all pages of a live one twice.
    """

    fd: int
    domid: int
    live: bool
    debug: bool


class Restore(NamedTuple):
    """``--restore-domain``: read from descriptor ``fd`` into ``domid``.

    The domain exists and has no memory.

    The ports are its event channels; the other domids are those at their other ends.
    """

    fd: int
    domid: int
    store_port: int
    store_domid: int
    console_port: int
    console_domid: int


def parse_arguments(argv: Sequence[str]) -> Save | Restore:
    """Return libxl's request. RequestError if it is not supported.

    Args:
        argv: The arguments without the program's name.
    """
    if argv and argv[0] == "--save-domain":
        fd, _, domid, flags, callbacks, stream = _parse_numbers(argv[1:], 6)
        _check_stream_type(stream)
        _check_callbacks(callbacks, _SAVE_CALLBACKS, needs=1 << Message.SUSPEND)
        if flags & ~(_LIVE | _DEBUG):
            raise RequestError(f"flags {flags:#x} ask for something that is not known here")
        return Save(fd, domid, bool(flags & _LIVE), bool(flags & _DEBUG))
    if argv and argv[0] == "--restore-domain":
        fd, _, domid, store_port, store_domid, console_port, console_domid, callbacks, stream = _parse_numbers(
            argv[1:], 9
        )
        _check_stream_type(stream)
        if callbacks & (1 << 8 | 1 << 9) == 1 << 8:  # where RESTORE_RESULTS was before there was STATIC_DATA_DONE
            raise RequestError("this libxl is of Xen 4.13 or older; 4.14 and newer are supported")
        _check_callbacks(
            callbacks, _RESTORE_CALLBACKS, needs=1 << Message.STATIC_DATA_DONE | 1 << Message.RESTORE_RESULTS
        )
        return Restore(fd, domid, store_port, store_domid, console_port, console_domid)
    raise RequestError(
        "libxl runs this program: LIBXL_SAVE_HELPER=/path/to/xenpv-save-helper xl save|restore|migrate "
        f"(not with {' '.join(argv[:1]) or 'no arguments'})"
    )


def _parse_numbers(texts: Sequence[str], count: int) -> list[int]:
    try:
        numbers = [int(text) for text in texts]
    except ValueError:
        numbers = []
    if len(numbers) != count or min(numbers[2:]) < 0 or numbers[0] < 0 or max(numbers) > 0xFFFF_FFFF:
        problem = f"libxl gave {' '.join(texts) or 'nothing'} where {count} numbers were expected"
        raise RequestError(f"{problem}: it is not of Xen 4.14 to 4.22")
    return numbers


def _check_stream_type(stream: int) -> None:
    if stream:
        stream_type = _STREAM_TYPES[stream] if stream < len(_STREAM_TYPES) else f"a stream of type {stream}"
        raise RequestError(
            f"{stream_type} is not supported, only a save, restore or migration once; unset LIBXL_SAVE_HELPER"
        )


def _check_callbacks(callbacks: int, known: int, *, needs: int) -> None:
    if callbacks & ~known or callbacks & needs != needs:
        raise RequestError(f"libxl offers callbacks {callbacks:#x}, which is not what it does from Xen 4.14 to 4.22")


# --- messages --------------------------------------------------------------------------------------------------------


def encode(kind: Message, *values: int | str) -> bytes:
    """Return the bytes of a message. Text that is too long is cut."""
    body = bytearray(_LENGTH.pack(kind))
    for code, value in zip(_BODY_FORMATS[kind], values, strict=True):
        if isinstance(value, str):
            assert code == "s"
            text = value.replace("\0", "?").encode(errors="replace")
            if len(text) > _TEXT_MAX:
                text = text[: _TEXT_MAX - 3].decode(errors="ignore").encode() + b"..."
            body += struct.pack("<I", len(text) + 1) + text + b"\0"
        else:
            body += struct.pack(f"<{code}", value)
    return _LENGTH.pack(len(body)) + body


def encode_log(level: Level, text: str, *, errno: int | None = None) -> bytes:
    """Return a LOG, which xl prints as "xenpv: error: TEXT".

    With an errno, its meaning follows.
    """
    return encode(Message.LOG, level, NO_ERRNO if errno is None else errno, "xenpv", text)


def encode_complete(errno: int | None = None) -> bytes:
    """Return a COMPLETE: success or, with an errno, failure.

    libxl answers, and waits for the program to end.
    """
    return encode(Message.COMPLETE, 0 if errno is None else -1, min(errno or 0, _INT_MAX))


def decode_reply(answer: bytes) -> int:
    """Return the int in an answer."""
    return int(struct.unpack("<i", answer)[0])


def decode_messages(data: bytes) -> Iterator[tuple[Message, tuple[int | str, ...]]]:
    """Yield the messages in a recording of what a helper wrote.

    ValueError where it breaks the protocol.
    """
    at = 0
    while at < len(data):
        body = data[at + 2 : at + 2 + int.from_bytes(data[at : at + 2], "little")]
        if len(body) < 2 or len(body) != int.from_bytes(data[at : at + 2], "little"):
            raise ValueError(f"the message at {at:#x} is cut off")
        try:
            kind = Message(int.from_bytes(body[:2], "little"))
            yield kind, tuple(_decode_values(kind, body[2:]))
        except (struct.error, ValueError, UnicodeDecodeError) as e:
            raise ValueError(f"the message at {at:#x} is not one of the save helper's: {e}") from e
        at += 2 + len(body)


def _decode_values(kind: Message, body: bytes) -> Iterator[int | str]:
    at = 0
    for code in _BODY_FORMATS[kind]:
        if code == "s":
            (length,) = struct.unpack_from("<I", body, at)
            text = body[at + 4 : at + 4 + length]
            if not length or len(text) != length or text[-1]:
                raise ValueError("a text has no end")
            yield text[:-1].decode()
            at += 4 + length
        else:
            yield struct.unpack_from(f"<{code}", body, at)[0]
            at += struct.calcsize(f"<{code}")
    if at != len(body):
        raise ValueError(f"{len(body) - at} bytes are left")
