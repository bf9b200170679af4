"""Every rule of the stream: broken in a stream that is otherwise sound, it is named, where it is broken, and alone."""

from __future__ import annotations

import pytest

from tests.support.stream_breaches import BREACHES, Breach, sound_stream
from tests.support.stream_reading import one_chunk, random_chunks, read
from xenpv.findings import Rule, Severity
from xenpv.stream import rules

EACH = pytest.mark.parametrize("breach", BREACHES, ids=lambda b: f"{b.rule.name}:{b.id}")


def offset_of(breach: Breach) -> int:
    stream = breach.stream()
    try:
        return stream.offset(breach.piece, breach.nth)
    except IndexError:  # what is missing would have been at the end
        return len(bytes(stream))


@EACH
def test_reader_breach_raises_its_error_at_the_record(breach: Breach) -> None:
    reading = read(one_chunk(bytes(breach.stream())))
    if breach.error is None:
        assert breach.rule.severity is Severity.WARNING
        assert reading.error is None
        assert reading.done
        return
    assert type(reading.error) is breach.error
    assert reading.error.offset == offset_of(breach)
    assert reading.error.record == breach.reported_record
    assert f"{reading.error.offset:#x}" in str(reading.error)
    assert breach.reported_record in str(reading.error)


@EACH
def test_reader_with_handler_reports_the_breach_and_goes_on(breach: Breach) -> None:
    stream = breach.stream()
    reading = read(one_chunk(bytes(stream)), collect=True)
    assert reading.rules == {breach.rule}, [str(f) for f in reading.breaches]
    first = reading.breaches[0]
    assert first.offset == offset_of(breach)
    assert first.record == breach.reported_record
    assert first.message
    if breach.fatal:
        assert type(reading.error) is breach.error
        assert not reading.done
        return
    assert reading.error is None
    assert reading.done
    assert reading.trailing == 0
    assert read(random_chunks(bytes(stream), 1), collect=True).breaches == reading.breaches


@EACH
def test_reader_with_handler_reads_the_records_around_a_breach(breach: Breach) -> None:
    """Beside a fault that is not fatal, every record comes out but, at most, the faulty one."""
    if breach.fatal:
        return
    stream = breach.stream()
    read_names = [
        n for n in read(one_chunk(bytes(stream)), collect=True).names if not n.endswith(("envelope", "section"))
    ]
    written = [piece.name for piece in stream if not piece.name.startswith(("xl", "libvirt", "xenopsd"))]
    if read_names != written:
        del written[stream.find(breach.piece, breach.nth) - (len(stream) - len(written))]
        assert read_names == written


@pytest.mark.parametrize("base", sorted({breach.base for breach in BREACHES} - {"big-endian", "remus"}))
def test_reader_sound_stream_breaks_no_rule(base: str) -> None:
    reading = read(one_chunk(bytes(sound_stream(base))), collect=True)
    assert reading.breaches == []
    assert reading.done


def test_reader_trailing_bytes_are_counted() -> None:
    """TRAILING is the caller's to report: whether bytes follow is known only where the input ends."""
    reading = read([bytes(sound_stream("libxc")), b"more"], collect=True)
    assert reading.breaches == []
    assert reading.trailing == 4


def test_breaches_cover_every_rule() -> None:
    named = {value for value in vars(rules).values() if isinstance(value, Rule)}
    elsewhere = {rules.TRAILING, rules.LEGACY}  # above, and in test_legacy.py
    elsewhere |= {rules.SEAL, rules.SEAL_UNCHECKED, rules.SEAL_COVERAGE}  # test_seal.py
    # A reader passes configurations on; tests/verify/test_config.py breaks their rules.
    elsewhere |= {rules.CONFIG_SYNTAX, rules.CONFIG_TYPE, rules.CONFIG_UUID, rules.CONFIG_LIMITS, rules.CONFIG_IGNORED}
    assert named - {breach.rule for breach in BREACHES} - elsewhere == set()


def test_breaches_raise_unless_warnings() -> None:
    assert all((breach.error is None) == (breach.rule.severity is Severity.WARNING) for breach in BREACHES)


def test_rules_have_sources() -> None:
    for rule in {breach.rule for breach in BREACHES}:
        assert rule.text
        assert rule.source
        assert rule.name == rule.name.lower().replace(" ", "-")
