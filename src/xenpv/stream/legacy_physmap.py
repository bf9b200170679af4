"""The physmap of a legacy device model, converted to the records of today.

xen.git:tools/python/xen/migration/legacy.py 'Legacy "toolstack" record layout'
"""

from __future__ import annotations

import struct

_HEAD = struct.Struct("<II")
_ENTRY = struct.Struct("<QQQI")
_PADDING = {4: 0, 8: 4}  # bytes of padding after each name, by the toolstack's long


def convert_physmap(data: bytes | memoryview, long: int) -> bytes:
    """Convert the toolstack's record to EMULATOR_XENSTORE_DATA.

    That is keys and values, each NUL-terminated.

    Args:
        data: the record.
        long: bytes of the toolstack's long.

    Raises:
        ValueError: the record is malformed; the message says how.
    """
    if len(data) < _HEAD.size:
        raise ValueError(f"toolstack data of {len(data)} bytes is too short")
    version, count = _HEAD.unpack_from(data)
    if version != 1:
        raise ValueError(f"toolstack data of version {version}, which is unknown")
    out, position = bytearray(), _HEAD.size
    for _ in range(count):
        if len(data) - position < _ENTRY.size:
            raise ValueError("toolstack data ends within an entry of the physmap")
        offset, start, size, length = _ENTRY.unpack_from(data, position)
        position += _ENTRY.size
        name = bytes(data[position : position + length])
        position += length + _PADDING[long]
        if position > len(data) or not name.endswith(b"\0") or b"\0" in name[:-1]:
            raise ValueError("a name in the toolstack's physmap does not end at its length")
        root = f"physmap/{offset:x}"
        numbers = f"{root}/start_addr\0{start:x}\0{root}/size\0{size:x}\0{root}/name\0"
        out += numbers.encode() + name
    return bytes(out)
