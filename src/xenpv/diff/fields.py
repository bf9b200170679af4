"""Structs, dictionaries and bytes compared: which members differ, by their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_RANGES = 8  # of bytes that differ, told one by one
_MEMBERS = 64  # of one struct or array


@dataclass(frozen=True)
class Field:
    """One member that differs: ``where`` ("vcpu0 basic"), its ``name``, and what it is in both, for people."""

    where: str
    name: str
    a: str
    b: str


def differing(where: str, a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> Iterator[Field]:
    """Members of two dictionaries; None where one is not there at all."""
    if a is None or b is None:
        if a is not b:
            yield Field(where, "", _there(a), _there(b))
        return
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name):
            yield Field(where, name, _shown(a.get(name)), _shown(b.get(name)))


def structs_differ(where: str, a: np.void | None, b: np.void | None) -> Iterator[Field]:
    """Members of two structs of one dtype, those of nested ones by their paths; what is padding is passed over."""
    if a is None or b is None:
        if a is not b:
            yield Field(where, "", _there(a), _there(b))
        return
    yield from _members(where, "", a, b)


def bytes_differ(where: str, a: bytes | None, b: bytes | None) -> Iterator[Field]:
    """Two blobs, by the ranges that differ."""
    if a == b:
        return
    if a is None or b is None:
        yield Field(where, "", _there(a), _there(b))
    elif len(a) != len(b):
        yield Field(where, "length", f"{len(a)} bytes", f"{len(b)} bytes")
    else:
        told = ranges(a, b)
        for first, behind in told[:_RANGES]:
            name = f"bytes {first:#x} to {behind - 1:#x}"
            yield Field(where, name, _hex(a[first:behind]), _hex(b[first:behind]))
        if len(told) > _RANGES:
            yield Field(where, "more ranges", str(len(told) - _RANGES), str(len(told) - _RANGES))


def ranges(a: bytes, b: bytes) -> list[tuple[int, int]]:
    """The runs of bytes in which two blobs of one length differ: first, and behind the last."""
    apart = np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)
    edges = np.flatnonzero(np.diff(apart, prepend=False, append=False))
    return [(int(first), int(behind)) for first, behind in edges.reshape(-1, 2)]


def _members(where: str, path: str, a: Any, b: Any) -> Iterator[Field]:
    fields = a.dtype.fields
    if fields:
        for name in fields:
            if not name.lstrip("_").startswith("pad"):
                yield from _values(where, f"{path}.{name}" if path else name, a[name], b[name])


def _values(where: str, path: str, a: Any, b: Any) -> Iterator[Field]:
    if a.tobytes() == b.tobytes():
        return
    if a.dtype.fields and not a.shape:
        yield from _members(where, path, a, b)
    elif a.shape:
        size = a.dtype.itemsize
        raw = [np.ascontiguousarray(one).view(np.uint8).reshape(-1, size) for one in (a, b)]
        apart = np.flatnonzero((raw[0] != raw[1]).any(axis=1)).tolist()
        for at in apart[:_MEMBERS]:
            yield from _values(where, f"{path}[{at}]", a[at], b[at])
        if len(apart) > _MEMBERS:
            yield Field(where, f"{path}[…]", f"{len(apart) - _MEMBERS} more", f"{len(apart) - _MEMBERS} more")
    else:
        yield Field(where, path, _shown(a.item()), _shown(b.item()))


def _shown(value: Any) -> str:
    if value is None:
        return "absent"
    if isinstance(value, int):
        return f"{value:#x}"
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _there(value: object) -> str:
    return "absent" if value is None else "present"


def _hex(data: bytes) -> str:
    return data[:16].hex() + ("…" if len(data) > 16 else "")
