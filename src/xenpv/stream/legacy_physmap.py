"""What libxl of before Xen 4.6 told of its device model's memory, in the words of today.

xen.git:tools/python/xen/migration/legacy.py 'Legacy "toolstack" record layout'
"""

from __future__ import annotations

import struct

_HEAD = struct.Struct("<II")
_ENTRY = struct.Struct("<QQQI")
_LEAKED = {4: 0, 8: 4}  # bytes of padding that end up behind the name, by the toolstack's long


def physmap(data: bytes | memoryview, width: int) -> bytes:
    """The toolstack's record as EMULATOR_XENSTORE_DATA has it: keys and values, each with its NUL.

    ``width``: bytes of the toolstack's long. Raises ValueError with a sentence.
    """
    if len(data) < _HEAD.size:
        raise ValueError(f"toolstack data of {len(data)} bytes is too short")
    version, count = _HEAD.unpack_from(data)
    if version != 1:
        raise ValueError(f"toolstack data of version {version}, which is not known")
    out, at = bytearray(), _HEAD.size
    for _ in range(count):
        if len(data) - at < _ENTRY.size:
            raise ValueError("toolstack data ends within an entry of the physmap")
        offset, start, size, length = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        name = bytes(data[at : at + length])
        at += length + _LEAKED[width]
        if at > len(data) or not name.endswith(b"\0") or b"\0" in name[:-1]:
            raise ValueError("a name in the toolstack's physmap does not end where it says")
        root = f"physmap/{offset:x}"
        numbers = f"{root}/start_addr\0{start:x}\0{root}/size\0{size:x}\0{root}/name\0"
        out += numbers.encode() + name
    return bytes(out)
