"""The xsave area of a vcpu, sound or broken."""

from __future__ import annotations

import struct


def xsave(xcr0: int, accum: int, area: int, xstate_bv: int = 3, *, xcomp_bv: int = 0, reserved: int = 0) -> bytes:
    """Return xcr0, xcr0_accum and an xsave area of so many bytes."""
    data = bytearray(max(area, 576))
    struct.pack_into("<QQQ", data, 512, xstate_bv, xcomp_bv, reserved)
    return struct.pack("<QQ", xcr0, accum) + bytes(data[:area])
