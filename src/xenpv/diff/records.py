"""Comparison of the records of two streams, field by field; pages are in diff.py."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

from xenpv.abi.xen import SHARED_INFO, START_INFO
from xenpv.diff.fields import FieldDifference, compare_bytes, compare_structs, compare_values
from xenpv.errors import GuestError
from xenpv.source.config import Config
from xenpv.source.saved import SavedDomain
from xenpv.stream.contents import Contents, Vcpu
from xenpv.stream.framing import Record


def compare_records(a: SavedDomain, b: SavedDomain) -> Iterator[FieldDifference]:
    """Compare all records of two domains of one type and width."""
    contents = a.contents, b.contents
    yield from compare_values("stream", *map(_header_values, contents))
    configs = [Config.from_contents(stream_contents) for stream_contents in contents]
    yield from compare_bytes("configuration", *(None if config is None else config.text.encode() for config in configs))
    yield from compare_values("X86_TSC_INFO", *(_field_values(stream_contents.tsc) for stream_contents in contents))
    yield from compare_bytes("X86_CPUID_POLICY", *(_data(stream_contents.cpuid_policy) for stream_contents in contents))
    yield from compare_bytes("X86_MSR_POLICY", *(_data(stream_contents.msr_policy) for stream_contents in contents))
    yield from _compare_p2m(*contents)
    yield from _compare_start_info(a, b)
    yield from compare_structs("shared info", _shared_info(a), _shared_info(b))
    for vcpu in sorted({*contents[0].vcpus, *contents[1].vcpus}):
        yield from _compare_vcpu(vcpu, a, b)
    yield from compare_values("HVM_PARAMS", *map(_hvm_params, contents))
    yield from compare_bytes("HVM_CONTEXT", *(_data(stream_contents.hvm_context) for stream_contents in contents))
    emulators = [
        {(record.name, record.index): record.data for record in stream_contents.emulators}
        for stream_contents in contents
    ]
    for name, index in dict.fromkeys(chain(*emulators)):
        yield from compare_bytes(f"{name} {index}", *(records.get((name, index)) for records in emulators))


def _header_values(contents: Contents) -> dict[str, object]:
    domain, image = contents.domain, contents.image
    return {
        "envelope": None if contents.envelope is None else str(contents.envelope.kind),
        "version": None if image is None else image.version,
        "xen": None if domain is None else f"{domain.xen_major}.{domain.xen_minor}",
    }


def _field_values(record: Record | None) -> dict[str, object] | None:
    """Return the fixed fields of a record by name."""
    return None if record is None else {name: getattr(record, name) for name in record.FIELDS.names}


def _hvm_params(contents: Contents) -> dict[str, int] | None:
    """Return HVM parameters by index."""
    record = contents.hvm_params
    return None if record is None else {str(index): value for index, value in record.params.items()}


def _data(record: object) -> bytes | None:
    data = getattr(record, "data", None)
    return None if data is None else bytes(data)


def _compare_p2m(a: Contents, b: Contents) -> Iterator[FieldDifference]:
    if a.end_pfn != b.end_pfn:
        yield FieldDifference("p2m", "entries", f"{a.end_pfn + 1:#x}", f"{b.end_pfn + 1:#x}")
    runs_a, runs_b = a.p2m_leaf_runs, b.p2m_leaf_runs
    if not runs_a.equals(runs_b):
        yield FieldDifference("p2m", "frames", f"{len(runs_a)} runs", f"{len(runs_b)} other runs")


def _compare_start_info(a: SavedDomain, b: SavedDomain) -> Iterator[FieldDifference]:
    """Compare start info.

    An unreadable one is a difference, even if both are unreadable: its content is unknown.
    """
    start_infos, errors = [], []
    for saved in (a, b):
        try:
            start_infos.append(_start_info(saved))
            errors.append("" if start_infos[-1] is None else "readable")
        except GuestError as e:
            errors.append(f"unreadable: {e}")
    if len(start_infos) == 2:
        yield from compare_structs("start info", *start_infos)
    else:
        yield FieldDifference("start info", "", *(error or "absent" for error in errors))


def _start_info(saved: SavedDomain) -> np.void | None:
    """Return the start info; None if no vcpu names it.

    Raises:
        GuestError: its page cannot be read.
    """
    pfn = saved.start_info_pfn
    return None if pfn is None else START_INFO.read(saved.memory.page(pfn), saved.width)


def _shared_info(saved: SavedDomain) -> np.void | None:
    page = saved.shared_info()
    return None if page is None else SHARED_INFO.read(page, saved.width)


def _compare_vcpu(number: int, a: SavedDomain, b: SavedDomain) -> Iterator[FieldDifference]:
    yield from compare_structs(f"vcpu{number}", a.vcpu_context(number), b.vcpu_context(number))
    vcpus = [saved.contents.vcpus.get(number, Vcpu()) for saved in (a, b)]
    for name in ("extended", "xsave", "msrs"):
        records = [getattr(vcpu, name) for vcpu in vcpus]
        blobs = [None if record is None else record.context for record in records]
        yield from compare_bytes(f"vcpu{number} {name}", *blobs)
