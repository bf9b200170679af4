"""The save helper's protocol, held against conversations that stock programs had (tests/vectors/conversations.py)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import lab
from xenpv.errors import RequestError
from xenpv.save_helper import protocol
from xenpv.save_helper.protocol import Level, Message, Restore, Save, decode_messages, parse_arguments

VECTORS = Path(__file__).parent.parent / "vectors"
XENS = [version.xen for version in lab.SUPPORTED]


def conversations(xen: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((VECTORS / f"helper-{xen}.json").read_text())
    return found


def said(conversation: dict[str, Any]) -> list[tuple[Message, tuple[int | str, ...]]]:
    return list(decode_messages(bytes.fromhex(conversation["said"])))


@pytest.fixture(params=XENS)
def recorded(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return conversations(request.param)


def test_messages_of_the_stock_helper_round_trip(recorded: dict[str, dict[str, Any]]) -> None:
    for conversation in recorded.values():
        again = b"".join(protocol.encode(kind, *values) for kind, values in said(conversation))
        assert again.hex() == conversation["said"]


def test_replies_of_libxl_match_answered_messages(recorded: dict[str, dict[str, Any]]) -> None:
    for conversation in recorded.values():
        heard = bytes.fromhex(conversation["heard"])
        asked = [kind for kind, _ in said(conversation) if kind in protocol.ANSWERED]
        assert len(heard) == protocol.REPLY_SIZE * len(asked)
        answers = {kind: protocol.decode_reply(heard[4 * at : 4 * at + 4]) for at, kind in enumerate(asked)}
        assert answers.pop(Message.COMPLETE) == 0
        assert answers.pop(Message.SUSPEND, 1) == 1, "libxl's answer to a guest that refused, too: who asks has to look"
        assert answers.pop(Message.STATIC_DATA_DONE, 0) == 0
        assert not answers


def test_parse_arguments_reads_libxls_own(recorded: dict[str, dict[str, Any]]) -> None:
    for name, conversation in recorded.items():
        request = parse_arguments(conversation["arguments"])
        assert isinstance(request, Restore if "restore)" in name else Save)
        if isinstance(request, Save):
            assert (request.live, request.debug) == (name.startswith("migrate"), False)
        else:
            assert (request.store_port, request.console_port) == (1, 2)
            assert (request.store_domid, request.console_domid) == (0, 0)
        assert request.fd > 2
        assert 0 < request.domid < 20


def test_messages_of_the_stock_helper_end_with_complete(recorded: dict[str, dict[str, Any]]) -> None:
    """What the answers and the last message are is what libxl goes by: so ours must be the same."""
    for name, conversation in recorded.items():
        kinds = [kind for kind, _ in said(conversation) if kind not in (Message.LOG, Message.PROGRESS)]
        complete = dict(said(conversation))[Message.COMPLETE]
        assert conversation["status"] == 0, "a failure is told, not died of"
        if name.endswith("(restore)"):
            mfns = dict(said(conversation))[Message.RESTORE_RESULTS]
            assert kinds[-2:] == [Message.RESTORE_RESULTS, Message.COMPLETE]
            assert (mfns == (0, 0)) == (complete[0] == -1)
        elif complete[0] == 0:
            assert kinds == [Message.SUSPEND, Message.COMPLETE]
    errnos = {name: dict(said(c))[Message.COMPLETE] for name, c in recorded.items()}
    assert errnos["save (save)"] == errnos["restore (restore)"] == (0, 0)
    assert errnos["save to a full disk (save)"] == (-1, 28)
    assert errnos["save, refused by the guest (save)"][0] == -1


def test_encode_log_has_the_stock_helpers_form() -> None:
    assert list(decode_messages(protocol.encode_log(Level.ERROR, "dom5: no"))) == [
        (Message.LOG, (8, protocol.NO_ERRNO, "xenpv", "dom5: no")),
    ]
    assert list(decode_messages(protocol.encode_complete())) == [(Message.COMPLETE, (0, 0))]
    assert list(decode_messages(protocol.encode_complete(28))) == [(Message.COMPLETE, (-1, 28))]


def test_encode_log_any_text_fits() -> None:
    ((_, (_, _, _, text)),) = decode_messages(protocol.encode_log(Level.INFO, "a\0b\ud800" + "é" * 100_000))
    assert isinstance(text, str)
    assert text.startswith("a?b?é")
    assert text.endswith("é...")
    assert 50_000 < len(text.encode()) < 65_000


SAVE = ["--save-domain", "14", "11", "1", "0", "136", "0"]
RESTORE = ["--restore-domain", "12", "-1", "2", "1", "0", "2", "0", "768", "0"]


def changed(argv: list[str], at: int, value: str) -> list[str]:
    return [*argv[:at], value, *argv[at + 1 :]]


def test_parse_arguments_reads_live_and_debug() -> None:
    assert parse_arguments(changed(SAVE, 4, "1")) == Save(14, 1, live=True, debug=False)
    assert parse_arguments(changed(SAVE, 4, "3")) == Save(14, 1, live=True, debug=True)
    assert parse_arguments(RESTORE) == Restore(12, 2, 1, 0, 2, 0)


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (changed(SAVE, 6, "1"), "Remus"),
        (changed(RESTORE, 9, "2"), "COLO"),
        (changed(SAVE, 6, "7"), "a stream of type 7"),
        (changed(SAVE, 4, "4"), "flags 0x4"),
        (changed(SAVE, 5, "128"), "callbacks 0x80"),  # nobody would suspend the guest
        (changed(SAVE, 5, "1160"), "callbacks 0x488"),
        (changed(RESTORE, 8, "256"), "4.13 or older"),
        (changed(RESTORE, 8, "1792"), "callbacks 0x700"),
        (SAVE[:-1], "6 numbers"),
        ([*SAVE, "0"], "6 numbers"),
        (RESTORE[:-1], "9 numbers"),
        (changed(SAVE, 3, "x"), "6 numbers"),
        (changed(SAVE, 1, "-1"), "6 numbers"),
        (changed(SAVE, 3, "4294967296"), "6 numbers"),
        (["--help"], "libxl runs this program"),
        ([], "no arguments"),
    ],
)
def test_parse_arguments_unknown_request_is_refused(argv: list[str], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        parse_arguments(argv)


def test_decode_messages_invalid_recording_is_refused() -> None:
    good = protocol.encode_log(Level.INFO, "words") + protocol.encode_complete(5)
    for cut in range(1, len(good)):
        if cut != len(protocol.encode_log(Level.INFO, "words")):
            with pytest.raises(ValueError, match="message at"):
                list(decode_messages(good[:cut]))
    for _ in range(200):
        noise = bytearray(good)
        noise[int.from_bytes(os.urandom(2), "little") % len(good)] ^= 1 << os.urandom(1)[0] % 8
        try:
            list(decode_messages(bytes(noise)))
        except ValueError as e:
            assert "message at" in str(e)  # noqa: PT017 - it may be fine, too
