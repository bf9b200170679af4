"""Comparison of structs, dictionaries and bytes by the names of members."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_RANGES_MAX = 8  # differing ranges of bytes that are described
_ELEMENTS_MAX = 64  # differing elements of one array that are described


@dataclass(frozen=True)
class FieldDifference:
    """One member that differs.

    Attributes:
        where: the record or struct, such as "vcpu0 basic".
        name: the member; empty if one of the two has no such record.
        a: its value in the first domain, for people.
        b: its value in the second domain.
    """

    where: str
    name: str
    a: str
    b: str


def compare_values(where: str, a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> Iterator[FieldDifference]:
    """Compare two dictionaries by key; None is an absent one."""
    if a is None or b is None:
        yield from _compare_presence(where, a, b)
        return
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name):
            yield FieldDifference(where, name, _format(a.get(name)), _format(b.get(name)))


def compare_structs(where: str, a: np.void | None, b: np.void | None) -> Iterator[FieldDifference]:
    """Compare two structs of one dtype by member.

    Nested members have paths; padding does not count.
    """
    if a is None or b is None:
        yield from _compare_presence(where, a, b)
        return
    yield from _compare_members(where, "", a, b)


def compare_bytes(where: str, a: bytes | None, b: bytes | None) -> Iterator[FieldDifference]:
    """Compare two blobs by the ranges of bytes that differ; None is an absent one."""
    if a is None or b is None:
        yield from _compare_presence(where, a, b)
    elif len(a) != len(b):
        yield FieldDifference(where, "length", f"{len(a)} bytes", f"{len(b)} bytes")
    else:
        ranges = differing_ranges(a, b)
        for start, end in ranges[:_RANGES_MAX]:
            name = f"bytes {start:#x} to {end - 1:#x}"
            yield FieldDifference(where, name, _hex(a[start:end]), _hex(b[start:end]))
        if len(ranges) > _RANGES_MAX:
            more = str(len(ranges) - _RANGES_MAX)
            yield FieldDifference(where, "more ranges", more, more)


def differing_ranges(a: bytes, b: bytes) -> list[tuple[int, int]]:
    """Return the ranges in which two blobs of one length differ.

    A range is the offset of its first byte, and the offset after the last.
    """
    differs = np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)
    edges = np.flatnonzero(np.diff(differs, prepend=False, append=False))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _compare_presence(where: str, a: object, b: object) -> Iterator[FieldDifference]:
    """Compare two values if one or both are absent."""
    if a is not b:
        yield FieldDifference(where, "", *("absent" if value is None else "present" for value in (a, b)))


def _compare_members(where: str, path: str, a: Any, b: Any) -> Iterator[FieldDifference]:
    for name in a.dtype.fields or ():
        if not name.lstrip("_").startswith("pad"):
            yield from _compare_member(where, f"{path}.{name}" if path else name, a[name], b[name])


def _compare_member(where: str, path: str, a: Any, b: Any) -> Iterator[FieldDifference]:
    """Compare one member: a nested struct, an array or a scalar."""
    if a.tobytes() == b.tobytes():
        return
    if a.dtype.fields and not a.shape:
        yield from _compare_members(where, path, a, b)
    elif a.shape:
        raw = [np.ascontiguousarray(array).view(np.uint8).reshape(-1, a.dtype.itemsize) for array in (a, b)]
        differing = np.flatnonzero((raw[0] != raw[1]).any(axis=1)).tolist()
        for i in differing[:_ELEMENTS_MAX]:
            yield from _compare_member(where, f"{path}[{i}]", a[i], b[i])
        if len(differing) > _ELEMENTS_MAX:
            more = f"{len(differing) - _ELEMENTS_MAX} more"
            yield FieldDifference(where, f"{path}[…]", more, more)
    else:
        yield FieldDifference(where, path, _format(a.item()), _format(b.item()))


def _format(value: Any) -> str:
    if value is None:
        return "absent"
    if isinstance(value, int):
        return f"{value:#x}"
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _hex(data: bytes) -> str:
    return data[:16].hex() + ("…" if len(data) > 16 else "")
