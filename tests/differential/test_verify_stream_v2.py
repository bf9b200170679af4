"""Our verify-stream-v2 beside Xen's own, on the same streams.

The original from Debian's xen-utils, unpacked by the lab.
"""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

import lab
from tests.support.stream_breaches import BREACHES, sound_stream
from tests.support.writers.stream import OPTIONAL, Wire
from tests.vectors.make import DEMO
from xenpv.cli.verify_stream_v2 import main
from xenpv.findings import Severity
from xenpv.stream import rules

BAD = 1
FORMATS = {"libxc": "libxc", "libxl": "libxl", "xl": "xl", "v2": "libxc"}


def both(original: lab.PeerTools, path: Path, form: str) -> tuple[int, int]:
    """Exit status of the original, and of ours."""
    theirs = original.run("verify-stream-v2", "-q", "-f", form, "-i", str(path)).returncode
    return theirs, main(["-q", "-f", form, "-i", str(path)])


def test_verify_stream_v2_real_file_passes_in_both(original: lab.PeerTools, tmp_path: Path) -> None:
    path = tmp_path / "real.save"
    path.write_bytes(lzma.decompress(DEMO.read_bytes()))
    assert both(original, path, "xl") == (0, 0)


@pytest.mark.parametrize("base", ["libxc", "libxl", "xl", "v2"])
def test_verify_stream_v2_sound_streams_pass_in_both(original: lab.PeerTools, base: str, tmp_path: Path) -> None:
    path = tmp_path / "sound"
    path.write_bytes(bytes(sound_stream(base)))
    assert both(original, path, FORMATS[base]) == (0, 0)


def test_verify_stream_v2_rejects_what_the_original_rejects(original: lab.PeerTools, tmp_path: Path) -> None:
    """Of all our broken streams; the original's own false rejects are apart, below."""
    path = tmp_path / "broken"
    theirs_alone, ours_alone = [], []
    # The first of each: later ones may be in a record of our own, which the original does not know.
    one_each = {(breach.rule, breach.base): breach for breach in reversed(BREACHES) if breach.base in FORMATS}
    for breach in one_each.values():
        if breach.rule is rules.RECORD_OPTIONAL:  # the original knows no optional records at all
            continue
        path.write_bytes(bytes(breach.stream()))
        theirs, ours = both(original, path, FORMATS[breach.base])
        if theirs and not ours:
            theirs_alone.append(f"{breach.rule.name}: {breach.id}")
        elif ours and not theirs:
            ours_alone.append(breach.rule)
    assert theirs_alone == []
    assert len(set(ours_alone)) >= 8, "the original checks framing only; we find more"
    assert {rules.ORDER, rules.MISSING, rules.PAGE_RANGE} <= set(ours_alone)


def test_verify_stream_v2_optional_records_pass(original: lab.PeerTools, tmp_path: Path) -> None:
    """libxc-migration-stream.pandoc: "The contents of optional records may be ignored during a restore."."""
    path = tmp_path / "optional"
    stream = sound_stream("libxc")
    stream.before("END", Wire().record(OPTIONAL | 0x1234, b"whatever"))
    path.write_bytes(bytes(stream))
    assert both(original, path, "libxc") == (BAD, 0)


def test_verify_stream_v2_emulator_xenstore_data_passes(original: lab.PeerTools, tmp_path: Path) -> None:
    """The original compares a byte with a string, which under Python 3 is never equal."""
    path = tmp_path / "hvm"
    path.write_bytes(bytes(sound_stream("hvm")))
    assert both(original, path, "libxl") == (BAD, 0)


def test_verify_stream_v2_checkpointed_libxl_stream_passes(original: lab.PeerTools, tmp_path: Path) -> None:
    path = tmp_path / "remus"
    path.write_bytes(bytes(sound_stream("remus")))
    assert both(original, path, "libxl") == (BAD, 0)


def test_verify_stream_v2_reserved_and_padding_are_errors(original: lab.PeerTools, tmp_path: Path) -> None:
    """Reserved bits and padding: a restorer must ignore them, a verifier says so."""
    path = tmp_path / "reserved"
    for breach in BREACHES:
        if breach.rule in {rules.RESERVED, rules.PADDING} and breach.base == "libxc":
            assert breach.rule.severity is Severity.WARNING
            path.write_bytes(bytes(breach.stream()))
            assert both(original, path, "libxc")[1] == BAD, breach.id
