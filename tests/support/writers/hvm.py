"""A minimal HVM domain: enough for framing, order and record checks."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import numpy as np

from tests.support.writers.build import pattern
from tests.support.writers.domain import CPUID_POLICY, MSR_POLICY
from tests.support.writers.envelopes import config_json, wrap
from tests.support.writers.stream import HVM, NOTAB, XALLOC, Stream, Wire
from xenpv.abi.hvm_save import HVM_HW_CPU

PARAMS = {1: 0xFEFFC, 2: 3, 17: 0xFEFFF, 18: 4, 19: 0xFEFF7}  # store and console: pfn and event channel; identity table


def hvm_context(cpus: Mapping[int, bytes] | None = None) -> bytes:
    """Xen's save records {u16 type, u16 instance, u32 length}: the header (1), vcpus (2) and the end (0)."""
    header = struct.pack("<IIQIIII", 0x54381286, 2, 0, 0x000306C3, 0, 0, 0)
    out = struct.pack("<HHI", 1, 0, len(header)) + header
    for number, data in (cpus or {}).items():
        out += struct.pack("<HHI", 2, number, len(data)) + data
    return out + struct.pack("<HHI", 0, 0, 0)


def cpu(**fields: int) -> bytes:
    """A vcpu's record, struct hvm_hw_cpu: what is not given is 0."""
    record = np.zeros(1, HVM_HW_CPU[8])
    for name, value in fields.items():
        record[name] = value
    return record.tobytes()


def hvm_stream(
    envelope: str = "xl",
    *,
    version: int = 3,
    pages: int = 16,
    batch: int = 8,
    context: bytes | None = None,
    content: Mapping[int, bytes] | None = None,
    config: bytes | None = None,
) -> Stream:
    """A saved HVM domain with ``pages`` pages from pfn 0 on, the last of them without content.

    ``content``: of pages that hold something else than a pattern. ``config`` takes the place of one that fits.
    """
    content = content or {}
    wire = Wire(version)
    static = [wire.cpuid_policy(CPUID_POLICY), wire.msr_policy(MSR_POLICY), wire.static_data_end()]
    stream = Stream([wire.image_header(), wire.domain_header(HVM), *(static if version >= 3 else [])])
    for first in range(0, pages, batch):
        entries = [(pfn, XALLOC if pfn == pages - 1 else NOTAB) for pfn in range(first, min(first + batch, pages))]
        stream.append(
            wire.page_data(entries, [content.get(pfn) or bytes(pattern(pfn)) for pfn, kind in entries if kind == NOTAB])
        )
    stream += [wire.tsc_info(), wire.hvm_params(PARAMS), wire.hvm_context(context or hvm_context()), wire.end()]
    keys = {"physmap/f0000000/start_addr": "f0000000", "physmap/f0000000/size": "800000"}
    if config is None and envelope == "xl":
        config = config_json("hvm", memory_kib=pages * 4) + b"\0"
    return wrap(
        stream,
        envelope,
        config=config,
        emulator=[wire.emulator_xenstore(keys), wire.emulator_context(b"QEVM" + bytes(60))],
    )
