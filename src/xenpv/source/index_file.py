"""The stored index of a large save file: ``web.save.xpvi`` beside ``web.save``.

It holds the places of pages, and no guest memory. All other records are read from the save file itself
each time. The index is used while the save file has the same size, time and fingerprint. An index that somebody else
could have written, or that is impossible, is ignored. Any other error in it can only lead to other places of the same
save file.
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
from xenpv.io.stream_input import StreamSource
from xenpv.memory.page_tables import NO_PFN
from xenpv.runs import Extents
from xenpv.stream.contents import Contents
from xenpv.stream.events import SkippedPageData
from xenpv.stream.index import PageIndex

SUFFIX = ".xpvi"

_MAGIC = b"xenpvi\0\1"  # the last byte is the version
# Magic; size, mtime, start, fingerprint; number of extents, groups of PAGE_DATA, duplicates; PageIndex.sent, repeated.
_HEADER = struct.Struct("<8sQQQ16sQQQQQ")
_DIGEST_SIZE = 16
_EXTENT = np.dtype([("first", "<u8"), ("pages", "<i8"), ("offset", "<i8"), ("type", "<u8")])
_PAGE_DATA = np.dtype([(name, "<i8") for name in ("offset", "size", "length", "count", "pages")])
_DUPLICATE = np.dtype([("pfn", "<u8"), ("offset", "<i8")])
_DUPLICATES_MAX = 4096
_RECORD_HEADER = 8  # bytes
# The fingerprint covers so many samples of so many bytes, and so many bytes at both ends of the file.
_SAMPLES, _SAMPLE_SIZE = 64, 4096
_END_SIZE = 1 << 16


class FileState(NamedTuple):
    """The values by which an unchanged save file is recognised.

    Attributes:
        size: Bytes.
        mtime: Time of the last change, in nanoseconds.
        start: The offset of the stream.
        fingerprint: A digest of samples.
    """

    size: int
    mtime: int
    start: int
    fingerprint: bytes

    @classmethod
    def from_source(cls, source: StreamSource) -> Self:
        """Return the state of an open file, now."""
        info = os.fstat(source.fd)
        digest = blake2b(digest_size=_DIGEST_SIZE)
        for offset in range(0, info.st_size, max(1, info.st_size // _SAMPLES)):
            digest.update(os.pread(source.fd, _SAMPLE_SIZE, offset))
        for offset in (source.start, max(0, info.st_size - _END_SIZE)):
            digest.update(os.pread(source.fd, _END_SIZE, offset))
        return cls(info.st_size, info.st_mtime_ns, source.start, digest.digest())


@dataclass(frozen=True, slots=True)
class StoredIndex:
    """An index out of a file.

    Attributes:
        index: The index.
        page_data: The groups of PAGE_DATA records that it stands for, by their offset.
    """

    index: PageIndex
    page_data: dict[int, SkippedPageData]

    @classmethod
    def load(cls, path: str, source: StreamSource) -> Self | None:
        """Return the index stored beside the save file at ``path``.

        None if there is none, or if it does not fit the file.
        """
        try:
            fd = os.open(path + SUFFIX, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            info = os.fstat(fd)
            owners = {os.geteuid(), os.fstat(source.fd).st_uid}
            if not stat.S_ISREG(info.st_mode) or info.st_mode & 0o022 or info.st_uid not in owners:
                return None
            return cls._parse(fd, info.st_size, FileState.from_source(source))
        except OSError:
            return None
        finally:
            os.close(fd)

    @classmethod
    def _parse(cls, fd: int, size: int, state: FileState) -> Self | None:
        """Return the index in an open index file.

        Args:
            fd: The index file.
            size: Its size in bytes.
            state: The state of the save file.

        Returns:
            None if the index is for another state, or cannot be true.
        """
        header = os.pread(fd, _HEADER.size, 0)
        if len(header) < _HEADER.size:
            return None
        magic, *stored_state, extent_count, page_data_count, duplicate_count, sent, repeated = _HEADER.unpack(header)
        if magic != _MAGIC or tuple(stored_state) != state:
            return None
        # An entry of a stream takes 8 bytes, a record more. Counts beyond that are false; memory stays bounded.
        stream_size = state.size - state.start
        if max(extent_count, sent, repeated) > stream_size // 8 or page_data_count > stream_size // 16:
            return None
        if duplicate_count > _DUPLICATES_MAX:
            return None
        counts = [(_EXTENT, extent_count), (_PAGE_DATA, page_data_count), (_DUPLICATE, duplicate_count)]
        if size != _HEADER.size + sum(dtype.itemsize * count for dtype, count in counts) + _DIGEST_SIZE:
            return None
        body = os.pread(fd, size - _HEADER.size, _HEADER.size)
        if len(body) != size - _HEADER.size or _digest(header, body[:-_DIGEST_SIZE]) != body[-_DIGEST_SIZE:]:
            return None
        arrays, offset = [], 0
        for dtype, count in counts:
            arrays.append(np.frombuffer(body, dtype, count, offset))
            offset += dtype.itemsize * count
        extents, page_data, duplicates = arrays
        if not _are_possible_duplicates(duplicates, stream_size):
            return None
        if not (_are_possible_extents(extents, stream_size) and _is_possible_page_data(page_data, stream_size)):
            return None
        runs = Extents(extents["first"].copy(), extents["pages"].copy(), extents["type"].astype(np.uint8))
        index = PageIndex.from_extents(runs, extents["offset"].copy())
        index.sent, index.repeated = sent, repeated
        index.duplicates = [(int(pfn), int(offset)) for pfn, offset in duplicates.tolist()]
        return cls(index, {row[0]: SkippedPageData(*row) for row in page_data.tolist()})


def store_index(path: str, source: StreamSource, contents: Contents, state: FileState) -> bool:
    """Store the index of a stream that was read to its end, beside its file.

    Nothing but an older index is replaced. A folder that cannot be written to, or a full disk, only costs time later.

    Args:
        path: The save file.
        source: The save file, open.
        contents: The records of the stream.
        state: The state of the file before it was read.

    Returns:
        Whether the index was stored. It is not if the file has changed meanwhile.
    """
    page_data = _page_data_groups(contents)
    if page_data is None or FileState.from_source(source) != state or not _is_replaceable(path + SUFFIX):
        return False
    runs = contents.index.extents
    extents = np.empty(len(runs), _EXTENT)
    extents["first"], extents["pages"], extents["type"] = runs.first, runs.pages, runs.type
    extents["offset"] = contents.index.offsets(runs.first)
    duplicates = np.array(contents.index.duplicates[:_DUPLICATES_MAX], _DUPLICATE)
    counts = len(extents), len(page_data), len(duplicates), contents.index.sent, contents.index.repeated
    header = _HEADER.pack(_MAGIC, *state, *counts)
    body = extents.tobytes() + page_data.tobytes() + duplicates.tobytes()
    try:
        with Output.open(path + SUFFIX) as out:
            out.write([header, body, _digest(header, body)])
    except (OSError, RequestError):
        return False
    return True


def _page_data_groups(contents: Contents) -> npt.NDArray[Any] | None:
    """Return the groups of PAGE_DATA records; None if no reader could skip them."""
    rows = []
    for group, following in pairwise(contents.record_groups):
        if group.name == "PAGE_DATA":
            size = group.length + group.count * _RECORD_HEADER
            if group.offset + size != following.offset:
                return None
            rows.append((group.offset, size, group.length, group.count, group.pages))
    return np.array(rows, _PAGE_DATA) if contents.complete else None


def _is_replaceable(path: str) -> bool:
    """Whether a path is free, or an index of ours."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(len(_MAGIC) - 1) == _MAGIC[:-1]
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _digest(header: bytes, body: bytes) -> bytes:
    return blake2b(header + body, digest_size=_DIGEST_SIZE).digest()


def _are_possible_extents(extents: npt.NDArray[Any], stream_size: int) -> bool:
    """Whether extents ascend, do not overlap, and have their content in the stream."""
    if not len(extents):
        return True
    first, pages, offset, page_type = extents["first"], extents["pages"], extents["offset"], extents["type"]
    if not ((pages > 0) & (pages <= stream_size // 8) & (first < 1 << 52) & (page_type < 16)).all():
        return False
    if int(pages.sum()) > stream_size // 8 or (first[1:] < first[:-1] + pages[:-1].astype(np.uint64)).any():
        return False
    has_content = offset >= 0
    # A file in which a page lacks its content gets no index. Without this, one extent could name 2^38 page tables.
    if not (IS_KNOWN[page_type].all() and (HAS_DATA[page_type] == has_content).all()):
        return False
    if int(pages[has_content].sum()) > stream_size // PAGE_SIZE:
        return False
    return bool((offset[has_content] <= stream_size - pages[has_content] * PAGE_SIZE).all())


def _are_possible_duplicates(duplicates: npt.NDArray[Any], stream_size: int) -> bool:
    """Whether duplicates name pfns, at offsets within the stream."""
    pfn, offset = duplicates["pfn"], duplicates["offset"]
    return bool((pfn < NO_PFN).all() and (offset >= 0).all() and (offset <= stream_size).all())


def _is_possible_page_data(groups: npt.NDArray[Any], stream_size: int) -> bool:
    """Whether groups of PAGE_DATA ascend, do not overlap, and lie within the stream."""
    if not len(groups):
        return True
    offset, size = groups["offset"], groups["size"]
    numbers = np.stack([groups[name] for name in groups.dtype.names or ()])
    if (numbers < 0).any() or (numbers > stream_size).any() or (size < 2 * _RECORD_HEADER).any():
        return False
    return bool((offset[1:] >= (offset + size)[:-1]).all() and int(offset[-1]) + int(size[-1]) <= stream_size)
