"""The index of a large save file, kept beside it: ``web.save.xpvi``.

It says where pages lie, and nothing that a guest had in its memory: all other records are read from the save file
itself, again and again. It counts as long as the file is the same, by its size, its time and a fingerprint of its
content; one that is not, or that somebody else could have written, or that cannot be true, is passed by. Whatever else
is wrong in it could only name other places of the same save file.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from xenpv.errors import RequestError
from xenpv.frames import HAS_DATA, IS_KNOWN, PAGE_SIZE
from xenpv.io.atomic_output import Output
from xenpv.io.stream_input import Input
from xenpv.runs import Extents
from xenpv.stream.contents import Contents
from xenpv.stream.events import SkippedPageData
from xenpv.stream.index import PageIndex

SUFFIX = ".xpvi"

_MAGIC = b"xenpvi\0\1"  # the last byte is the version
# Magic, size, mtime, start, fingerprint; how many extents, runs, pfns twice; PageIndex.sent, repeated.
_HEADER = struct.Struct("<8sQQQ16sQQQQQ")
_DIGEST = 16
_EXTENT = np.dtype([("start", "<u8"), ("pages", "<i8"), ("offset", "<i8"), ("type", "<u8")])
_RUN = np.dtype([(name, "<i8") for name in ("offset", "size", "length", "count", "pages")])
_TWICE = np.dtype([("pfn", "<u8"), ("offset", "<i8")])
_TWICE_MAX = 4096
_RECORD = 8  # bytes of a record's header
_SAMPLES, _SAMPLE = 64, 4096
_ENDS = 1 << 16  # bytes of both ends of the file that the fingerprint takes in


class State(NamedTuple):
    """What a file is known again by."""

    size: int
    mtime: int
    start: int
    fingerprint: bytes

    @classmethod
    def of(cls, source: Input) -> Self:
        """Of an open file, now."""
        info = os.fstat(source.fd)
        seen = blake2b(digest_size=_DIGEST)
        step = max(1, info.st_size // _SAMPLES)
        for at in range(0, info.st_size, step):
            seen.update(os.pread(source.fd, _SAMPLE, at))
        for at in (source.start, max(0, info.st_size - _ENDS)):
            seen.update(os.pread(source.fd, _ENDS, at))
        return cls(info.st_size, info.st_mtime_ns, source.start, seen.digest())


@dataclass(frozen=True, slots=True)
class KeptIndex:
    """An index, and the runs of PAGE_DATA that it stands for, by their offset."""

    index: PageIndex
    passing: dict[int, SkippedPageData]

    @classmethod
    def load(cls, path: str, source: Input) -> Self | None:
        """The index kept beside the save file at ``path``; None where there is none that counts."""
        try:
            fd = os.open(path + SUFFIX, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            info = os.fstat(fd)
            owners = {os.geteuid(), os.fstat(source.fd).st_uid}
            if not stat.S_ISREG(info.st_mode) or info.st_mode & 0o022 or info.st_uid not in owners:
                return None
            return cls._of(fd, info.st_size, State.of(source))
        except OSError:
            return None
        finally:
            os.close(fd)

    @classmethod
    def _of(cls, fd: int, size: int, state: State) -> Self | None:
        head = os.pread(fd, _HEADER.size, 0)
        if len(head) < _HEADER.size:
            return None
        magic, *same, rows, runs, twice, sent, repeated = _HEADER.unpack(head)
        if magic != _MAGIC or tuple(same) != state:
            return None
        stream = state.size - state.start
        # An entry of a stream takes 8 bytes of it, and a record more; so many there can be, and no more are read.
        if rows > stream // 8 or runs > stream // 16 or twice > _TWICE_MAX or max(sent, repeated) > stream // 8:
            return None
        arrays = [(_EXTENT, rows), (_RUN, runs), (_TWICE, twice)]
        if size != _HEADER.size + sum(dtype.itemsize * count for dtype, count in arrays) + _DIGEST:
            return None
        body = os.pread(fd, size - _HEADER.size, _HEADER.size)
        if len(body) != size - _HEADER.size or _digest(head, body[:-_DIGEST]) != body[-_DIGEST:]:
            return None
        found, at = [], 0
        for dtype, count in arrays:
            found.append(np.frombuffer(body, dtype, count, at))
            at += dtype.itemsize * count
        if not (_possible_extents(found[0], stream) and _possible_runs(found[1], stream)):
            return None
        of = found[0]
        extents = Extents(of["start"].copy(), of["pages"].copy(), of["type"].astype(np.uint8))
        index = PageIndex.from_extents(extents, of["offset"].copy())
        index.sent, index.repeated = sent, repeated
        index.duplicates = [(int(pfn), int(offset)) for pfn, offset in found[2].tolist()]
        return cls(index, {run[0]: SkippedPageData(*run) for run in found[1].tolist()})


def keep(path: str, source: Input, contents: Contents, state: State) -> bool:
    """Keep the index of a stream that was read whole, beside its file; whether that could be done.

    ``state``: of the file before it was read. Nothing is kept of a file that has changed since, and nothing but an
    older index is ever replaced.
    """
    runs = _runs(contents)
    if runs is None or State.of(source) != state or not _replaceable(path + SUFFIX):
        return False
    known = contents.index.extents
    extents = np.empty(len(known), _EXTENT)
    extents["start"], extents["pages"], extents["type"] = known.first, known.pages, known.type
    extents["offset"] = contents.index.offsets(known.first)
    twice = np.array(contents.index.duplicates[:_TWICE_MAX], _TWICE)
    counts = len(extents), len(runs), len(twice), contents.index.sent, contents.index.repeated
    head = _HEADER.pack(_MAGIC, *state, *counts)
    body = extents.tobytes() + runs.tobytes() + twice.tobytes()
    try:
        with Output.open(path + SUFFIX) as out:
            out.write([head, body, _digest(head, body)])
    except (OSError, RequestError):
        return False  # a folder that is not ours to write to, a full disk: it was only to be faster the next time
    return True


def _runs(contents: Contents) -> npt.NDArray[Any] | None:
    """The runs of PAGE_DATA; None if they are not as they would be passed over."""
    rows = []
    for run, behind in pairwise(contents.record_groups):
        if run.name == "PAGE_DATA":
            size = run.length + run.count * _RECORD
            if run.offset + size != behind.offset:
                return None
            rows.append((run.offset, size, run.length, run.count, run.pages))
    return np.array(rows, _RUN) if contents.complete else None


def _replaceable(path: str) -> bool:
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(len(_MAGIC) - 1) == _MAGIC[:-1]
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _digest(head: bytes, body: bytes) -> bytes:
    return blake2b(head + body, digest_size=_DIGEST).digest()


def _possible_extents(of: npt.NDArray[Any], stream: int) -> bool:
    start, pages, offset, kind = of["start"], of["pages"], of["offset"], of["type"]
    if not len(of):
        return True
    if not ((pages > 0) & (pages <= stream // 8) & (start < 1 << 52) & (kind < 16)).all():
        return False
    if int(pages.sum()) > stream // 8 or (start[1:] < start[:-1] + pages[:-1].astype(np.uint64)).any():
        return False
    with_content = offset >= 0
    if not (IS_KNOWN[kind].all() and (HAS_DATA[kind] | ~with_content).all()):
        return False
    return bool((offset[with_content] <= stream - pages[with_content] * PAGE_SIZE).all())


def _possible_runs(of: npt.NDArray[Any], stream: int) -> bool:
    if not len(of):
        return True
    offset, size = of["offset"], of["size"]
    numbers = np.stack([of[name] for name in of.dtype.names or ()])
    if (numbers < 0).any() or (numbers > stream).any() or (size < 2 * _RECORD).any():
        return False
    return bool((offset[1:] >= (offset + size)[:-1]).all() and int(offset[-1]) + int(size[-1]) <= stream)
