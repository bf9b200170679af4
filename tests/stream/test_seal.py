"""The seal: each change of a sealed stream is noticed; stock's rules still hold for it.

Rule: docs/reference/records.md, XENPV_SEAL.
"""

from __future__ import annotations

import builtins
import os
import random
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.restoring import restore_stream
from tests.support.saved_files import piped, verify_file_and_pipe
from tests.support.sealing import Batches, count_unnoticed_flips, plain_file, read_events, sealed_file
from xenpv.errors import RequestError, SealBroken, StreamError
from xenpv.io.seal_key import read_seal_key
from xenpv.io.stream_input import Input
from xenpv.source.saved import SavedDomain
from xenpv.stream import rules
from xenpv.stream.framing import RECORD_HEADER, Record
from xenpv.stream.record_order import OPTIONAL, RecordType
from xenpv.stream.records import Seal, SealPart
from xenpv.stream.seal import BATCHES_MAX, Algorithm, Sealer
from xenpv.verify.stream import Report, verify

KEY = b"0123456789abcdef"
PLAIN = plain_file()
SEALED = sealed_file(PLAIN)
KEYED = sealed_file(PLAIN, key=KEY)


def verify_bytes(data: bytes, **options: Any) -> Report:
    fd = os.memfd_create("stream")
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return verify(Input(fd, "stream"), **options)


def libxc_records(data: bytes) -> list[tuple[int, int, int]]:
    """Type, offset and size of each libxc record, headers and padding included."""
    offset = data.index(b"\xff" * 8) + 24 + 16
    found: list[tuple[int, int, int]] = []
    while not found or found[-1][0] != RecordType.END:
        kind, length = RECORD_HEADER.unpack(data[offset:])
        size = 8 + -(-length // 8) * 8
        found.append((kind, offset, size))
        offset += size
    return found


def test_seal_type_is_optional_to_other_receivers() -> None:
    assert RecordType.XENPV_SEAL & OPTIONAL
    seals = [event for event in read_events(SEALED) if isinstance(event, Seal)]
    assert [seal.part for seal in seals] == [SealPart.BEGIN, SealPart.END]


@pytest.mark.parametrize("key", [None, KEY], ids=["unkeyed", "keyed"])
def test_flips_of_page_content_are_named_with_batch_and_pfn(key: bytes | None) -> None:
    assert count_unnoticed_flips(KEYED if key else SEALED, 300, key=key) == 0


def test_flips_of_content_without_seal_are_unnoticed_as_before() -> None:
    assert count_unnoticed_flips(PLAIN, 20) == 20


def test_flips_anywhere_before_the_end_are_noticed() -> None:
    end = libxc_records(SEALED)[-1][1]
    chance = random.Random(5)
    for _ in range(300):
        data = bytearray(SEALED)
        at = chance.randrange(end)
        data[at] ^= 1 << chance.randrange(8)
        with suppress(StreamError):  # no stream at all
            assert verify_bytes(bytes(data), require_seal=True).findings.errors, hex(at)


@pytest.mark.parametrize("change", ["remove", "repeat", "swap", "insert"])
def test_records_removed_added_or_moved_are_noticed(change: str) -> None:
    _begin, *middle, _seal, _end = libxc_records(SEALED)
    for index in range(len(middle)):
        kind, offset, size = middle[index]
        record = SEALED[offset : offset + size]
        after = offset + size
        match change:
            case "remove":
                data = SEALED[:offset] + SEALED[after:]
            case "repeat":
                data = SEALED[:after] + record + SEALED[after:]
            case "insert":
                unknown = RECORD_HEADER.pack(type=OPTIONAL | 0x77, length=0)
                data = SEALED[:offset] + unknown + SEALED[offset:]
            case _:
                if index + 1 == len(middle):
                    continue
                _, _, next_size = middle[index + 1]
                following = SEALED[after : after + next_size]
                if following == record:
                    continue
                data = SEALED[:offset] + following + record + SEALED[after + next_size :]
        report = verify_bytes(data)
        assert rules.SEAL in report.findings.count, (kind, hex(offset))


def test_one_changed_batch_breaks_no_other(tmp_path: Path) -> None:
    offset, batch, pfn = Batches.of(SEALED).pages[100]
    data = bytearray(SEALED)
    data[offset + 7] ^= 4
    for result in verify_file_and_pipe(tmp_path, bytes(data)):
        (finding,) = result.of_rule("seal")
        assert finding.record == "PAGE_DATA"
        assert f"batch {batch} " in finding.message
    with pytest.raises(SealBroken) as e:
        restore_stream(bytes(data))
    assert e.value.batch == batch
    assert pfn in e.value.pfns
    assert e.value.rule == rules.SEAL.name


@pytest.mark.parametrize("exact", [False, True])
def test_changed_batch_in_a_pipe_is_not_restored(exact: bool) -> None:
    offset, batch, _ = Batches.of(SEALED).pages[-1]
    data = bytearray(SEALED)
    data[offset] ^= 1
    from xenpv.host.model.host import ModelHost  # noqa: PLC0415
    from xenpv.restore.restore import restore_domain  # noqa: PLC0415

    for content, broken in ((SEALED, False), (bytes(data), True)):
        host = ModelHost(1 << 30, seed=4)
        with piped(content) as fd:
            source = Input(os.dup(fd), "pipe", exact=exact)
            with closing(source):
                if not broken:
                    assert restore_domain(host, source).pages
                    continue
                with pytest.raises(SealBroken) as e:
                    restore_domain(host, source)
        assert e.value.batch == batch
        assert not [info for info in host.domains() if info.domid]


def test_sealed_file_restores_and_verifies_as_the_plain_one(tmp_path: Path) -> None:
    for data in (SEALED, KEYED):
        _, restored = restore_stream(data)
        assert restored.pages == restore_stream(PLAIN)[1].pages
        for result in verify_file_and_pipe(tmp_path, data):
            assert "seal" not in result.rules


def test_convert_leaves_out_a_seal_and_makes_the_same_again() -> None:
    assert read_events(sealed_file(SEALED, batch=None)) == read_events(SEALED)
    unsealed = [event for event in read_events(SEALED) if not isinstance(event, Seal)]
    assert all(isinstance(event, Record) or event.name for event in unsealed)


def test_require_seal_of_a_stream_without_one_is_a_finding() -> None:
    for data, key, ok in ((PLAIN, None, False), (SEALED, None, True), (SEALED, KEY, False), (KEYED, KEY, True)):
        report = verify_bytes(data, require_seal=True, seal_key=key)
        assert (rules.SEAL_COVERAGE not in report.findings.count) is ok
        assert report.sealed is ok
    for data in (PLAIN, SEALED):
        with pytest.raises(SealBroken):
            restore_stream(data, seal_key=KEY)
    assert restore_stream(KEYED, seal_key=KEY)[1].pages


def test_require_seal_with_framing_alone_says_that_nothing_was_compared() -> None:
    assert rules.SEAL_COVERAGE in verify_bytes(SEALED, require_seal=True, deep=False).findings.count


def test_keyed_seal_without_its_key_is_a_warning_and_with_another_an_error() -> None:
    report = verify_bytes(KEYED)
    assert rules.SEAL_UNCHECKED in report.findings.count
    assert not report.sealed
    assert rules.SEAL in verify_bytes(KEYED, seal_key=b"another key, also long").findings.count


def test_stream_without_its_seal_records_is_not_taken_for_sealed() -> None:
    data = SEALED
    for kind, offset, size in reversed(libxc_records(SEALED)):
        if kind == RecordType.XENPV_SEAL:
            data = data[:offset] + data[offset + size :]
    assert rules.SEAL not in verify_bytes(data).findings.count
    assert rules.SEAL_COVERAGE in verify_bytes(data, require_seal=True).findings.count


def test_changed_configuration_is_noticed() -> None:
    at = SEALED.index(b'"name"')
    at = SEALED.index(b'"', SEALED.index(b":", at)) + 1
    data = SEALED[:at] + b"Z" + SEALED[at + 1 :]
    assert rules.SEAL in verify_bytes(data).findings.count


def test_many_batches_get_a_seal_now_and_then() -> None:
    data = sealed_file(batch=1)
    parts = [event.part for event in read_events(data) if isinstance(event, Seal)]
    assert parts.count(SealPart.NEXT) == 300 // BATCHES_MAX
    assert count_unnoticed_flips(data, 10) == 0


def test_seal_without_xxhash_is_blake2_and_an_xxh3_one_is_left_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name == "xxhash":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert Sealer().algorithm is Algorithm.BLAKE2B_128
    assert count_unnoticed_flips(sealed_file(PLAIN), 10) == 0
    report = verify_bytes(SEALED, require_seal=True)
    assert rules.SEAL_UNCHECKED in report.findings.count
    assert rules.SEAL_COVERAGE in report.findings.count


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        (b"\x07" + bytes(31), rules.SEAL),
        (b"\x00\0\0\0\x09" + bytes(27), rules.SEAL),
        (b"\x01\0\0\0\x01" + bytes(27), rules.SEAL),
        (bytes(8), rules.RECORD_SIZE),
    ],
    ids=["no part", "no algorithm", "no beginning", "too short"],
)
def test_seal_that_is_none_is_reported(body: bytes, rule: Any) -> None:
    _, offset, _ = libxc_records(PLAIN)[0]
    record = RECORD_HEADER.pack(type=RecordType.XENPV_SEAL, length=len(body)) + body
    assert rule in verify_bytes(PLAIN[:offset] + record * 3 + PLAIN[offset:]).findings.count


def test_key_file_that_others_may_read_or_that_is_short_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(KEY)
    key.chmod(0o640)
    with pytest.raises(RequestError):
        read_seal_key(str(key))
    key.chmod(0o600)
    assert read_seal_key(str(key)) == KEY
    key.write_bytes(KEY[:-1])
    with pytest.raises(RequestError) as e:
        read_seal_key(str(key))
    assert e.value.needed == 16
    with pytest.raises(RequestError):
        read_seal_key("/dev/zero")


def test_looking_into_a_sealed_file_compares_no_pages(tmp_path: Path) -> None:
    # docs/explanation/seal.md: so that a look costs no more than one into any other file.
    data = bytearray(SEALED)
    at, _batch, _pfn = Batches.of(SEALED).pages[20]
    data[at] ^= 1
    (tmp_path / "sealed").write_bytes(data)
    with SavedDomain.open(str(tmp_path / "sealed")) as saved:
        assert saved.seal.algorithm is not None
        assert not saved.seal.checked
    assert rules.SEAL in verify_bytes(bytes(data)).findings.count
