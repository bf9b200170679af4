"""Streams that break one rule each: a sound stream, a change, and what a reader must report."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.envelopes import libvirt_header, xenopsd_section, xl_header
from tests.support.writers.hvm import PARAMS, hvm_stream
from tests.support.writers.stream import NOTAB, OPTIONAL, PAGE, RECORDS, XTAB, Piece, Stream, Wire
from xenpv.errors import Malformed, OutOfOrder, StreamError, Truncated, Unsupported
from xenpv.findings import Rule
from xenpv.stream import rules

W = Wire()
MIB = 1 << 20
PLAIN = bytes(PAGE)


@cache
def small_domain() -> Domain:
    return pv_domain(pfns=range(36))


def sound_stream(base: str) -> Stream:
    """Return a sound stream: an envelope's name, or v2, big-endian, remus, hvm (libxl), hvm2 (libxl, version 2)."""
    match base:
        case "v2":
            return small_domain().to_stream("libxc", version=2, batch=16)
        case "big-endian":
            return small_domain().to_stream("libxc", big_endian=True, batch=16)
        case "remus":
            return small_domain().to_checkpointed(rounds=1, batch=16)
        case "hvm":
            return hvm_stream("libxl", pages=4)
        case "hvm2":
            return hvm_stream("libxl", pages=4, version=2)
    return small_domain().to_stream(base, batch=16)


@dataclass(frozen=True)
class Breach:
    """A change to a sound stream that breaks one rule.

    Attributes:
        rule: the rule.
        id: what is wrong, in a word.
        change: changes the stream.
        piece: name of the piece that breaks the rule.
        nth: its number among the pieces of that name, after the change.
        base: the sound stream, as for ``sound_stream``.
        error: the error that is raised; None for a warning, which is not raised.
        fatal: whether nothing after it can be read.
        record: the name of the record in the report, if it is not the piece's.
    """

    rule: Rule
    id: str
    change: Callable[[Stream], object]
    piece: str
    nth: int = 0
    base: str = "libxc"
    error: type[StreamError] | None = Malformed
    fatal: bool = False
    record: str | None = None

    def stream(self) -> Stream:
        stream = sound_stream(self.base)
        self.change(stream)
        return stream

    @property
    def reported_record(self) -> str:
        """The name of the record in the report."""
        return self.record or self.piece


def replace(piece: Piece, nth: int = 0) -> Callable[[Stream], object]:
    """Return a change: the piece replaces the nth of its name."""
    return lambda s: s.replace(piece.name, piece, nth=nth)


def number(name: str) -> int:
    return RECORDS.index(name)


def move_before(s: Stream, name: str, *, before: str) -> Stream:
    """Move all pieces of a name before the first of another."""
    moved = [piece for piece in s if piece.name == name]
    return s.drop(name).before(before, *moved)


def add_pages(*entries: tuple[int, int], n: int = 0, **wrong: int) -> Callable[[Stream], object]:
    """Return a change: another PAGE_DATA, with n pages of zeros, after the others."""
    return lambda s: s.before("X86_TSC_INFO", W.page_data(entries, [PLAIN] * n, **wrong))


def replace_p2m(piece: Piece) -> Callable[[Stream], object]:
    """Return a change: XENPV_P2M_LEAVES replaces X86_PV_P2M_FRAMES."""
    return lambda s: s.replace("X86_PV_P2M_FRAMES", piece)


def with_leaves(entries: int, *runs: tuple[int, int, int]) -> Callable[[Stream], object]:
    return replace_p2m(W.p2m_leaves(entries, *runs))


def overlong(piece: Piece) -> Piece:
    return Piece(piece.name, piece.data[:4] + struct.pack("<I", 128 * MIB + 1) + piece.data[8:])


HEADERS = [
    Breach(rules.ENVELOPE, "xl-byte-order", replace(xl_header(byteorder=b"\1\1\1\1")), "xl header", base="xl"),
    Breach(rules.ENVELOPE, "xl-flags", replace(xl_header(mandatory=0x83)), "xl header", base="xl"),
    Breach(rules.ENVELOPE, "xl-config-length", replace(xl_header(config_length=70000)), "xl header", base="xl"),
    Breach(rules.ENVELOPE, "xl-huge", replace(xl_header(length=1 << 30)), "xl header", base="xl", fatal=True),
    Breach(rules.ENVELOPE, "libvirt-version", replace(libvirt_header(version=3)), "libvirt header", base="libvirt"),
    Breach(
        rules.ENVELOPE,
        "libvirt-huge",
        replace(libvirt_header(length=1 << 30)),
        "libvirt header",
        base="libvirt",
        fatal=True,
    ),
    Breach(
        rules.ENVELOPE,
        "xenopsd-section",
        lambda s: s.before("xenopsd section", xenopsd_section(0x1234), nth=-1),
        "xenopsd section",
        nth=2,
        base="xenopsd",
        fatal=True,
    ),
    Breach(
        rules.LIBXL_HEADER,
        "ident",
        replace(W.libxl_header(ident=b"LibxlFmT")),
        "libxl header",
        base="xl",
        fatal=True,
    ),
    Breach(rules.LIBXL_HEADER, "version", replace(W.libxl_header(version=3)), "libxl header", base="libxl", fatal=True),
    Breach(rules.LIBXL_HEADER, "options", replace(W.libxl_header(options=4)), "libxl header", base="libxl"),
    Breach(rules.IMAGE_HEADER, "marker", replace(W.image_header(marker=1)), "image header", base="libxl", fatal=True),
    Breach(rules.IMAGE_HEADER, "id", replace(W.image_header(ident=b"XENG")), "image header", fatal=True),
    Breach(rules.IMAGE_HEADER, "version-1", replace(Wire(1).image_header()), "image header", fatal=True),
    Breach(rules.IMAGE_HEADER, "version-4", replace(Wire(4).image_header()), "image header", fatal=True),
    Breach(rules.IMAGE_HEADER, "big-endian", lambda s: s, "image header", base="big-endian"),
    Breach(rules.DOMAIN_HEADER, "type-0", replace(W.domain_header(0)), "domain header", fatal=True),
    Breach(rules.DOMAIN_HEADER, "type-3", replace(W.domain_header(3)), "domain header", fatal=True),
    Breach(rules.DOMAIN_HEADER, "page-shift", replace(W.domain_header(page_shift=13)), "domain header", fatal=True),
    Breach(rules.XEN_VERSION, "3.4", replace(W.domain_header(major=3, minor=4)), "domain header", error=None),
    Breach(rules.XEN_VERSION, "4.5", replace(W.domain_header(major=4, minor=5)), "domain header", error=None),
    Breach(
        rules.TRUNCATED,
        "end-of-libxc",
        lambda s: s.drop("END"),
        "END",  # where it would have been
        error=Truncated,
        fatal=True,
        record="record",
    ),
]

FRAMING = [
    Breach(
        rules.RECORD_LENGTH,
        "page-data",
        lambda s: replace(overlong(s[s.find("PAGE_DATA")]))(s),
        "PAGE_DATA",
        fatal=True,
    ),
    Breach(rules.RECORD_LENGTH, "end", replace(overlong(W.end())), "END", fatal=True),
    Breach(rules.RECORD_LENGTH, "libxl", replace(overlong(W.libxl_end())), "libxl END", base="libxl", fatal=True),
    Breach(
        rules.RECORD_LENGTH,
        "optional",
        lambda s: s.before("END", overlong(W.record(OPTIONAL | 0x13))),
        "optional record 0x80000013",
        fatal=True,
    ),
    Breach(
        rules.RECORD_SIZE, "pv-info", replace(W.record(number("X86_PV_INFO"), b"\x08\x04" + bytes(14))), "X86_PV_INFO"
    ),
    Breach(
        rules.RECORD_SIZE, "static-data-end", replace(W.record(number("STATIC_DATA_END"), bytes(8))), "STATIC_DATA_END"
    ),
    Breach(rules.RECORD_SIZE, "cpuid", replace(W.record(number("X86_CPUID_POLICY"), bytes(25))), "X86_CPUID_POLICY"),
    Breach(rules.RECORD_SIZE, "cpuid-empty", replace(W.cpuid_policy([])), "X86_CPUID_POLICY"),
    Breach(rules.RECORD_SIZE, "msr", replace(W.record(number("X86_MSR_POLICY"), bytes(15))), "X86_MSR_POLICY"),
    Breach(rules.RECORD_SIZE, "p2m-few", replace(W.p2m_frames(0, 36, [])), "X86_PV_P2M_FRAMES"),
    Breach(rules.RECORD_SIZE, "p2m-many", replace(W.p2m_frames(0, 36, [1, 2])), "X86_PV_P2M_FRAMES"),
    Breach(
        rules.RECORD_SIZE, "p2m-short", replace(W.record(number("X86_PV_P2M_FRAMES"), bytes(4))), "X86_PV_P2M_FRAMES"
    ),
    Breach(rules.RECORD_SIZE, "leaves", replace_p2m(W.record(0x7870_0001, bytes(41))), "XENPV_P2M_LEAVES"),
    Breach(rules.RECORD_SIZE, "no-leaves", with_leaves(0), "XENPV_P2M_LEAVES"),
    Breach(rules.RECORD_SIZE, "tsc", replace(W.record(number("X86_TSC_INFO"), bytes(16))), "X86_TSC_INFO"),
    Breach(rules.RECORD_SIZE, "shared-info", replace(W.shared_info(bytes(PAGE - 1))), "SHARED_INFO"),
    Breach(rules.RECORD_SIZE, "vcpu", replace(W.record(number("X86_PV_VCPU_BASIC"), bytes(7))), "X86_PV_VCPU_BASIC"),
    Breach(rules.RECORD_SIZE, "end", replace(W.record(number("END"), bytes(8))), "END"),
    Breach(rules.RECORD_SIZE, "hvm-params", replace(W.hvm_params(PARAMS, count=4)), "HVM_PARAMS", base="hvm"),
    Breach(
        rules.RECORD_SIZE, "hvm-params-0", replace(W.record(number("HVM_PARAMS"), bytes(4))), "HVM_PARAMS", base="hvm"
    ),
    Breach(rules.RECORD_SIZE, "hvm-context", replace(W.hvm_context(b"")), "HVM_CONTEXT", base="hvm"),
    Breach(rules.RECORD_SIZE, "emulator", replace(W.libxl_record(3, bytes(7))), "libxl EMULATOR_CONTEXT", base="hvm"),
    Breach(
        rules.RECORD_SIZE, "libxc-context", replace(W.libxl_record(1, bytes(8))), "libxl LIBXC_CONTEXT", base="libxl"
    ),
    Breach(rules.RECORD_SIZE, "libxl-end", replace(W.libxl_record(0, bytes(8))), "libxl END", base="libxl"),
    Breach(
        rules.RECORD_UNKNOWN,
        "libxc",
        lambda s: s.before("END", W.record(0x13, b"new")),
        "record 0x13",
        error=Unsupported,
    ),
    Breach(
        rules.RECORD_UNKNOWN,
        "libxl",
        lambda s: s.before("libxl END", W.libxl_record(6, b"new")),
        "record 0x6",
        base="libxl",
        error=Unsupported,
    ),
    Breach(
        rules.RECORD_OPTIONAL,
        "libxc",
        lambda s: s.before("END", W.record(OPTIONAL | 0x12, b"policy")),
        "optional record 0x80000012",
        error=None,
    ),
    Breach(
        rules.RECORD_OPTIONAL,
        "page-data",
        lambda s: s.before("END", W.record(OPTIONAL | 1, bytes(16))),
        "optional record 0x80000001",
        error=None,
    ),
    Breach(
        rules.RECORD_OPTIONAL,
        "libxl",
        lambda s: s.before("libxl END", W.libxl_record(OPTIONAL | 5, bytes(8))),
        "optional record 0x80000005",
        base="libxl",
        error=None,
    ),
    Breach(rules.RECORD_EMPTY, "msrs", replace(W.vcpu_msrs(0, b"")), "X86_PV_VCPU_MSRS", error=None),
    Breach(rules.RECORD_EMPTY, "extended", replace(W.vcpu_extended(0, b"")), "X86_PV_VCPU_EXTENDED", error=None),
    Breach(rules.RECORD_EMPTY, "xsave", replace(W.vcpu_xsave(0, b"")), "X86_PV_VCPU_XSAVE", error=None),
    Breach(rules.RECORD_EMPTY, "hvm-params", replace(W.hvm_params({})), "HVM_PARAMS", base="hvm", error=None),
    Breach(
        rules.PADDING,
        "xsave",
        replace(W.record(number("X86_PV_VCPU_XSAVE"), bytes(8 + 577), padding=b"\0\0\1")),
        "X86_PV_VCPU_XSAVE",
        error=None,
    ),
    Breach(
        rules.PADDING,
        "libxl",
        replace(W.libxl_record(3, bytes(9), padding=b"x")),
        "libxl EMULATOR_CONTEXT",
        base="hvm",
        error=None,
    ),
    Breach(rules.RESERVED, "xl", replace(xl_header(optional=1)), "xl header", base="xl", error=None),
    Breach(
        rules.RESERVED,
        "libvirt",
        replace(libvirt_header(unused=bytes(39) + b"\1")),
        "libvirt header",
        base="libvirt",
        error=None,
    ),
    Breach(rules.RESERVED, "image-options", replace(W.image_header(options=2)), "image header", error=None),
    Breach(rules.RESERVED, "image", replace(W.image_header(reserved=1)), "image header", error=None),
    Breach(rules.RESERVED, "domain", replace(W.domain_header(reserved=1)), "domain header", error=None),
    Breach(rules.RESERVED, "pv-info", replace(W.pv_info(reserved=bytes(5) + b"\1")), "X86_PV_INFO", error=None),
    Breach(rules.RESERVED, "page-data", add_pages((0, NOTAB), n=1, reserved=1), "PAGE_DATA", nth=-1, error=None),
    Breach(rules.RESERVED, "pfn", add_pages((1 << 52, NOTAB), n=1), "PAGE_DATA", nth=-1, error=None),
    Breach(rules.RESERVED, "tsc", replace(W.tsc_info(reserved=1)), "X86_TSC_INFO", error=None),
    Breach(
        rules.RESERVED, "hvm-params", replace(W.hvm_params(PARAMS, reserved=1)), "HVM_PARAMS", base="hvm", error=None
    ),
    Breach(
        rules.RESERVED,
        "checkpoint-state",
        lambda s: s.before("libxl END", W.checkpoint_state(0, padding=1)),
        "libxl CHECKPOINT_STATE",
        base="hvm",
        error=None,
    ),
    Breach(rules.RESERVED, "vcpu", replace(W.vcpu_basic(0, bytes(5168), reserved=1)), "X86_PV_VCPU_BASIC", error=None),
]

ORDER = [
    Breach(
        rules.ORDER,
        "pv-info-late",
        lambda s: move_before(s, "X86_PV_INFO", before="X86_PV_P2M_FRAMES"),
        "X86_PV_INFO",
        error=OutOfOrder,
    ),
    Breach(
        rules.ORDER,
        "static-data-late",
        lambda s: move_before(s, "STATIC_DATA_END", before="PAGE_DATA"),
        "X86_PV_P2M_FRAMES",
        error=OutOfOrder,
    ),
    Breach(
        rules.ORDER,
        "policy-late",
        lambda s: move_before(s, "X86_MSR_POLICY", before="PAGE_DATA"),
        "X86_MSR_POLICY",
        error=OutOfOrder,
    ),
    Breach(
        rules.ORDER,
        "p2m-late",
        lambda s: move_before(s, "X86_PV_P2M_FRAMES", before="X86_TSC_INFO"),
        "PAGE_DATA",
        error=OutOfOrder,
    ),
    Breach(
        rules.ORDER,
        "vcpu-early",
        lambda s: move_before(s, "X86_PV_VCPU_XSAVE", before="PAGE_DATA"),
        "X86_PV_VCPU_XSAVE",
        error=OutOfOrder,
    ),
    Breach(
        rules.ORDER,
        "shared-info-early",
        lambda s: move_before(s, "SHARED_INFO", before="STATIC_DATA_END"),
        "SHARED_INFO",
        error=OutOfOrder,
    ),
    Breach(
        rules.ORDER,
        "verify-early",
        lambda s: s.before("PAGE_DATA", W.verify()),
        "VERIFY",
        error=OutOfOrder,
    ),
    Breach(
        rules.ORDER,
        "hvm-context-early",
        lambda s: move_before(s, "HVM_CONTEXT", before="STATIC_DATA_END"),
        "HVM_CONTEXT",
        base="hvm",
        error=OutOfOrder,
    ),
    Breach(
        rules.ORDER,
        "hvm-params-early",
        lambda s: move_before(s, "HVM_PARAMS", before="STATIC_DATA_END"),
        "HVM_PARAMS",
        base="hvm",
        error=OutOfOrder,
    ),
    Breach(
        rules.ORDER,
        "checkpoint-end",
        lambda s: s.before("libxl END", W.checkpoint_end()),
        "libxl CHECKPOINT_END",
        base="libxl",
        error=OutOfOrder,
    ),
    Breach(
        rules.REPEATED,
        "pv-info",
        lambda s: s.after("X86_PV_INFO", W.pv_info()),
        "X86_PV_INFO",
        nth=1,
        error=OutOfOrder,
    ),
    Breach(
        rules.REPEATED,
        "static-data-end",
        lambda s: s.after("STATIC_DATA_END", W.static_data_end()),
        "STATIC_DATA_END",
        nth=1,
        error=OutOfOrder,
    ),
    Breach(
        rules.REPEATED,
        "libxc-context",
        lambda s: s.before("libxl END", W.libxc_context(), *sound_stream("libxc")),
        "libxl LIBXC_CONTEXT",
        nth=1,
        base="libxl",
        error=OutOfOrder,
    ),
    Breach(
        rules.MISPLACED, "hvm-in-pv", lambda s: s.before("END", W.hvm_params(PARAMS)), "HVM_PARAMS", error=OutOfOrder
    ),
    Breach(
        rules.MISPLACED,
        "pv-in-hvm",
        lambda s: s.after("domain header", W.pv_info()),
        "X86_PV_INFO",
        base="hvm",
        error=OutOfOrder,
    ),
    Breach(rules.MISPLACED, "toolstack", lambda s: s.before("END", W.toolstack(b"old")), "TOOLSTACK", error=OutOfOrder),
    Breach(
        rules.MISPLACED,
        "dirty-list",
        lambda s: s.before("END", W.dirty_pfns([1, 2])),
        "CHECKPOINT_DIRTY_PFN_LIST",
        error=OutOfOrder,
    ),
    Breach(
        rules.MISPLACED,
        "static-data-end",
        lambda s: s.after("X86_PV_INFO", W.static_data_end()),
        "STATIC_DATA_END",
        base="v2",
        error=OutOfOrder,
    ),
    Breach(
        rules.MISPLACED,
        "policy",
        lambda s: s.after("domain header", W.msr_policy([(0xCE, 0, 0)])),
        "X86_MSR_POLICY",
        base="hvm2",
        error=OutOfOrder,
    ),
    Breach(rules.MISSING, "shared-info", lambda s: s.drop("SHARED_INFO"), "END", error=OutOfOrder),
    Breach(rules.MISSING, "vcpu", lambda s: s.drop("X86_PV_VCPU_BASIC"), "END", error=OutOfOrder),
    Breach(rules.MISSING, "hvm-context", lambda s: s.drop("HVM_CONTEXT"), "END", base="hvm", error=OutOfOrder),
    Breach(
        rules.MISSING,
        "libxc-context",
        lambda s: s.__setitem__(slice(1, -1), []),
        "libxl END",
        base="libxl",
        error=OutOfOrder,
    ),
    Breach(
        rules.MISSING,
        "xenopsd-stream",
        lambda s: s.__setitem__(slice(2, -1), []),
        "xenopsd section",
        nth=1,
        base="xenopsd",
        error=OutOfOrder,
    ),
    Breach(rules.CHECKPOINT, "remus", lambda s: s, "CHECKPOINT", base="remus", error=None),
    Breach(rules.CHECKPOINT, "bare", lambda s: s.before("END", W.checkpoint()), "CHECKPOINT", error=None),
]

RECORDS_OF_PV = [
    Breach(rules.PV_INFO, "8-and-3", replace(W.pv_info(8, 3)), "X86_PV_INFO"),
    Breach(rules.PV_INFO, "4-and-4", replace(W.pv_info(4, 4)), "X86_PV_INFO"),
    Breach(rules.PV_INFO, "2-and-4", replace(W.pv_info(2, 4)), "X86_PV_INFO"),
    Breach(rules.P2M_RANGE, "backwards", replace(W.p2m_frames(37, 36, [])), "X86_PV_P2M_FRAMES"),
    Breach(rules.P2M_RANGE, "no-entries", with_leaves(0, (0, 1, 1)), "XENPV_P2M_LEAVES"),
    Breach(rules.P2M_RANGE, "too-many-entries", with_leaves((1 << 52) + 1, (0, (1 << 43) + 1, 1)), "XENPV_P2M_LEAVES"),
    Breach(rules.P2M_RANGE, "leaf-missing", with_leaves(1536, (0, 1, 1), (2, 1, 2)), "XENPV_P2M_LEAVES"),
    Breach(rules.P2M_RANGE, "leaf-twice", with_leaves(1536, (0, 2, 1), (1, 2, 2)), "XENPV_P2M_LEAVES"),
    Breach(rules.P2M_RANGE, "first-missing", with_leaves(1536, (1, 2, 1)), "XENPV_P2M_LEAVES"),
    Breach(rules.P2M_RANGE, "last-missing", with_leaves(1537, (0, 3, 1)), "XENPV_P2M_LEAVES"),
    Breach(rules.P2M_RANGE, "one-too-many", with_leaves(1536, (0, 4, 1)), "XENPV_P2M_LEAVES"),
    Breach(rules.P2M_RANGE, "empty-run", with_leaves(512, (0, 1, 1), (1, 0, 1)), "XENPV_P2M_LEAVES"),
    Breach(rules.P2M_RANGE, "pfn", with_leaves(512, (0, 1, 1 << 52)), "XENPV_P2M_LEAVES"),
    Breach(
        rules.P2M_RANGE,
        "around",
        with_leaves(512, (0, (1 << 64) - 1, 1), ((1 << 64) - 1, 2, 1)),
        "XENPV_P2M_LEAVES",
    ),
    Breach(rules.PAGE_COUNT, "none", add_pages(), "PAGE_DATA", nth=-1),
    Breach(rules.PAGE_COUNT, "more-than-fit", add_pages((0, NOTAB), n=1, count=1000), "PAGE_DATA", nth=-1),
    Breach(rules.PAGE_COUNT, "4-billion", add_pages((0, NOTAB), n=1, count=(1 << 32) - 1), "PAGE_DATA", nth=-1),
    Breach(rules.PAGE_COUNT, "short", lambda s: s.before("X86_TSC_INFO", W.record(1, bytes(4))), "PAGE_DATA", nth=-1),
    *(Breach(rules.PAGE_TYPE, f"type-{n}", add_pages((0, n)), "PAGE_DATA", nth=-1) for n in range(5, 9)),
    Breach(rules.PAGE_RANGE, "one-beyond", add_pages((37, NOTAB), n=1), "PAGE_DATA", nth=-1),
    Breach(rules.PAGE_RANGE, "far-beyond", add_pages((0, NOTAB), ((1 << 52) - 1, XTAB), n=1), "PAGE_DATA", nth=-1),
    Breach(rules.PAGE_SIZE_MATCH, "a-page-short", add_pages((0, NOTAB), (1, NOTAB), n=1), "PAGE_DATA", nth=-1),
    Breach(rules.PAGE_SIZE_MATCH, "a-page-more", add_pages((0, NOTAB), (1, XTAB), n=2), "PAGE_DATA", nth=-1),
    Breach(rules.VCPU_ID, "8192", replace(W.vcpu_msrs(8192, bytes(16))), "X86_PV_VCPU_MSRS"),
    Breach(rules.VCPU_SIZE, "basic-short", replace(W.vcpu_basic(0, bytes(5167))), "X86_PV_VCPU_BASIC"),
    Breach(rules.VCPU_SIZE, "basic-of-32-bit", replace(W.vcpu_basic(0, bytes(2800))), "X86_PV_VCPU_BASIC"),
    Breach(rules.VCPU_SIZE, "extended-long", replace(W.vcpu_extended(0, bytes(129))), "X86_PV_VCPU_EXTENDED"),
    Breach(rules.VCPU_SIZE, "xsave-short", replace(W.vcpu_xsave(0, bytes(15))), "X86_PV_VCPU_XSAVE"),
    Breach(rules.VCPU_SIZE, "msrs-odd", replace(W.vcpu_msrs(0, bytes(17))), "X86_PV_VCPU_MSRS"),
    Breach(rules.EMULATOR, "id", replace(W.emulator_context(b"x", emulator=3)), "libxl EMULATOR_CONTEXT", base="hvm"),
    Breach(
        rules.EMULATOR,
        "no-nul",
        replace(W.libxl_record(2, struct.pack("<II", 2, 0) + b"key\0value")),
        "libxl EMULATOR_XENSTORE_DATA",
        base="hvm",
    ),
    Breach(
        rules.EMULATOR,
        "odd",
        replace(W.libxl_record(2, struct.pack("<II", 2, 0) + b"key\0value\0key\0")),
        "libxl EMULATOR_XENSTORE_DATA",
        base="hvm",
    ),
]

BREACHES = [*HEADERS, *FRAMING, *ORDER, *RECORDS_OF_PV]
