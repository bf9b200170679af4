"""``convert-legacy-stream``: a drop-in for Xen's program of this name.

libxl and xenopsd run it.

Options and exit status are the original's (xen.git:tools/python/scripts/convert-legacy-stream): 0 for success, 1
for a bad stream, 2 for a bug. The output is the same, byte for byte, for every stream that the original supports.
This program also converts pages that Remus compressed and qemu's record of before Xen 4.1, and refuses streams that
would not restore.
"""

from __future__ import annotations

import argparse
import os
import sys
import syslog
import traceback
from collections.abc import Callable
from typing import NoReturn

from xenpv.convert.convert import Buffers, Conversion, ConvertOptions
from xenpv.convert.file import write_verified
from xenpv.errors import XenPVError
from xenpv.io.atomic_output import Output
from xenpv.io.stream_input import Input
from xenpv.stream.envelope import XL_FLAG_STREAMV2, Kind, xl_header
from xenpv.stream.events import Event
from xenpv.stream.legacy import LegacyFormat
from xenpv.stream.libxl import EmulatorContext
from xenpv.stream.reader import Reader
from xenpv.stream.record_order import Guest

EXIT_BAD_STREAM = 1
EXIT_OUR_FAULT = 2

_GUESTS = {"pv": Guest.PV, "hvm": Guest.HVM}
_QEMU = b"DeviceModelRecord0002"


def convert(
    source: Input,
    out: Output,
    *,
    width: int,
    guest: Guest,
    kind: Kind = Kind.LIBXC,
    xl: bool = False,
    skip_qemu: bool = False,
    print_line: Callable[[str], None],
) -> None:
    """Convert one stream and read no byte after it.

    A toolstack of ``width`` bits wrote it.
    """
    # As in the original, a libxl stream has qemu's state even with --skip-qemu.
    legacy = LegacyFormat(toolstack=(width // 8, guest), emulator=kind is Kind.LIBXL or not skip_qemu)
    reader = Reader(kind=Kind.XL if xl else None, legacy=legacy)

    def print_event(event: Event) -> None:
        print_line(f"{event.offset:#x}: {event.name}")

    conversion = Conversion(source, reader, ConvertOptions(kind, drop_emulator=True), on_event=print_event)
    first = True

    def sink(buffers: Buffers) -> None:
        nonlocal first
        if first and xl and buffers:
            flag = XL_FLAG_STREAMV2 if kind is Kind.LIBXL else 0
            buffers = [*xl_header(conversion.config, conversion.config_format, stream_flag=flag), *buffers]
        first &= not buffers
        out.write(buffers)

    write_verified(conversion, sink)
    if kind is Kind.LIBXC:
        for record in conversion.emulators.values():
            if isinstance(record, EmulatorContext):
                out.write([_QEMU, len(record.data).to_bytes(4, "little"), record.data])


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="convert-legacy-stream", description="Convert a legacy stream to a v2 (or later) stream"
    )
    parser.add_argument("--version", action="version", version="1")
    parser.add_argument("-i", "--in", dest="fin", metavar="<FD or FILE>", help="Legacy input to convert")
    parser.add_argument("-o", "--out", dest="fout", metavar="<FD or FILE>", help="v2 (or later) format output")
    parser.add_argument("-w", "--width", metavar="<32/64>", choices=["32", "64"], help="Legacy toolstack bitness")
    parser.add_argument("-g", "--guest-type", dest="guest", metavar="<pv/hvm>", choices=[*_GUESTS],
                        help="Type of guest in stream")  # fmt: skip
    parser.add_argument("-f", "--format", metavar="<libxc|libxl>", default="libxc", choices=["libxc", "libxl"],
                        help="Desired format of the outgoing stream (defaults to libxc)")  # fmt: skip
    parser.add_argument("-v", "--verbose", action="store_true", help="Summarise stream contents")
    parser.add_argument("-x", "--xl", action="store_true",
                        help="Is an `xl` header present in the stream? (default no)")  # fmt: skip
    parser.add_argument("--skip-qemu", action="store_true", help="Skip processing of the qemu tail? (default no)")
    parser.add_argument("--syslog", action="store_true", help="Log to syslog instead of stdout")
    options = parser.parse_args(argv)
    if None in {options.fin, options.fout, options.width, options.guest}:
        parser.print_help(sys.stderr)
        return 1
    if options.syslog:
        syslog.openlog("convert-legacy-stream", syslog.LOG_PID)

    def info(line: str) -> None:
        if options.verbose:
            if options.syslog:
                syslog.syslog(syslog.LOG_INFO, line)
            else:
                print(line, flush=True)

    def error(text: str) -> None:
        if options.syslog:
            for line in text.split("\n"):
                syslog.syslog(syslog.LOG_ERR, line)
        print(text, file=sys.stderr)

    try:
        source = Input(int(options.fin), "the stream", exact=True) if options.fin.isdigit() else Input.open(options.fin)
        out = (
            Output(int(options.fout), "the output")
            if options.fout.isdigit()
            else Output.open(options.fout, inputs=[source.fd])
        )
        with out:
            convert(
                source,
                out,
                width=int(options.width),
                guest=_GUESTS[options.guest],
                kind=Kind(options.format),
                xl=options.xl,
                skip_qemu=options.skip_qemu,
                print_line=info,
            )
    except XenPVError as e:
        error(f"Stream Error:\n{e}")
        return EXIT_BAD_STREAM
    except OSError as e:
        error(f"Stream Error:\n{e.filename or options.fin}: {os.strerror(e.errno or 0)}")
        return EXIT_BAD_STREAM
    except Exception:  # the original's contract: its own bugs are 2
        error(f"Script Error:\n{traceback.format_exc()}Please fix me")
        return EXIT_OUR_FAULT
    return 0


def run() -> NoReturn:
    """Run the console script."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(1)
