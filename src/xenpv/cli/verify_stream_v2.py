"""``verify-stream-v2``: a drop-in for Xen's program of this name.

xenopsd and others run it.

Options and exit status are the original's (xen.git:tools/python/scripts/verify-stream-v2): 0 for a good stream, 1 for
a bad one, 2 for a bug. Like the original it reads no byte after the stream, so that a caller can go on with the same
descriptor. Unlike the original it also checks order, counts and ranges. It accepts good streams that the original
rejects: with optional records, with emulator xenstore data (under Python 3), and checkpointed libxl streams.
"""

from __future__ import annotations

import argparse
import os
import sys
import syslog
import traceback
from collections.abc import Callable
from typing import NoReturn

from xenpv.errors import RequestError, StreamError
from xenpv.findings import Findings
from xenpv.io.stream_input import Input
from xenpv.stream import rules
from xenpv.stream.envelope import Envelope, Kind
from xenpv.stream.events import DomainHeader, Event, ImageHeader, LibxlHeader
from xenpv.stream.framing import Record
from xenpv.stream.libxl import OPTION_BIG_ENDIAN, OPTION_LEGACY, LibxlRecord
from xenpv.stream.page_data import PageData
from xenpv.stream.reader import Reader
from xenpv.stream.record_order import Guest
from xenpv.stream.records import X86PVInfo, X86PVP2MFrames

EXIT_BAD_STREAM = 1
EXIT_OUR_FAULT = 2

# Rules that xenpv only warns of, and the original takes for errors.
_WARNINGS_AS_ERRORS = {rules.RESERVED, rules.PADDING}


def verify(fd: int, kind: Kind, print_line: Callable[[str], None]) -> list[str]:
    """Read one stream from ``fd`` to its last byte; return its errors, a line each."""
    findings = Findings()
    reader = Reader(on_breach=findings.add_breach, kind=kind, check_seal=False)
    page_data = 0
    errors = []
    try:
        for event in Input(fd, "the stream", exact=True).events(reader):
            if isinstance(event, PageData):
                page_data += 1
                continue
            if page_data:
                print_line(f"Squashed {page_data} Page Data records together")
                page_data = 0
            for line in _describe(event):
                print_line(line)
    except StreamError as e:
        if not findings.errors:
            errors.append(str(e))
    errors += [str(f) for f in findings if f.rule in _WARNINGS_AS_ERRORS or f.severity == "error"]
    return errors


def _describe(event: Event) -> list[str]:
    """Describe an event in the original's words."""
    match event:
        case Envelope():
            return [f"Processed {event.kind} header"]
        case LibxlHeader():
            endian = "big" if event.options & OPTION_BIG_ENDIAN else "little"
            return [f"Libxl Header: {endian} endian" + (", legacy converted" if event.options & OPTION_LEGACY else "")]
        case ImageHeader():
            endian = "big" if event.big_endian else "little"
            return [f"Libxc Image Header: Version {event.version}, {endian} endian"]
        case DomainHeader():
            guest = "x86 PV" if event.guest is Guest.PV else "x86 HVM"
            if event.xen_major == 0:
                return [f"Domain Header: legacy converted {guest}"]
            return [f"Domain Header: {guest} from Xen {event.xen_major}.{event.xen_minor}"]
        case Record():
            layer = "Libxl" if isinstance(event, LibxlRecord) else "Libxc"
            lines = [f"{layer} Record: {event.name.removeprefix('libxl ')}, length {event.length}"]
            if isinstance(event, X86PVInfo):
                lines.append(f"  {event.guest_width * 8}bit guest, {event.pt_levels} levels of pagetables")
            elif isinstance(event, X86PVP2MFrames):
                lines.append(f"  Start pfn {event.start_pfn:#x}, End {event.end_pfn:#x}")
            return lines
    return []


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="verify-stream-v2", description="Verify a stream according to the v2 (or later) spec"
    )
    parser.add_argument("-i", "--in", dest="fin", metavar="<FD or FILE>", default="0",
                        help="Stream to verify (defaults to stdin)")  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true", help="Summarise stream contents")
    parser.add_argument("-q", "--quiet", action="store_true", help="Suppress all logging/errors")
    parser.add_argument("-f", "--format", metavar="<libxc|libxl|xl>", default="libxc", choices=["libxc", "libxl", "xl"],
                        help="Format of the incoming stream (defaults to libxc)")  # fmt: skip
    parser.add_argument("--syslog", action="store_true", help="Log to syslog instead of stdout")
    options = parser.parse_args(argv)
    if options.syslog:
        syslog.openlog("verify-stream-v2", syslog.LOG_PID)

    def info(line: str) -> None:
        if options.verbose and not options.quiet:
            if options.syslog:
                syslog.syslog(syslog.LOG_INFO, line)
            else:
                print(line, flush=True)

    def error(line: str) -> None:
        if not options.quiet:
            if options.syslog:
                syslog.syslog(syslog.LOG_ERR, line)
            print(line, file=sys.stderr)

    try:
        fd = int(options.fin) if options.fin.isdigit() else os.open(options.fin, os.O_RDONLY | os.O_CLOEXEC)
        errors = verify(fd, Kind(options.format), info)
    except (OSError, RequestError) as e:
        error(f"Stream Error:\n{options.fin}: {e.strerror if isinstance(e, OSError) else e}")
        return EXIT_BAD_STREAM
    except Exception:  # the original's contract: its own bugs are 2
        error(f"Script Error:\n{traceback.format_exc()}Please fix me")
        return EXIT_OUR_FAULT
    if errors:
        error("Stream Error:")
        for line in errors:
            error(line)
        return EXIT_BAD_STREAM
    return 0


def run() -> NoReturn:
    """Run the console script."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(EXIT_OUR_FAULT)
