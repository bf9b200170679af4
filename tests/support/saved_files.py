"""Puts made streams on disk or into a pipe, and hands back what verify says of them."""

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
class Verdict:
    """What was found. The report in it is closed."""

    report: Report

    @property
    def found(self) -> list[Finding]:
        return list(self.report.findings)

    @property
    def rules(self) -> set[str]:
        return {rule.name for rule in self.report.findings.count}

    def of(self, rule: str) -> list[Finding]:
        return [finding for finding in self.found if finding.rule.name == rule]

    def __str__(self) -> str:
        return "\n".join(str(finding) for finding in self.found) or "nothing"


def judge(source: Path | str | Input, **how: Any) -> Verdict:
    """Verify a file, or what is open."""
    report = verify(source if isinstance(source, Input) else str(source), **how)
    return Verdict(report)


def judge_pipe(data: bytes, **how: Any) -> Verdict:
    """Verify the same out of a pipe."""
    with piped(data) as fd:
        return judge(Input(os.dup(fd), "pipe"), **how)  # closed, every end that reads, or the writer waits for ever


@contextmanager
def piped(data: bytes) -> Iterator[int]:
    """The reading end of a pipe into which a thread writes the data."""
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
    """For each pfn the byte offset at which its content begins, the last one where a page comes again."""
    out: dict[int, int] = {}
    at = 0
    for piece in stream:
        if piece.name == "PAGE_DATA":
            (count,) = struct.unpack_from("<I", piece.data, 8)
            content = at + 16 + count * 8
            for entry in struct.unpack_from(f"<{count}Q", piece.data, 16):
                if entry >> 60 in WITH_DATA:
                    out[entry & (1 << 52) - 1] = content
                    content += PAGE
        at += len(piece.data)
    return out


def both_ways(tmp_path: Path, data: bytes, **how: Any) -> list[Verdict]:
    file = tmp_path / "made.save"
    file.write_bytes(data)
    return [judge(file, **how), judge_pipe(data, **how)]


def flawed() -> tuple[Stream, int]:
    """A domain with a flaw in its top table, and the byte offset of that."""
    domain = pv_domain(vcpus=2)
    domain.table(domain.places.top)[300] = domain.entries << 12 | 1
    stream = domain.to_stream(batch=16)
    return stream, page_offsets(stream)[domain.places.top] + 300 * 8
