"""The machine frames of ModelHost: owner, references, type, m2p entry and content of each.

Cost follows what is touched. Memory is handed out in extents of 2 MiB; an extent whose frames are all alike (one owner,
consecutive pfns, nothing mapped, nothing written) is one row. Only when one of its frames differs does each of them get
a row of its own, and only a frame that was written has content.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from xenpv.frames import I64, PAGE_SIZE, U8, U64, Mask
from xenpv.memory.pagetables import as_entries

NO_PFN = np.uint64((1 << 64) - 1)  # INVALID_M2P_ENTRY
ORDER = 9
PER_EXTENT = 1 << ORDER  # frames in an extent
_LOW = np.uint64(ORDER)
_WITHIN = np.uint64(PER_EXTENT - 1)
_AT_ONCE = 1 << 15  # frames that are looked up at once: what fits into a cache
_BLOCK = 4096  # extents that are shuffled together: 8 GiB
NOBODY, XEN = 0, 0x7FF3  # an owner is its domid + 1; Xen's domid is DOMID_XEN
RESERVED = 8  # extents at the bottom that are Xen's own, where shared info pages come from
COMPAT_EXTENTS = 1 << 37 - 21  # a 32-bit guest's frames end at 128 GiB, where the m2p that it sees ends

WRITABLE = 7  # a frame's type as in PGT_*: 0 none, 1 to 4 a table of that level, 5 descriptors, 7 mapped writable
ALLOCATED, PINNED, VALIDATED, SPECIAL, PAE_XEN_L2 = 1, 2, 4, 8, 16  # flags of a frame


class NoMemoryError(Exception):
    """The host has no more frames of the kind asked for."""


class _Rows:
    """What is known of single frames, PER_EXTENT rows a slot; grows as slots are taken."""

    def __init__(self) -> None:
        self.owner = np.zeros(0, np.uint16)
        self.type = np.zeros(0, np.uint8)
        self.flags = np.zeros(0, np.uint8)
        self.types = np.zeros(0, np.uint32)  # how often it is used as its type
        self.count = np.zeros(0, np.uint32)  # all references, one of them for being allocated
        self.m2p = np.zeros(0, np.uint64)
        self.content = np.zeros(0, np.uint32)  # 0: zeroes; else a page of _Pages
        self.extent = np.zeros(0, np.int64)  # of each slot
        self._used = 0
        self._free: list[int] = []

    def take(self, extents: I64) -> I64:
        """A slot for each extent, their rows all zero."""
        again = [self._free.pop() for _ in range(min(len(extents), len(self._free)))]
        new = len(extents) - len(again)
        self._grow(self._used + new)
        slots = np.append(np.array(again, np.int64), np.arange(self._used, self._used + new))
        self._used += new
        self.extent[slots] = extents
        return slots

    def give(self, slots: I64) -> None:
        """Take slots back. Their rows must be those of free frames."""
        self._free += slots.tolist()

    def _grow(self, slots: int) -> None:
        if slots <= len(self.extent):
            return
        slots = max(slots, 2 * len(self.extent), 16)
        for name in ("owner", "type", "flags", "types", "count", "m2p", "content", "extent"):
            old = getattr(self, name)
            new = np.zeros(slots * (1 if name == "extent" else PER_EXTENT), old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)


class _Pages:
    """Content of the pages that were written, numbered from 1."""

    _CHUNK = 1024

    def __init__(self) -> None:
        self._chunks: list[U8] = []
        self._free: list[int] = []

    def take(self, n: int) -> I64:
        while len(self._free) < n:
            first = len(self._chunks) * self._CHUNK + 1
            self._chunks.append(np.zeros((self._CHUNK, PAGE_SIZE), np.uint8))
            self._free += range(first + self._CHUNK - 1, first - 1, -1)
        taken = self._free[len(self._free) - n :][::-1]
        del self._free[len(self._free) - n :]
        return np.array(taken, np.int64)

    def give(self, numbers: I64) -> None:
        self._free += numbers.tolist()

    def __getitem__(self, number: int) -> U8:
        """One page, live."""
        page: U8 = self._chunks[number - 1 >> 10][number - 1 & self._CHUNK - 1]
        return page

    def read(self, numbers: I64, out: U8, rows: I64) -> None:
        for chunk in np.unique(numbers - 1 >> 10).tolist():
            here = (numbers - 1 >> 10) == chunk
            out[rows[here]] = self._chunks[chunk][numbers[here] - 1 & self._CHUNK - 1]

    def write(self, numbers: I64, pages: U8) -> None:
        for chunk in np.unique(numbers - 1 >> 10).tolist():
            here = (numbers - 1 >> 10) == chunk
            self._chunks[chunk][numbers[here] - 1 & self._CHUNK - 1] = pages[here]


class FrameTable:
    """All frames of a host of ``size`` bytes. Frames of domain ``d`` have owner ``d + 1``.

    ``pages[owner]`` is how many frames each holds, special ones (shared info) not counted.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.extents = max(size >> 21, RESERVED + 1)
        self.max_mfn = self.extents * PER_EXTENT - 1
        self.rows = _Rows()
        self.pages: Counter[int] = Counter()
        self._owner = np.zeros(self.extents, np.uint16)  # of an extent whose frames are alike
        self._pfn = np.zeros(self.extents, np.uint64)  # of its first frame
        self._slot = np.zeros(self.extents, np.uint32)  # 1 + its slot, of one with rows
        self._content = _Pages()
        self._random = np.random.default_rng(seed)
        self._bottom, self._top = RESERVED, self.extents  # between them nothing was ever handed out
        self._free_extents = np.empty(0, np.int64)
        self._free_frames = np.empty(0, np.uint64)
        self._owner[:RESERVED] = XEN
        self._split(np.arange(RESERVED))
        self.rows.m2p[: RESERVED * PER_EXTENT] = NO_PFN
        self._reserved = np.arange(1 << 8, RESERVED * PER_EXTENT).tolist()  # the first MiB stays the firmware's

    # what is there

    @property
    def free(self) -> int:
        """How many frames nobody has."""
        untouched = self._top - self._bottom
        return (untouched + len(self._free_extents)) * PER_EXTENT + len(self._free_frames)

    def valid(self, mfns: U64) -> Mask:
        """Which of them are frames of this host."""
        return mfns <= np.uint64(self.max_mfn)

    def owner(self, mfns: U64) -> U64:
        """The owner of each, NOBODY beyond the host."""
        extent, slot, row = self._find(mfns)
        owner = np.where(slot > 0, self._of(self.rows.owner, row), self._owner[extent]).astype(np.uint64)
        owner[~self.valid(mfns)] = NOBODY
        return owner

    def m2p(self, mfns: U64) -> U64:
        """The pfn of each, NO_PFN where it has none."""
        out = np.empty(len(mfns), np.uint64)
        for i in range(0, len(mfns), _AT_ONCE):
            piece = mfns[i : i + _AT_ONCE]
            extent, slot, row = self._find(piece)
            pfn = self._pfn[extent] + (piece & _WITHIN)
            pfn[self._owner[extent] == NOBODY] = NO_PFN
            single = slot > 0
            if single.any():
                pfn[single] = self.rows.m2p[row[single]]
            pfn[~self.valid(piece)] = NO_PFN
            out[i : i + _AT_ONCE] = pfn
        return out

    def types(self, mfns: U64) -> tuple[U8, U8]:
        """Type and flags of each; 0 and ALLOCATED where nothing else is known."""
        _, slot, row = self._find(mfns)
        kind = np.where(slot > 0, self._of(self.rows.type, row), 0).astype(np.uint8)
        flags = np.where(slot > 0, self._of(self.rows.flags, row), ALLOCATED).astype(np.uint8)
        return kind, flags

    def owned(self, owner: int) -> U64:
        """All frames of an owner, ascending, special ones included."""
        alike = np.flatnonzero(self._owner == owner).astype(np.uint64)
        alike = (alike[:, None] << _LOW | np.arange(PER_EXTENT, dtype=np.uint64)).reshape(-1)
        return np.sort(np.append(alike, self.mfns(np.flatnonzero(self.rows.owner == owner))))

    def untouched(self, mfns: U64, owner: int) -> Mask:
        """Which are that owner's, of an extent whose frames are all alike: none was ever written or used."""
        extent = np.minimum(mfns >> _LOW, np.uint64(self.extents - 1))
        return np.asarray((self._slot[extent] == 0) & (self._owner[extent] == owner) & self.valid(mfns))

    def row(self, mfns: U64) -> I64:
        """The row of each, in the arrays of ``rows``; it gets one if it has none. All must be frames of the host."""
        extents = np.unique((mfns >> _LOW).astype(np.int64))
        self._split(extents[self._slot[extents] == 0])
        return self._find(mfns)[2]

    def row_of(self, mfn: int, owner: int) -> int:
        """The row of one frame if it is that owner's, else -1."""
        if not 0 <= mfn <= self.max_mfn:
            return -1
        slot = int(self._slot[mfn >> ORDER])
        if not slot:
            if self._owner[mfn >> ORDER] != owner:
                return -1
            self._split(np.array([mfn >> ORDER]))
            slot = int(self._slot[mfn >> ORDER])
        row = slot - 1 << ORDER | mfn & PER_EXTENT - 1
        return row if self.rows.owner[row] == owner else -1

    def mfns(self, rows: I64) -> U64:
        """The frames of rows."""
        extent = self.rows.extent[rows >> ORDER].astype(np.uint64)
        out: U64 = extent << _LOW | (rows & PER_EXTENT - 1).astype(np.uint64)
        return out

    def _find(self, mfns: U64) -> tuple[I64, I64, I64]:
        extent = np.minimum(mfns >> _LOW, np.uint64(self.extents - 1)).astype(np.int64)
        slot = self._slot[extent].astype(np.int64)
        slot[~self.valid(mfns)] = 0
        row = np.maximum(slot - 1, 0) << ORDER | (mfns & _WITHIN).astype(np.int64)
        return extent, slot, row

    @staticmethod
    def _of(column: np.ndarray, row: I64) -> np.ndarray:
        return column[row]

    def _split(self, extents: I64) -> None:
        """Give each frame of the extents a row."""
        if not len(extents):
            return
        slots = self.rows.take(extents)
        rows = (slots[:, None] << ORDER) + np.arange(PER_EXTENT)
        owner = self._owner[extents]
        self.rows.owner[rows] = owner[:, None]
        self.rows.flags[rows] = np.where(owner == NOBODY, 0, ALLOCATED)[:, None]
        self.rows.count[rows] = np.where(owner == NOBODY, 0, 1)[:, None]
        pfns = self._pfn[extents][:, None] + np.arange(PER_EXTENT, dtype=np.uint64)
        self.rows.m2p[rows] = np.where(owner == NOBODY, NO_PFN, pfns.T).T
        self._owner[extents] = NOBODY
        self._slot[extents] = slots + 1

    # handing out and taking back

    def take_extents(self, owner: int, pfns: U64, *, compat: bool = False) -> U64:
        """An extent of 512 frames for each of ``pfns``, its first: the first mfn of each. As many as there are."""
        extents = self._extents(len(pfns), compat)
        pfns = pfns[: len(extents)]
        for i in np.flatnonzero(extents.astype(np.uint64) << _LOW == pfns).tolist():  # an mfn is never its own pfn
            if len(extents) > 1:
                j = (i + 1) % len(extents)
                extents[[i, j]] = extents[[j, i]]
            else:
                other = self._extents(1, compat)
                self._free_extents = np.append(self._free_extents, extents)
                extents, pfns = other, pfns[: len(other)]
        self._owner[extents], self._pfn[extents] = owner, pfns
        self.pages[owner] += len(extents) * PER_EXTENT
        out: U64 = extents.astype(np.uint64) << _LOW
        return out

    def take_frames(self, owner: int, pfns: U64, *, compat: bool = False) -> U64:
        """A frame for each of ``pfns``, in no order. As many as there are."""
        limit = np.uint64((COMPAT_EXTENTS if compat else self.extents) * PER_EXTENT)
        short = len(pfns) + 1 - int(np.count_nonzero(self._free_frames < limit))  # one to spare
        if short > 0:
            extents = self._extents(-(-short // PER_EXTENT), compat)
            self._split(extents)
            new = (extents.astype(np.uint64)[:, None] << _LOW | np.arange(PER_EXTENT, dtype=np.uint64)).reshape(-1)
            self._free_frames = np.append(self._free_frames, self._random.permutation(new))
        fits = np.flatnonzero(self._free_frames < limit)
        spare = fits[len(pfns) : len(pfns) + 1]
        fits = fits[: len(pfns)]
        mfns, pfns = self._free_frames[fits], pfns[: len(fits)]
        for i in np.flatnonzero(mfns == pfns).tolist():
            if len(spare):
                mfns[i], self._free_frames[spare[0]] = self._free_frames[spare[0]], mfns[i]
            else:
                j = (i + 1) % len(mfns)
                mfns[[i, j]] = mfns[[j, i]]
        self._free_frames = np.delete(self._free_frames, fits)
        rows = self.row(mfns)
        self.rows.owner[rows], self.rows.m2p[rows] = owner, pfns
        self.rows.flags[rows], self.rows.count[rows] = ALLOCATED, 1
        self.pages[owner] += len(mfns)
        return mfns

    def take_special(self, owner: int) -> int:
        """A frame of Xen's own that a domain may map: shared info. It is special, and has no pfn."""
        if not self._reserved:
            raise NoMemoryError
        mfn = int(self._reserved.pop(0))
        row = self.row(np.array([mfn], np.uint64))
        self.rows.owner[row], self.rows.flags[row] = owner, ALLOCATED | SPECIAL | VALIDATED
        self.rows.type[row], self.rows.types[row], self.rows.count[row] = WRITABLE, 1, 1
        return mfn

    def drop(self, rows: I64, times: I64 | int = 1) -> None:
        """Take references away; each row may stand here once. Frames that nobody refers to any longer are free."""
        self.rows.count[rows] -= np.uint32(times) if isinstance(times, int) else times.astype(np.uint32)
        self._free(rows[self.rows.count[rows] == 0])

    def drop_extents(self, mfns: U64) -> Mask:
        """Free whole extents that are still alike; which of them were."""
        extents = (mfns >> _LOW).astype(np.int64)
        alike: Mask = (self._slot[extents] == 0) & (self._owner[extents] != NOBODY)
        extents = extents[alike]
        for owner, n in zip(*np.unique(self._owner[extents], return_counts=True), strict=True):
            self.pages[int(owner)] -= int(n) * PER_EXTENT
        self._owner[extents], self._pfn[extents] = NOBODY, 0
        self._free_extents = np.append(self._free_extents, extents)
        return alike

    def forget(self, owner: int) -> None:
        """Free all that an owner has, whatever refers to it."""
        alike = np.flatnonzero(self._owner == owner).astype(np.uint64)
        self.drop_extents(alike << _LOW)
        self._free(np.flatnonzero(self.rows.owner == owner))
        del self.pages[owner]

    def _free(self, rows: I64) -> None:
        if not len(rows):
            return
        mfns = self.mfns(rows)
        special = (self.rows.flags[rows] & SPECIAL) != 0
        for owner, n in zip(*np.unique(self.rows.owner[rows[~special]], return_counts=True), strict=True):
            self.pages[int(owner)] -= int(n)
        content = self.rows.content[rows].astype(np.int64)
        self._content.give(content[content > 0])
        for column in (self.rows.type, self.rows.flags, self.rows.types, self.rows.count, self.rows.content):
            column[rows] = 0
        self.rows.m2p[rows], self.rows.owner[rows] = NO_PFN, np.where(special, XEN, NOBODY)
        self._reserved += mfns[special].tolist()
        extents, n = np.unique(mfns[~special] >> _LOW, return_counts=True)
        whole = extents[n == PER_EXTENT].astype(np.int64)
        self.rows.give(self._slot[whole].astype(np.int64) - 1)
        self._slot[whole], self._pfn[whole] = 0, 0
        self._free_extents = np.append(self._free_extents, whole)
        loose = mfns[~special & ~np.isin(mfns >> _LOW, whole.astype(np.uint64))]
        self._free_frames = np.append(self._free_frames, self._random.permutation(loose))

    def _extents(self, n: int, compat: bool) -> I64:
        """``n`` extents that nobody has, or as many as there are."""
        limit = COMPAT_EXTENTS if compat else self.extents
        while int(np.count_nonzero(self._free_extents < limit)) < n and self._bottom < min(self._top, limit):
            if compat:  # from the bottom, others from the top, as Xen does
                size = min(_BLOCK, min(self._top, limit) - self._bottom)
                new = np.arange(self._bottom, self._bottom + size)
                self._bottom += size
            else:
                size = min(_BLOCK * max(1, (n - len(self._free_extents)) // _BLOCK), self._top - self._bottom)
                new = np.arange(self._top - size, self._top)
                self._top -= size
            self._free_extents = np.append(self._free_extents, self._random.permutation(new))
        fits = np.flatnonzero(self._free_extents < limit)[:n]
        taken = self._free_extents[fits]
        self._free_extents = np.delete(self._free_extents, fits)
        return taken

    # content

    def read(self, mfns: U64) -> U8:
        """The content of frames, uint8 (n, 4096), a copy; zeroes beyond the host."""
        out = np.zeros((len(mfns), PAGE_SIZE), np.uint8)
        _, slot, row = self._find(mfns)
        content = np.where(slot > 0, self._of(self.rows.content, row), 0).astype(np.int64)
        there = np.flatnonzero(content)
        self._content.read(content[there], out, there)
        return out

    def written(self, mfns: U64) -> Mask:
        """Which frames anybody has ever written; all others read as zeroes."""
        _, slot, row = self._find(mfns)
        return np.asarray(np.where(slot > 0, self._of(self.rows.content, row), 0) != 0)

    def write(self, mfns: U64, pages: U8) -> None:
        """Replace the content of frames, all of them frames of the host."""
        rows = self.row(mfns)
        self._have_content(rows)
        self._content.write(self.rows.content[rows].astype(np.int64), pages)

    def page(self, mfn: int) -> U8:
        """The 4096 bytes of one frame, live: writing here writes the frame."""
        slot = int(self._slot[mfn >> ORDER])
        number = int(self.rows.content[slot - 1 << ORDER | mfn & PER_EXTENT - 1]) if slot else 0
        if not number:
            row = self.row(np.array([mfn], np.uint64))
            self._have_content(row)
            number = int(self.rows.content[row[0]])
        return self._content[number]

    def entries(self, mfn: int) -> U64:
        """The 512 entries of one frame, live."""
        entries: U64 = as_entries(self.page(mfn)[None])[0]
        return entries

    def _have_content(self, rows: I64) -> None:
        blank = np.unique(rows[self.rows.content[rows] == 0])
        if not len(blank):
            return
        pages = self._content.take(len(blank))
        self._content.write(pages, np.zeros((len(blank), PAGE_SIZE), np.uint8))
        self.rows.content[blank] = pages
