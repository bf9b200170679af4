"""The machine frames of the model: owner, references, type, m2p, content.

Cost follows what is touched. Memory is allocated in extents of 2 MiB. A uniform extent (one owner, consecutive pfns,
nothing mapped, nothing written) takes a few numbers. It is split into rows, one for each frame, as soon as one frame
differs. Only a frame that was written has content.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from xenpv.frames import I64, PAGE_SIZE, U8, U64, Mask
from xenpv.memory.page_tables import as_ptes

INVALID_M2P_ENTRY = np.uint64((1 << 64) - 1)
EXTENT_ORDER = 9
EXTENT_FRAMES = 1 << EXTENT_ORDER  # frames in an extent
_LOW = np.uint64(EXTENT_ORDER)
_WITHIN = np.uint64(EXTENT_FRAMES - 1)
_FRAMES_AT_ONCE = 1 << 15  # frames that are looked up at once: they fit into a cache
_SHUFFLED_EXTENTS = 4096  # extents that are shuffled together: 8 GiB
NO_OWNER, XEN = 0, 0x7FF3  # an owner is its domid + 1; Xen's domid is DOMID_XEN
RESERVED = 8  # extents at the bottom that are Xen's own; shared info pages are allocated there
COMPAT_EXTENTS = 1 << 37 - 21  # a 32-bit guest's frames lie below 128 GiB, where the m2p that it sees ends

WRITABLE = 7  # a frame's type, as PGT_*: 0 none, 1 to 4 a page table of that level, 5 descriptors, 7 writable
ALLOCATED, PINNED, VALIDATED, SPECIAL, PAE_XEN_L2 = 1, 2, 4, 8, 16  # flags of a frame


class NoMemoryError(Exception):
    """The host has no free frame of the kind wanted."""


class _Rows:
    """Single frames, as columns of a table.

    A slot of EXTENT_FRAMES rows holds the frames of one split extent.
    """

    def __init__(self) -> None:
        self.owner = np.zeros(0, np.uint16)
        self.type = np.zeros(0, np.uint8)
        self.flags = np.zeros(0, np.uint8)
        self.type_count = np.zeros(0, np.uint32)  # references to it as its type
        self.ref_count = np.zeros(0, np.uint32)  # all references, including one for being allocated
        self.m2p = np.zeros(0, np.uint64)
        self.content = np.zeros(0, np.uint32)  # 0: zeroes; else a number of _PageStore
        self.extent = np.zeros(0, np.int64)  # of each slot, not of each row
        self._used_slots = 0
        self._free_slots: list[int] = []

    def alloc_slots(self, extents: I64) -> I64:
        """Allocate a slot for each extent. All columns of its rows are zero."""
        reused = [self._free_slots.pop() for _ in range(min(len(extents), len(self._free_slots)))]
        new = len(extents) - len(reused)
        self._grow(self._used_slots + new)
        slots = np.append(np.array(reused, np.int64), np.arange(self._used_slots, self._used_slots + new))
        self._used_slots += new
        self.extent[slots] = extents
        return slots

    def free_slots(self, slots: I64) -> None:
        """Free slots. All frames of their rows must be free."""
        self._free_slots += slots.tolist()

    def _grow(self, slots: int) -> None:
        if slots <= len(self.extent):
            return
        slots = max(slots, 2 * len(self.extent), 16)
        for name in ("owner", "type", "flags", "type_count", "ref_count", "m2p", "content", "extent"):
            old = getattr(self, name)
            new = np.zeros(slots * (1 if name == "extent" else EXTENT_FRAMES), old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)


class _PageStore:
    """The content of pages that were written, numbered from 1."""

    _CHUNK = 1024

    def __init__(self) -> None:
        self._chunks: list[U8] = []
        self._free: list[int] = []

    def alloc(self, n: int) -> I64:
        """Allocate pages. Their content is undefined."""
        while len(self._free) < n:
            first = len(self._chunks) * self._CHUNK + 1
            self._chunks.append(np.zeros((self._CHUNK, PAGE_SIZE), np.uint8))
            self._free += range(first + self._CHUNK - 1, first - 1, -1)
        numbers = self._free[len(self._free) - n :][::-1]
        del self._free[len(self._free) - n :]
        return np.array(numbers, np.int64)

    def free(self, numbers: I64) -> None:
        """Free pages."""
        self._free += numbers.tolist()

    def __getitem__(self, number: int) -> U8:
        """Return one page. Writing to the array writes the page."""
        page: U8 = self._chunks[number - 1 >> 10][number - 1 & self._CHUNK - 1]
        return page

    def read(self, numbers: I64, out: U8, rows: I64) -> None:
        """Copy pages to ``rows`` of ``out``, uint8 (n, 4096)."""
        for chunk in np.unique(numbers - 1 >> 10).tolist():
            in_chunk = (numbers - 1 >> 10) == chunk
            out[rows[in_chunk]] = self._chunks[chunk][numbers[in_chunk] - 1 & self._CHUNK - 1]

    def write(self, numbers: I64, pages: U8) -> None:
        """Replace pages, uint8 (n, 4096)."""
        for chunk in np.unique(numbers - 1 >> 10).tolist():
            in_chunk = (numbers - 1 >> 10) == chunk
            self._chunks[chunk][numbers[in_chunk] - 1 & self._CHUNK - 1] = pages[in_chunk]


class FrameTable:
    """All frames of a host of ``size`` bytes.

    Frames of domain ``d`` have owner ``d + 1``.

    ``pages[owner]`` is how many frames each holds, special ones (shared info) not counted.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.extents = max(size >> 21, RESERVED + 1)
        self.max_mfn = self.extents * EXTENT_FRAMES - 1
        self.rows = _Rows()
        self.pages: Counter[int] = Counter()
        self._owner = np.zeros(self.extents, np.uint16)  # of a uniform extent
        self._pfn = np.zeros(self.extents, np.uint64)  # of its first frame
        self._slot = np.zeros(self.extents, np.uint32)  # 1 + the slot of a split extent
        self._content = _PageStore()
        self._random = np.random.default_rng(seed)
        self._bottom, self._top = RESERVED, self.extents  # extents between them were never allocated
        self._free_extents = np.empty(0, np.int64)
        self._free_frames = np.empty(0, np.uint64)
        self._owner[:RESERVED] = XEN
        self._split(np.arange(RESERVED))
        self.rows.m2p[: RESERVED * EXTENT_FRAMES] = INVALID_M2P_ENTRY
        self._reserved = np.arange(1 << 8, RESERVED * EXTENT_FRAMES).tolist()  # the first MiB stays the firmware's

    # -- looking up frames

    @property
    def free_count(self) -> int:
        """The number of free frames."""
        untouched = self._top - self._bottom
        return (untouched + len(self._free_extents)) * EXTENT_FRAMES + len(self._free_frames)

    def valid(self, mfns: U64) -> Mask:
        """Return which mfns are frames of this host."""
        return mfns <= np.uint64(self.max_mfn)

    def owners(self, mfns: U64) -> U64:
        """Return the owner of each frame, NO_OWNER beyond the host."""
        extent, slot, row = self._locate(mfns)
        owners = np.where(slot > 0, self.rows.owner[row], self._owner[extent]).astype(np.uint64)
        owners[~self.valid(mfns)] = NO_OWNER
        return owners

    def m2p(self, mfns: U64) -> U64:
        """Return the pfn of each frame, INVALID_M2P_ENTRY for none."""
        out = np.empty(len(mfns), np.uint64)
        for i in range(0, len(mfns), _FRAMES_AT_ONCE):
            batch = mfns[i : i + _FRAMES_AT_ONCE]
            extent, slot, row = self._locate(batch)
            pfn = self._pfn[extent] + (batch & _WITHIN)
            pfn[self._owner[extent] == NO_OWNER] = INVALID_M2P_ENTRY
            split = slot > 0
            if split.any():
                pfn[split] = self.rows.m2p[row[split]]
            pfn[~self.valid(batch)] = INVALID_M2P_ENTRY
            out[i : i + _FRAMES_AT_ONCE] = pfn
        return out

    def types(self, mfns: U64) -> tuple[U8, U8]:
        """Return type and flags of each frame.

        Of a frame of a uniform extent 0 and ALLOCATED.
        """
        _, slot, row = self._locate(mfns)
        types = np.where(slot > 0, self.rows.type[row], 0).astype(np.uint8)
        flags = np.where(slot > 0, self.rows.flags[row], ALLOCATED).astype(np.uint8)
        return types, flags

    def owned(self, owner: int) -> U64:
        """Return all frames of an owner, ascending, including special ones."""
        uniform = np.flatnonzero(self._owner == owner).astype(np.uint64)
        uniform = (uniform[:, None] << _LOW | np.arange(EXTENT_FRAMES, dtype=np.uint64)).reshape(-1)
        return np.sort(np.append(uniform, self.mfns_of(np.flatnonzero(self.rows.owner == owner))))

    def is_untouched(self, mfns: U64, owner: int) -> Mask:
        """Return which frames are that owner's and in a uniform extent.

        No frame of such an extent was ever written or used.
        """
        extent = np.minimum(mfns >> _LOW, np.uint64(self.extents - 1))
        return np.asarray((self._slot[extent] == 0) & (self._owner[extent] == owner) & self.valid(mfns))

    def rows_of(self, mfns: U64) -> I64:
        """Return the row of each frame in the columns of ``rows``; splits extents for it.

        All must be valid.
        """
        extents = np.unique((mfns >> _LOW).astype(np.int64))
        self._split(extents[self._slot[extents] == 0])
        return self._locate(mfns)[2]

    def row_if_owned(self, mfn: int, owner: int) -> int:
        """Return the row of one frame if it is that owner's, else -1.

        As rows_of, for one frame and fast.
        """
        if not 0 <= mfn <= self.max_mfn:
            return -1
        slot = int(self._slot[mfn >> EXTENT_ORDER])
        if not slot:
            if self._owner[mfn >> EXTENT_ORDER] != owner:
                return -1
            self._split(np.array([mfn >> EXTENT_ORDER]))
            slot = int(self._slot[mfn >> EXTENT_ORDER])
        row = slot - 1 << EXTENT_ORDER | mfn & EXTENT_FRAMES - 1
        return row if self.rows.owner[row] == owner else -1

    def mfns_of(self, rows: I64) -> U64:
        """Return the frames of rows."""
        extent = self.rows.extent[rows >> EXTENT_ORDER].astype(np.uint64)
        out: U64 = extent << _LOW | (rows & EXTENT_FRAMES - 1).astype(np.uint64)
        return out

    def _locate(self, mfns: U64) -> tuple[I64, I64, I64]:
        """Return extent, 1 + slot (0: not split) and row of each frame.

        The row means nothing if it is not split.
        """
        extent = np.minimum(mfns >> _LOW, np.uint64(self.extents - 1)).astype(np.int64)
        slot = self._slot[extent].astype(np.int64)
        slot[~self.valid(mfns)] = 0
        row = np.maximum(slot - 1, 0) << EXTENT_ORDER | (mfns & _WITHIN).astype(np.int64)
        return extent, slot, row

    def _split(self, extents: I64) -> None:
        """Split uniform extents: allocate a row for each of their frames."""
        if not len(extents):
            return
        slots = self.rows.alloc_slots(extents)
        rows = (slots[:, None] << EXTENT_ORDER) + np.arange(EXTENT_FRAMES)
        owner = self._owner[extents]
        self.rows.owner[rows] = owner[:, None]
        self.rows.flags[rows] = np.where(owner == NO_OWNER, 0, ALLOCATED)[:, None]
        self.rows.ref_count[rows] = np.where(owner == NO_OWNER, 0, 1)[:, None]
        pfns = self._pfn[extents][:, None] + np.arange(EXTENT_FRAMES, dtype=np.uint64)
        self.rows.m2p[rows] = np.where(owner == NO_OWNER, INVALID_M2P_ENTRY, pfns.T).T
        self._owner[extents] = NO_OWNER
        self._slot[extents] = slots + 1

    # -- allocating and freeing

    def alloc_extents(self, owner: int, pfns: U64, *, compat: bool = False) -> U64:
        """Allocate an extent of 512 frames for each of ``pfns``, as far as possible.

        Args:
            owner: Who gets them.
            pfns: The first pfn of each extent.
            compat: Allocate for a 32-bit guest.

        Returns:
            The first mfn of each extent. It never equals its pfn.
        """
        extents = self._alloc_extents(len(pfns), compat)
        pfns = pfns[: len(extents)]
        for i in np.flatnonzero(extents.astype(np.uint64) << _LOW == pfns).tolist():  # swap: no mfn may equal its pfn
            if len(extents) > 1:
                j = (i + 1) % len(extents)
                extents[[i, j]] = extents[[j, i]]
            else:
                replacement = self._alloc_extents(1, compat)
                self._free_extents = np.append(self._free_extents, extents)
                extents, pfns = replacement, pfns[: len(replacement)]
        self._owner[extents], self._pfn[extents] = owner, pfns
        self.pages[owner] += len(extents) * EXTENT_FRAMES
        out: U64 = extents.astype(np.uint64) << _LOW
        return out

    def alloc_frames(self, owner: int, pfns: U64, *, compat: bool = False) -> U64:
        """Allocate a random frame for each of ``pfns``. See alloc_extents."""
        limit = np.uint64((COMPAT_EXTENTS if compat else self.extents) * EXTENT_FRAMES)
        missing = len(pfns) + 1 - int(np.count_nonzero(self._free_frames < limit))  # one to spare
        if missing > 0:
            extents = self._alloc_extents(-(-missing // EXTENT_FRAMES), compat)
            self._split(extents)
            new = (extents.astype(np.uint64)[:, None] << _LOW | np.arange(EXTENT_FRAMES, dtype=np.uint64)).reshape(-1)
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
        rows = self.rows_of(mfns)
        self.rows.owner[rows], self.rows.m2p[rows] = owner, pfns
        self.rows.flags[rows], self.rows.ref_count[rows] = ALLOCATED, 1
        self.pages[owner] += len(mfns)
        return mfns

    def alloc_special(self, owner: int) -> int:
        """Allocate a page of Xen's own that a domain may map: shared info. It has no pfn.

        Raises NoMemoryError.
        """
        if not self._reserved:
            raise NoMemoryError
        mfn = int(self._reserved.pop(0))
        row = self.rows_of(np.array([mfn], np.uint64))
        self.rows.owner[row], self.rows.flags[row] = owner, ALLOCATED | SPECIAL | VALIDATED
        self.rows.type[row], self.rows.type_count[row], self.rows.ref_count[row] = WRITABLE, 1, 1
        return mfn

    def put_refs(self, rows: I64, counts: I64 | int = 1) -> None:
        """Drop references to frames, and free those without any left.

        No row may appear twice.
        """
        self.rows.ref_count[rows] -= np.uint32(counts) if isinstance(counts, int) else counts.astype(np.uint32)
        self._free_rows(rows[self.rows.ref_count[rows] == 0])

    def free_uniform_extents(self, mfns: U64) -> Mask:
        """Free those extents that are uniform. Which of them were."""
        extents = (mfns >> _LOW).astype(np.int64)
        uniform: Mask = (self._slot[extents] == 0) & (self._owner[extents] != NO_OWNER)
        extents = extents[uniform]
        for owner, n in zip(*np.unique(self._owner[extents], return_counts=True), strict=True):
            self.pages[int(owner)] -= int(n) * EXTENT_FRAMES
        self._owner[extents], self._pfn[extents] = NO_OWNER, 0
        self._free_extents = np.append(self._free_extents, extents)
        return uniform

    def free_all(self, owner: int) -> None:
        """Free all frames of an owner, whatever still refers to them."""
        uniform = np.flatnonzero(self._owner == owner).astype(np.uint64)
        self.free_uniform_extents(uniform << _LOW)
        self._free_rows(np.flatnonzero(self.rows.owner == owner))
        del self.pages[owner]

    def _free_rows(self, rows: I64) -> None:
        if not len(rows):
            return
        mfns = self.mfns_of(rows)
        special = (self.rows.flags[rows] & SPECIAL) != 0
        for owner, n in zip(*np.unique(self.rows.owner[rows[~special]], return_counts=True), strict=True):
            self.pages[int(owner)] -= int(n)
        content = self.rows.content[rows].astype(np.int64)
        self._content.free(content[content > 0])
        for column in (self.rows.type, self.rows.flags, self.rows.type_count, self.rows.ref_count, self.rows.content):
            column[rows] = 0
        self.rows.m2p[rows], self.rows.owner[rows] = INVALID_M2P_ENTRY, np.where(special, XEN, NO_OWNER)
        self._reserved += mfns[special].tolist()
        extents, n = np.unique(mfns[~special] >> _LOW, return_counts=True)
        whole_extents = extents[n == EXTENT_FRAMES].astype(np.int64)
        self.rows.free_slots(self._slot[whole_extents].astype(np.int64) - 1)
        self._slot[whole_extents], self._pfn[whole_extents] = 0, 0
        self._free_extents = np.append(self._free_extents, whole_extents)
        single = mfns[~special & ~np.isin(mfns >> _LOW, whole_extents.astype(np.uint64))]
        self._free_frames = np.append(self._free_frames, self._random.permutation(single))

    def _alloc_extents(self, n: int, compat: bool) -> I64:
        """Allocate ``n`` extent numbers, or as many as are free."""
        limit = COMPAT_EXTENTS if compat else self.extents
        while int(np.count_nonzero(self._free_extents < limit)) < n and self._bottom < min(self._top, limit):
            if compat:  # from the bottom; for other guests from the top, as Xen does
                size = min(_SHUFFLED_EXTENTS, min(self._top, limit) - self._bottom)
                new = np.arange(self._bottom, self._bottom + size)
                self._bottom += size
            else:
                size = min(
                    _SHUFFLED_EXTENTS * max(1, (n - len(self._free_extents)) // _SHUFFLED_EXTENTS),
                    self._top - self._bottom,
                )
                new = np.arange(self._top - size, self._top)
                self._top -= size
            self._free_extents = np.append(self._free_extents, self._random.permutation(new))
        fits = np.flatnonzero(self._free_extents < limit)[:n]
        extents = self._free_extents[fits]
        self._free_extents = np.delete(self._free_extents, fits)
        return extents

    # -- content

    def read(self, mfns: U64) -> U8:
        """Return the content of frames, uint8 (n, 4096), a copy; zeroes beyond the host."""
        out = np.zeros((len(mfns), PAGE_SIZE), np.uint8)
        _, slot, row = self._locate(mfns)
        content = np.where(slot > 0, self.rows.content[row], 0).astype(np.int64)
        written = np.flatnonzero(content)
        self._content.read(content[written], out, written)
        return out

    def was_written(self, mfns: U64) -> Mask:
        """Return which frames were written since they were allocated.

        All others are zeroes.
        """
        _, slot, row = self._locate(mfns)
        return np.asarray(np.where(slot > 0, self.rows.content[row], 0) != 0)

    def write(self, mfns: U64, pages: U8) -> None:
        """Replace the content of frames. All must be valid."""
        rows = self.rows_of(mfns)
        self._ensure_content(rows)
        self._content.write(self.rows.content[rows].astype(np.int64), pages)

    def page(self, mfn: int) -> U8:
        """Return the 4096 bytes of one frame. Writing to the array writes the frame."""
        slot = int(self._slot[mfn >> EXTENT_ORDER])
        number = int(self.rows.content[slot - 1 << EXTENT_ORDER | mfn & EXTENT_FRAMES - 1]) if slot else 0
        if not number:
            row = self.rows_of(np.array([mfn], np.uint64))
            self._ensure_content(row)
            number = int(self.rows.content[row[0]])
        return self._content[number]

    def entries(self, mfn: int) -> U64:
        """Return the 512 page table entries of one frame.

        Writing to the array writes the frame.
        """
        entries: U64 = as_ptes(self.page(mfn)[None])[0]
        return entries

    def _ensure_content(self, rows: I64) -> None:
        """Allocate zeroed content for rows that have none."""
        unwritten = np.unique(rows[self.rows.content[rows] == 0])
        if not len(unwritten):
            return
        pages = self._content.alloc(len(unwritten))
        self._content.write(pages, np.zeros((len(unwritten), PAGE_SIZE), np.uint8))
        self.rows.content[unwritten] = pages
