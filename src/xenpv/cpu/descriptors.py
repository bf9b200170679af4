"""Segment descriptors: which ones Xen lets no guest have.

Xen checks all 512 of a frame when the frame becomes part of a GDT or an LDT. It raises the privilege level of segments
to that of the guest's kernel, and so refuses none for its level.

Source: xen.git:xen/arch/x86/pv/descriptor-tables.c check_descriptor(), in Xen 4.14 x86_64/mm.c
"""

from __future__ import annotations

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import FIRST_RESERVED_GDT_ENTRY
from xenpv.frames import U8, Mask

_PRESENT, _NO_SYSTEM, _LONG = 1 << 15, 1 << 12, 1 << 21
_TYPE, _CALL_GATE = 0xF00, 0xC00
_IN_LDT = 4
_KERNEL_CS = {8: 0xE033, 4: 0xE019}  # Xen's own, which guests may use
_RESERVED = {8: 0xFF, 4: 0xE0}  # of a call gate


def refused_descriptors(pages: U8, width: Width) -> Mask:
    """Return which descriptors Xen refuses.

    Args:
        pages: Frames of descriptors, uint8 of shape (n, 4096).
        width: Bytes of the guest's unsigned long.

    Returns:
        bool of shape (n, 512).
    """
    words = pages.reshape(len(pages), -1).view("<u4").reshape(len(pages), -1, 2)
    low, high = words[:, :, 0], words[:, :, 1]
    present = high & _PRESENT != 0
    system = high & _NO_SYSTEM == 0
    selector = low >> 16
    target_allowed = (
        (selector >> 3 < FIRST_RESERVED_GDT_ENTRY) | (selector == _KERNEL_CS[width]) | (selector & _IN_LDT != 0)
    )
    is_gate = (high & _TYPE == _CALL_GATE) & target_allowed & (high & _RESERVED[width] == 0)
    refused = present & system & (high & _TYPE != 0) & ~is_gate
    if width == 4:
        refused |= present & ~system & (high & _LONG != 0)
    return np.asarray(refused)


def describe_refused(page: U8, index: int) -> str:
    """Return what is wrong with a descriptor that Xen refuses.

    Args:
        page: The frame, uint8 of shape (4096,).
        index: Which of its 512 descriptors.
    """
    low, high = page[index * 8 : index * 8 + 8].view("<u4").tolist()
    if high & _NO_SYSTEM:
        problem = "is a 64-bit segment, in a 32-bit guest"
    elif high & _TYPE == _CALL_GATE:
        problem = f"is a call gate to selector {low >> 16:#x}, or has reserved bits"
    else:
        problem = f"is a present system descriptor of type {(high & _TYPE) >> 8:#x}, and no call gate"
    return f"descriptor {index} ({high << 32 | low:#018x}) {problem}"
