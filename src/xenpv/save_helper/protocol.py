"""What libxl and its save helper say to each other, sans-IO: arguments and messages in and out of bytes.

libxl runs a program for each save, restore and migration, and that program calls back: it writes messages, libxl
answers some of them with one int (xen.git:tools/libs/light/libxl_save_helper.c, libxl_save_callout.c and
libxl_save_msgs_gen.pl). All is in the byte order and the sizes of the machine, and of x86-64 here. Nothing carries a
version: message numbers moved in Xen 4.6, 4.7 and 4.14, arguments never since 4.7. What libxl offers, one bit for each
message, tells a libxl before 4.14 at a restore (see ``Restore``); a save looks the same to both, so there the helper
asks Xen which version it is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from xenpv.errors import RequestError

OLDEST = 4, 14  # Xen whose libxl numbers its messages so; 4.22 still does
REPLY = 4  # bytes of an answer
NO_ERRNO = 0xFFFF_FFFF

_LENGTH = struct.Struct("<H")
_TEXT_MAX = 0xF000  # bytes of one text: a message is shorter than 64 KiB, and has at most one long one
_INT_MAX = 0x7FFF_FFFF


class Message(IntEnum):
    """What a helper may say. The number is also that of the message's bit in what libxl offers."""

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
    """How loud a LOG is (xen.git:tools/include/xentoollog.h). xl prints PROGRESS and above, with -v more."""

    DEBUG = 1
    VERBOSE = 2
    DETAIL = 3
    PROGRESS = 4
    INFO = 5
    NOTICE = 6
    WARN = 7
    ERROR = 8
    CRITICAL = 9


# What each carries: an array-less struct format, "s" for a string (its length with the NUL in 32 bits, then that).
_CARRIES = {
    Message.LOG: "IIss",  # level, errno, context, text
    Message.PROGRESS: "ssQQ",  # context, what is done, done, in all
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
_SAVES = sum(1 << m for m in range(Message.SUSPEND, Message.STATIC_DATA_DONE))
_RESTORES = sum(1 << m for m in (*range(Message.SUSPEND, Message.SWITCH_QEMU_LOGDIRTY), 8, 9))
_STREAMS = ("plain", "Remus", "COLO")


class Save(NamedTuple):
    """``--save-domain``: write domain ``domid`` to descriptor ``fd``; ``debug`` asks to send a live one twice."""

    fd: int
    domid: int
    live: bool
    debug: bool


class Restore(NamedTuple):
    """``--restore-domain``: read from descriptor ``fd`` into ``domid``, which is there and has no memory.

    The ports are its event channels, the domains those at their other ends.
    """

    fd: int
    domid: int
    store_port: int
    store_domid: int
    console_port: int
    console_domid: int


def arguments(argv: Sequence[str]) -> Save | Restore:
    """What libxl asks for: the arguments without the program's name. RequestError in words."""
    if argv and argv[0] == "--save-domain":
        fd, _, domid, flags, offers, stream = _numbers(argv[1:], 6)
        _plain(stream)
        _known(offers, _SAVES, needs=1 << Message.SUSPEND)
        if flags & ~(_LIVE | _DEBUG):
            raise RequestError(f"flags {flags:#x} ask for something that is not known here")
        return Save(fd, domid, bool(flags & _LIVE), bool(flags & _DEBUG))
    if argv and argv[0] == "--restore-domain":
        fd, _, domid, store_port, store_domid, console_port, console_domid, offers, stream = _numbers(argv[1:], 9)
        _plain(stream)
        if offers & (1 << 8 | 1 << 9) == 1 << 8:  # where RESTORE_RESULTS was before there was STATIC_DATA_DONE
            raise RequestError("this libxl is of Xen 4.13 or older; 4.14 and newer are supported")
        _known(offers, _RESTORES, needs=1 << Message.STATIC_DATA_DONE | 1 << Message.RESTORE_RESULTS)
        return Restore(fd, domid, store_port, store_domid, console_port, console_domid)
    raise RequestError(
        "libxl runs this program: LIBXL_SAVE_HELPER=/path/to/xenpv-save-helper xl save|restore|migrate "
        f"(not with {' '.join(argv[:1]) or 'no arguments'})"
    )


def _numbers(texts: Sequence[str], count: int) -> list[int]:
    try:
        numbers = [int(text) for text in texts]
    except ValueError:
        numbers = []
    if len(numbers) != count or min(numbers[2:]) < 0 or numbers[0] < 0 or max(numbers) > 0xFFFF_FFFF:
        what = f"libxl gave {' '.join(texts) or 'nothing'} where {count} numbers were expected"
        raise RequestError(f"{what}: it is not of Xen 4.14 to 4.22")
    return numbers


def _plain(stream: int) -> None:
    if stream:
        what = _STREAMS[stream] if stream < len(_STREAMS) else f"a stream of type {stream}"
        raise RequestError(f"{what} is not supported, only a save, restore or migration once; unset LIBXL_SAVE_HELPER")


def _known(offers: int, known: int, *, needs: int) -> None:
    if offers & ~known or offers & needs != needs:
        raise RequestError(f"libxl offers callbacks {offers:#x}, which is not what it does from Xen 4.14 to 4.22")


# --- messages --------------------------------------------------------------------------------------------------------


def message(kind: Message, *values: int | str) -> bytes:
    """A message as it goes over the pipe. What is too long of a text is left out, at its end."""
    body = bytearray(_LENGTH.pack(kind))
    for code, value in zip(_CARRIES[kind], values, strict=True):
        if isinstance(value, str):
            assert code == "s"
            text = value.replace("\0", "?").encode(errors="replace")
            if len(text) > _TEXT_MAX:
                text = text[: _TEXT_MAX - 3].decode(errors="ignore").encode() + b"..."
            body += struct.pack("<I", len(text) + 1) + text + b"\0"
        else:
            body += struct.pack(f"<{code}", value)
    return _LENGTH.pack(len(body)) + body


def log(level: Level, text: str, *, errno: int | None = None) -> bytes:
    """Words for xl's standard error, as "xenpv: error: words", or with ": what errno means" behind them."""
    return message(Message.LOG, level, NO_ERRNO if errno is None else errno, "xenpv", text)


def complete(errno: int | None = None) -> bytes:
    """All is done; or, with an errno, nothing will come of it. libxl answers, and waits for the program to end."""
    return message(Message.COMPLETE, 0 if errno is None else -1, min(errno or 0, _INT_MAX))


def reply(answer: bytes) -> int:
    """The int of an answer."""
    return int(struct.unpack("<i", answer)[0])


def messages(data: bytes) -> Iterator[tuple[Message, tuple[int | str, ...]]]:
    """What a helper said, for who wants to look at a recording. ValueError where it is none of this protocol's."""
    at = 0
    while at < len(data):
        body = data[at + 2 : at + 2 + int.from_bytes(data[at : at + 2], "little")]
        if len(body) < 2 or len(body) != int.from_bytes(data[at : at + 2], "little"):
            raise ValueError(f"the message at {at:#x} is cut off")
        try:
            kind = Message(int.from_bytes(body[:2], "little"))
            yield kind, tuple(_values(kind, body[2:]))
        except (struct.error, ValueError, UnicodeDecodeError) as e:
            raise ValueError(f"the message at {at:#x} is not one of the save helper's: {e}") from e
        at += 2 + len(body)


def _values(kind: Message, body: bytes) -> Iterator[int | str]:
    at = 0
    for code in _CARRIES[kind]:
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
