"""Verifies streams from a file and from a pipe."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.writers.build import pv_domain
from tests.support.writers.stream import PAGE, WITH_DATA, Stream
from xenpv.findings import Finding
from xenpv.io.stream_input import Input
from xenpv.verify.stream import Report, verify


@dataclass
class VerifyResult:
    """A report, and short names for what tests ask of it."""

    report: Report

    @property
    def findings(self) -> list[Finding]:
        return list(self.report.findings)

    @property
    def rules(self) -> set[str]:
        return {rule.name for rule in self.report.findings.count}

    def of_rule(self, rule: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.rule.name == rule]

    def __str__(self) -> str:
        return "\n".join(str(finding) for finding in self.findings) or "nothing"


def verify_file(source: Path | str | Input, **options: Any) -> VerifyResult:
    """Verify a path or an Input."""
    return VerifyResult(verify(source if isinstance(source, Input) else str(source), **options))


def verify_pipe(data: bytes, **options: Any) -> VerifyResult:
    """Verify a stream that comes out of a pipe."""
    with piped(data) as fd:
        return verify_file(Input(os.dup(fd), "pipe"), **options)


@contextmanager
def piped(data: bytes) -> Iterator[int]:
    """Give the reading end of a pipe into which a thread writes the data."""
    reading, writing = os.pipe()

    def write() -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(writing, view) :]
        except BrokenPipeError:
            pass
        finally:
            os.close(writing)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield reading
    finally:
        os.close(reading)
        writer.join(10)


def page_offsets(stream: Stream) -> dict[int, int]:
    """Return the byte offset of each pfn's content; of a page that is sent again, the last one."""
    offsets: dict[int, int] = {}
    at = 0
    for piece in stream:
        if piece.name == "PAGE_DATA":
            (count,) = struct.unpack_from("<I", piece.data, 8)
            content = at + 16 + count * 8
            for entry in struct.unpack_from(f"<{count}Q", piece.data, 16):
                if entry >> 60 in WITH_DATA:
                    offsets[entry & (1 << 52) - 1] = content
                    content += PAGE
        at += len(piece.data)
    return offsets


def verify_file_and_pipe(tmp_path: Path, data: bytes, **options: Any) -> list[VerifyResult]:
    """Verify a stream from a file, then from a pipe."""
    file = tmp_path / "made.save"
    file.write_bytes(data)
    return [verify_file(file, **options), verify_pipe(data, **options)]


def stream_with_bad_entry() -> tuple[Stream, int]:
    """Return the stream of a domain with a bad entry in its top table, and the byte offset of the entry."""
    domain = pv_domain(vcpus=2)
    domain.table(domain.places.top)[300] = domain.entries << 12 | 1
    stream = domain.to_stream(batch=16)
    return stream, page_offsets(stream)[domain.places.top] + 300 * 8
