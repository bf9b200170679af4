"""Fixed fields of headers and records: one declaration reads them and writes them."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xenpv.abi.declare import Width
from xenpv.findings import Rule
from xenpv.stream import rules
from xenpv.stream.record_order import Guest

Buffer = bytes | bytearray | memoryview
"""Bytes to be written, without copying: a memoryview may be a mapped page of a guest."""

_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


@dataclass(slots=True)
class RecordContext:
    """The facts about a stream that the checks of its records need.

    Attributes:
        report: called with the rule and a message for each breach; may raise.
        byte_order: "<" or ">".
        version: of the libxc stream, 2 or 3.
        guest: PV or HVM.
        width: bytes of the guest's unsigned long; None before X86_PV_INFO.
        max_pfn: the last pfn of the p2m; None for HVM, and before X86_PV_P2M_FRAMES.
    """

    report: Callable[[Rule, str], None]
    byte_order: str = "<"
    version: int = 3
    guest: Guest = Guest.PV
    width: Width | None = None
    max_pfn: int | None = None

    def check_reserved(self, name: str, *values: int) -> None:
        """Report reserved fields of the named record that are not 0."""
        if any(values):
            self.report(rules.RESERVED, f"reserved bits set in {name}: {', '.join(map(hex, values))}")


class Fields:
    """Consecutive unsigned fields, each with its name and size (1, 2, 4 or 8 bytes).

    A field whose name begins with "_" is reserved: ``pack`` writes 0, and ``read`` reports other values.

    >>> head = Fields(vcpu_id=4, _reserved=4)
    >>> head.pack(vcpu_id=3).hex(), head.size
    ('0300000000000000', 8)
    """

    def __init__(self, **sizes: int) -> None:
        codes = "".join(_CODES[size] for size in sizes.values())
        self._layouts = {order: struct.Struct(order + codes) for order in "<>"}
        self.size = self._layouts["<"].size
        self.names = tuple(name for name in sizes if not name.startswith("_"))
        self._named = tuple((index, name) for index, name in enumerate(sizes) if not name.startswith("_"))
        self._reserved = tuple(index for index, name in enumerate(sizes) if name.startswith("_"))
        self._count = len(sizes)

    def unpack(self, body: Buffer, byte_order: str = "<") -> tuple[int, ...]:
        """Return all values, with reserved ones, from the start of a long enough body."""
        return self._layouts[byte_order].unpack_from(body)

    def read(self, ctx: RecordContext, name: str, body: memoryview) -> dict[str, Any]:
        """Return the values by name, without reserved ones.

        ``name``: of the record, for reports.
        """
        values = self.unpack(body, ctx.byte_order)
        if self._reserved:
            ctx.check_reserved(name, *(values[index] for index in self._reserved))
        return {name: values[index] for index, name in self._named}

    def pack(self, byte_order: str = "<", /, **values: int) -> bytes:
        """Return the fields as bytes.

        Raises OverflowError for a value that its field cannot hold.
        """
        numbers = [0] * self._count
        for index, name in self._named:
            numbers[index] = values[name]
        try:
            return self._layouts[byte_order].pack(*numbers)
        except struct.error as e:
            raise OverflowError(f"{', '.join(f'{name} {values[name]:#x}' for name in self.names)}: {e}") from None


def byteswap_words(words: Buffer) -> bytes:
    """Return 64-bit words in the other byte order."""
    swapped = array("Q", bytes(words))
    swapped.byteswap()
    return swapped.tobytes()
