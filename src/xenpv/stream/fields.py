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
from xenpv.stream.order import Guest

Buffer = bytes | bytearray | memoryview
"""Bytes to be written, as they lie: a memoryview may be a page of a guest, mapped."""

_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


@dataclass(slots=True)
class RecordContext:
    """What reading or writing one record needs to know of the stream around it.

    ``report(rule, message)`` raises or collects; a check that calls it for something that makes the record useless then
    says so. ``order`` is "<" or ">"; ``max_pfn`` the last pfn that P2M_FRAMES allow, None for HVM.
    """

    report: Callable[[Rule, str], None]
    order: str = "<"
    version: int = 3
    guest: Guest = Guest.PV
    width: Width | None = None
    max_pfn: int | None = None

    def check_reserved(self, name: str, *values: int) -> None:
        if any(values):
            self.report(rules.RESERVED, f"reserved bits set in {name}: {', '.join(hex(v) for v in values)}")


class Fields:
    """Unsigned fields, one behind the other, each by its name and its size in bytes (1, 2, 4 or 8).

    Those whose name begins with "_" are reserved: written as 0, and ``read`` faults when they are not.

    >>> head = Fields(vcpu_id=4, _reserved=4)
    >>> head.pack(vcpu_id=3).hex(), head.size
    ('0300000000000000', 8)
    """

    def __init__(self, **sizes: int) -> None:
        codes = "".join(_CODES[size] for size in sizes.values())
        self._layouts = {order: struct.Struct(order + codes) for order in "<>"}
        self.size = self._layouts["<"].size
        self.names = tuple(name for name in sizes if not name.startswith("_"))
        self._named = tuple((at, name) for at, name in enumerate(sizes) if not name.startswith("_"))
        self._reserved = tuple(at for at, name in enumerate(sizes) if name.startswith("_"))
        self._count = len(sizes)

    def unpack(self, body: Buffer, order: str = "<") -> tuple[int, ...]:
        """All of them, reserved ones too, from the start of a body that is long enough; ``order`` is "<" or ">"."""
        return self._layouts[order].unpack_from(body)

    def read(self, ctx: RecordContext, name: str, body: memoryview) -> dict[str, Any]:
        """The values by name; ``name`` is what a fault calls the whole."""
        values = self.unpack(body, ctx.order)
        if self._reserved:
            ctx.check_reserved(name, *(values[at] for at in self._reserved))
        return {name: values[at] for at, name in self._named}

    def pack(self, order: str = "<", /, **values: int) -> bytes:
        """As bytes. Raises OverflowError for a value that its field cannot hold."""
        numbers = [0] * self._count
        for at, name in self._named:
            numbers[at] = values[name]
        try:
            return self._layouts[order].pack(*numbers)
        except struct.error as e:
            raise OverflowError(f"{', '.join(f'{name} {values[name]:#x}' for name in self.names)}: {e}") from None


def swapped_words(words: Buffer) -> bytes:
    """64-bit words in the other byte order."""
    swapped = array("Q", bytes(words))
    swapped.byteswap()
    return swapped.tobytes()
