"""The body of an HVM_CONTEXT record, which has records of its own.

Source: xen.git:xen/include/public/hvm/save.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from xenpv.abi.hvm_save import CPU, END, HVM_HW_CPU
from xenpv.errors import StreamError
from xenpv.findings import Rule
from xenpv.stream import rules

DAMAGED = Rule(
    "hvm-context", "Xen's own records in HVM_CONTEXT fit it, and end with END", "xen/common/hvm/save.c hvm_load()"
)

_DESCRIPTOR = struct.Struct("<HHI")  # abi.hvm_save.DESCRIPTOR
_CPU_MIN = HVM_HW_CPU.offset(8, "msr_efer") + 8  # bytes that a vcpu's record has at least, in all versions of Xen


class Entry(NamedTuple):
    """One record: its type, its instance (the number of a vcpu), and its content."""

    typecode: int
    instance: int
    data: bytes


def iter_entries(context: bytes, *, offset: int) -> Iterator[Entry]:
    """Yield the records before END.

    ``offset``: of the context, for errors. Raises Malformed where one does not fit.
    """
    position = 0
    while True:
        if position + _DESCRIPTOR.size > len(context):
            raise _breach(f"no END among {len(context)} bytes", offset + position)
        typecode, instance, length = _DESCRIPTOR.unpack_from(context, position)
        if typecode == END:
            return
        position += _DESCRIPTOR.size
        if length > len(context) - position:
            message = f"a record of type {typecode} has {length} bytes, and {len(context) - position} are left"
            raise _breach(message, offset + position - _DESCRIPTOR.size)
        yield Entry(typecode, instance, context[position : position + length])
        position += length


def _breach(message: str, offset: int) -> StreamError:
    return rules.breach(DAMAGED, message, offset=offset, record="HVM_CONTEXT")


def read_vcpus(context: bytes, *, offset: int) -> dict[int, np.void]:
    """Return the vcpus by number, as abi.hvm_save.HVM_HW_CPU structs.

    Raises Malformed.
    """
    vcpus = {}
    for entry in iter_entries(context, offset=offset):
        if entry.typecode == CPU:
            if len(entry.data) < _CPU_MIN:
                message = f"vcpu {entry.instance} has {len(entry.data)} bytes, {_CPU_MIN} or more are needed"
                raise _breach(message, offset)
            vcpus[entry.instance] = HVM_HW_CPU.read(entry.data.ljust(HVM_HW_CPU.size(8), b"\0"), 8)
    return vcpus
