"""Migration streams as bytes, written piece by piece.

For tests only. It shares nothing with xenpv.stream: the layouts are those of libxc-migration-stream.pandoc and
libxl-migration-stream.pandoc, put down a second time, so that reader and writer keep each other honest. And it checks
nothing: whatever a test asks for is written, right or wrong.

A Stream is a list of named Pieces; the names are those that xenpv's errors use ("image header", "PAGE_DATA",
"libxl END"). A test takes a good stream, breaks one thing, and knows at which offset the complaint has to point:

>>> wire = Wire()
>>> stream = Stream([wire.image_header(), wire.domain_header(), wire.pv_info(8, 4), wire.end()])
>>> stream.offset("X86_PV_INFO")
40
>>> bytes(stream.replace("X86_PV_INFO", wire.pv_info(8, 3)))[48:50].hex()
'0803'

Whole domains are in writers/domain.py, envelopes in writers/envelopes.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

PAGE = 4096
PV, HVM = 1, 2
OPTIONAL = 0x8000_0000

# Page types of PAGE_DATA, "XEN_DOMCTL_PFINFO_* Page Types" of the specification.
NOTAB, L1TAB, L2TAB, L3TAB, L4TAB = range(5)
PIN = 8
BROKEN, XALLOC, XTAB = 0xD, 0xE, 0xF
WITH_DATA = {NOTAB, L1TAB, L2TAB, L3TAB, L4TAB, *(t | PIN for t in range(1, 5))}

RECORDS = (
    "END", "PAGE_DATA", "X86_PV_INFO", "X86_PV_P2M_FRAMES", "X86_PV_VCPU_BASIC", "X86_PV_VCPU_EXTENDED",
    "X86_PV_VCPU_XSAVE", "SHARED_INFO", "X86_TSC_INFO", "HVM_CONTEXT", "HVM_PARAMS", "TOOLSTACK", "X86_PV_VCPU_MSRS",
    "VERIFY", "CHECKPOINT", "CHECKPOINT_DIRTY_PFN_LIST", "STATIC_DATA_END", "X86_CPUID_POLICY", "X86_MSR_POLICY",
)  # fmt: skip
OURS = {0x7870_0001: "XENPV_P2M_LEAVES"}  # docs/reference/records.md
LIBXL_RECORDS = (
    "END", "LIBXC_CONTEXT", "EMULATOR_XENSTORE_DATA", "EMULATOR_CONTEXT", "CHECKPOINT_END", "CHECKPOINT_STATE",
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Bytes that belong together: a header, or a record with its header and padding."""

    name: str
    data: bytes


class Stream(list[Piece]):
    """Pieces in the order in which they will be written.

    ``nth`` counts pieces of the same name, from 0; -1 is the last. Whatever changes the stream returns it, too.
    """

    def __bytes__(self) -> bytes:
        return b"".join(piece.data for piece in self)

    def find(self, name: str, nth: int = 0) -> int:
        """Where in the list a piece is."""
        return [i for i, piece in enumerate(self) if piece.name == name][nth]

    def offset(self, name: str, nth: int = 0) -> int:
        """The byte offset at which a piece begins."""
        return self.offset_of(self.find(name, nth))

    def offset_of(self, i: int) -> int:
        """The byte offset at which the i-th piece begins; for i = len(stream), of the end."""
        return sum(len(piece.data) for piece in self[:i])

    def replace(self, name: str, *new: Piece, nth: int = 0) -> Self:
        """Put other pieces, or none, in the place of one."""
        at = self.find(name, nth)
        self[at : at + 1] = new
        return self

    def drop(self, name: str) -> Self:
        """Leave out all pieces of that name."""
        self[:] = [piece for piece in self if piece.name != name]
        return self

    def before(self, name: str, *new: Piece, nth: int = 0) -> Self:
        at = self.find(name, nth)
        self[at:at] = new
        return self

    def after(self, name: str, *new: Piece, nth: int = 0) -> Self:
        at = self.find(name, nth) + 1
        self[at:at] = new
        return self

    def patch(self, name: str, at: int, data: bytes, nth: int = 0) -> Self:
        """Overwrite bytes of a piece, from byte ``at`` of it on (its header counts)."""
        i = self.find(name, nth)
        old = self[i].data
        self[i] = Piece(name, old[:at] + data + old[at + len(data) :])
        return self


@dataclass(frozen=True)
class Wire:
    """How a libxc stream, or the records of a libxl one, are put into bytes."""

    version: int = 3
    big_endian: bool = False

    def pack(self, fmt: str, *values: int | bytes) -> bytes:
        return struct.pack((">" if self.big_endian else "<") + fmt, *values)

    def record(self, kind: int, body: bytes = b"", *, length: int | None = None, padding: bytes = b"") -> Piece:
        """A libxc record of any type. ``length`` lies about the body's, ``padding`` takes the place of zeroes."""
        unknown = f"{'optional ' if kind & OPTIONAL else ''}record {kind:#x}"
        name = RECORDS[kind] if kind < len(RECORDS) else OURS.get(kind, unknown)
        return Piece(name, self._record(kind, body, length, padding))

    def _record(self, kind: int, body: bytes, length: int | None = None, padding: bytes = b"") -> bytes:
        pad = -len(body) % 8
        return self.pack("II", kind, len(body) if length is None else length) + body + (padding + bytes(pad))[:pad]

    def _named(self, name: str, body: bytes = b"") -> Piece:
        return self.record(RECORDS.index(name), body)

    # --- headers: "Fields within the image header are always in big-endian byte order" ------------------------------

    def image_header(
        self, *, marker: int = (1 << 64) - 1, ident: bytes = b"XENF", options: int | None = None, reserved: int = 0
    ) -> Piece:
        options = int(self.big_endian) if options is None else options
        head = struct.pack(">Q4sIH", marker, ident, self.version, options)
        return Piece("image header", head + reserved.to_bytes(6, "big"))

    def domain_header(
        self, guest: int = PV, *, page_shift: int = 12, reserved: int = 0, major: int = 4, minor: int = 17
    ) -> Piece:
        return Piece("domain header", self.pack("IHHII", guest, page_shift, reserved, major, minor))

    # --- libxc records, in the order of the specification ------------------------------------------------------------

    def end(self) -> Piece:
        return self._named("END")

    def page_data(
        self, entries: Iterable[tuple[int, int]], pages: Iterable[bytes], *, count: int | None = None, reserved: int = 0
    ) -> Piece:
        """PAGE_DATA of (pfn, type) pairs and the contents of those that have one."""
        words = [kind << 60 | pfn for pfn, kind in entries]
        head = self.pack("II", len(words) if count is None else count, reserved)
        return self._named("PAGE_DATA", head + self.pack(f"{len(words)}Q", *words) + b"".join(pages))

    def pv_info(self, width: int = 8, levels: int = 4, *, reserved: bytes = bytes(6)) -> Piece:
        return self._named("X86_PV_INFO", bytes((width, levels)) + reserved)

    def p2m_frames(self, start: int, end: int, pfns: Sequence[int] | npt.NDArray[np.uint64]) -> Piece:
        """``end`` is included."""
        words = np.asarray(pfns, np.uint64).astype(">u8" if self.big_endian else "<u8")
        return self._named("X86_PV_P2M_FRAMES", self.pack("II", start, end) + words.tobytes())

    def p2m_leaves(self, entries: int, *runs: tuple[int, int, int]) -> Piece:
        """Runs of (first place, places, pfn of the frame in all of them)."""
        words = [entries, *(word for run in runs for word in run)]
        return self.record(0x7870_0001, self.pack(f"{len(words)}Q", *words))

    def vcpu_basic(self, vcpu: int, context: bytes, *, reserved: int = 0) -> Piece:
        return self._named("X86_PV_VCPU_BASIC", self.pack("II", vcpu, reserved) + context)

    def vcpu_extended(self, vcpu: int, context: bytes) -> Piece:
        return self._named("X86_PV_VCPU_EXTENDED", self.pack("II", vcpu, 0) + context)

    def vcpu_xsave(self, vcpu: int, context: bytes) -> Piece:
        return self._named("X86_PV_VCPU_XSAVE", self.pack("II", vcpu, 0) + context)

    def vcpu_msrs(self, vcpu: int, context: bytes) -> Piece:
        return self._named("X86_PV_VCPU_MSRS", self.pack("II", vcpu, 0) + context)

    def shared_info(self, page: bytes) -> Piece:
        return self._named("SHARED_INFO", page)

    def tsc_info(
        self, mode: int = 0, khz: int = 2_400_000, nsec: int = 10**9, incarnation: int = 1, reserved: int = 0
    ) -> Piece:
        return self._named("X86_TSC_INFO", self.pack("IIQII", mode, khz, nsec, incarnation, reserved))

    def hvm_context(self, data: bytes) -> Piece:
        return self._named("HVM_CONTEXT", data)

    def hvm_params(self, params: Mapping[int, int], *, count: int | None = None, reserved: int = 0) -> Piece:
        body = b"".join(self.pack("QQ", index, value) for index, value in params.items())
        return self._named("HVM_PARAMS", self.pack("II", len(params) if count is None else count, reserved) + body)

    def toolstack(self, data: bytes) -> Piece:
        return self._named("TOOLSTACK", data)

    def verify(self) -> Piece:
        return self._named("VERIFY")

    def checkpoint(self) -> Piece:
        return self._named("CHECKPOINT")

    def dirty_pfns(self, pfns: Sequence[int]) -> Piece:
        return self._named("CHECKPOINT_DIRTY_PFN_LIST", self.pack(f"{len(pfns)}Q", *pfns))

    def static_data_end(self) -> Piece:
        return self._named("STATIC_DATA_END")

    def cpuid_policy(self, leaves: Iterable[tuple[int, int, int, int, int, int]]) -> Piece:
        return self._named("X86_CPUID_POLICY", b"".join(struct.pack("<6I", *leaf) for leaf in leaves))

    def msr_policy(self, entries: Iterable[tuple[int, int, int]]) -> Piece:
        return self._named("X86_MSR_POLICY", b"".join(struct.pack("<IIQ", *entry) for entry in entries))

    # --- the libxl layer ---------------------------------------------------------------------------------------------

    def libxl_header(self, *, ident: bytes = b"LibxlFmt", version: int = 2, options: int | None = None) -> Piece:
        """Always big-endian; a Wire's own ``version`` is libxc's, not this one."""
        options = int(self.big_endian) if options is None else options
        return Piece("libxl header", struct.pack(">8sII", ident, version, options))

    def libxl_record(self, kind: int, body: bytes = b"", *, length: int | None = None, padding: bytes = b"") -> Piece:
        known = f"libxl {LIBXL_RECORDS[kind]}" if kind < len(LIBXL_RECORDS) else None
        name = known or f"{'optional ' if kind & OPTIONAL else ''}record {kind:#x}"
        return Piece(name, self._record(kind, body, length, padding))

    def libxl_end(self) -> Piece:
        return self.libxl_record(0)

    def libxc_context(self) -> Piece:
        return self.libxl_record(1)

    def emulator_xenstore(self, pairs: Mapping[str, str], *, emulator: int = 2, index: int = 0) -> Piece:
        strings = b"".join(f"{k}\0{v}\0".encode() for k, v in pairs.items())
        return self.libxl_record(2, self.pack("II", emulator, index) + strings)

    def emulator_context(self, data: bytes, *, emulator: int = 2, index: int = 0) -> Piece:
        return self.libxl_record(3, self.pack("II", emulator, index) + data)

    def checkpoint_end(self) -> Piece:
        return self.libxl_record(4)

    def checkpoint_state(self, control: int, padding: int = 0) -> Piece:
        return self.libxl_record(5, self.pack("II", control, padding))


LITTLE = Wire()
