"""What two streams say of their domains beside pages: every record, field by field."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

from xenpv.abi.xen import SHARED_INFO, START_INFO
from xenpv.diff.fields import Field, bytes_differ, differing, structs_differ
from xenpv.errors import Fault
from xenpv.source.config import config_of
from xenpv.source.saved import SavedDomain
from xenpv.stream.contents import Contents, Vcpu
from xenpv.stream.framing import Record


def records_differ(a: SavedDomain, b: SavedDomain) -> Iterator[Field]:
    """Of two streams of domains of one type and width."""
    one, other = a.contents, b.contents
    yield from differing("stream", _headers(one), _headers(other))
    configs = [None if config is None else config.text for config in map(config_of, (one, other))]
    yield from bytes_differ("configuration", *(None if text is None else text.encode() for text in configs))
    yield from differing("X86_TSC_INFO", _members(one.tsc), _members(other.tsc))
    yield from bytes_differ("X86_CPUID_POLICY", _data(one.cpuid_policy), _data(other.cpuid_policy))
    yield from bytes_differ("X86_MSR_POLICY", _data(one.msr_policy), _data(other.msr_policy))
    yield from _p2m(one, other)
    yield from structs_differ("start info", _start_info(a), _start_info(b))
    yield from structs_differ("shared info", _shared_info(a), _shared_info(b))
    for number in sorted({*one.vcpus, *other.vcpus}):
        yield from _vcpu(number, a, b)
    params = [
        None if c.hvm_params is None else {str(k): v for k, v in c.hvm_params.params.items()} for c in (one, other)
    ]
    yield from differing("HVM_PARAMS", *params)
    yield from bytes_differ("HVM_CONTEXT", _data(one.hvm_context), _data(other.hvm_context))
    emulators = [{(e.name, e.index): e.data for e in c.emulators} for c in (one, other)]
    for name, index in dict.fromkeys(chain(*emulators)):
        yield from bytes_differ(f"{name} {index}", *(found.get((name, index)) for found in emulators))


def _headers(contents: Contents) -> dict[str, object]:
    domain, image = contents.domain, contents.image
    return {
        "envelope": None if contents.envelope is None else str(contents.envelope.kind),
        "version": None if image is None else image.version,
        "xen": None if domain is None else f"{domain.xen_major}.{domain.xen_minor}",
    }


def _members(record: Record | None) -> dict[str, object] | None:
    return None if record is None else {name: getattr(record, name) for name in record.FIELDS.names}


def _data(record: object) -> bytes | None:
    data = getattr(record, "data", None)
    return None if data is None else bytes(data)


def _p2m(a: Contents, b: Contents) -> Iterator[Field]:
    if a.end_pfn != b.end_pfn:
        yield Field("p2m", "entries", f"{a.end_pfn + 1:#x}", f"{b.end_pfn + 1:#x}")
    if not a.p2m_leaf_runs.equals(b.p2m_leaf_runs):
        yield Field("p2m", "frames", f"{len(a.p2m_leaf_runs)} runs", f"{len(b.p2m_leaf_runs)} other runs")


def _start_info(saved: SavedDomain) -> np.void | None:
    pfn = saved.start_info_pfn
    if pfn is None:
        return None
    try:
        return START_INFO.read(saved.memory.page(pfn), saved.width)
    except Fault:
        return None


def _shared_info(saved: SavedDomain) -> np.void | None:
    page = saved.shared_info()
    return None if page is None else SHARED_INFO.read(page, saved.width)


def _vcpu(number: int, a: SavedDomain, b: SavedDomain) -> Iterator[Field]:
    yield from structs_differ(f"vcpu{number}", a.vcpu_context(number), b.vcpu_context(number))
    found = [one.contents.vcpus.get(number, Vcpu()) for one in (a, b)]
    for name in ("extended", "xsave", "msrs"):
        blobs = [getattr(vcpu, name) for vcpu in found]
        yield from bytes_differ(f"vcpu{number} {name}", *(None if blob is None else blob.context for blob in blobs))
