"""Invariants of the model: all counts equal the references that exist."""

from __future__ import annotations

import numpy as np

from xenpv.abi.x86 import PTE_P, PTE_RW
from xenpv.frames import DomId
from xenpv.host.model.frame_table import (
    ALLOCATED,
    INVALID_M2P_ENTRY,
    NO_OWNER,
    PAE_XEN_L2,
    PINNED,
    SPECIAL,
    VALIDATED,
    WRITABLE,
    XEN,
)
from xenpv.host.model.host import ModelHost
from xenpv.memory.page_tables import is_xen_slot, pte_frames


def check_invariants(host: ModelHost) -> None:
    """Check that the counts of each frame equal its references, and that no page table can be written.

    Source: xen.git:xen/arch/x86/mm.c, head comment
    """
    table, rows = host.frames, host.frames.rows
    live = np.flatnonzero((rows.owner != NO_OWNER) & (rows.owner != XEN))
    count = np.where(rows.flags & ALLOCATED, 1, 0).astype(np.int64)
    types = np.where(rows.flags & (SPECIAL | PINNED), 1, 0).astype(np.int64)
    count += (rows.flags & PINNED) != 0

    def refer(mfns: np.ndarray, *, typed: bool) -> None:
        at = table.rows_of(mfns)
        np.add.at(count, at, 1)
        if typed:
            np.add.at(types, at, 1)

    tables = live[(rows.flags[live] & VALIDATED != 0) & (rows.type[live] <= 4) & (rows.type[live] > 0)]
    for row, mfn in zip(tables.tolist(), table.mfns_of(tables).tolist(), strict=True):
        assert rows.type_count[row] > 0, f"{mfn:#x} is a validated table without a reference"
        level, width = int(rows.type[row]), host.info(DomId(int(rows.owner[row]) - 1)).width
        slots = ~is_xen_slot(level, width, last_pae_l2=bool(rows.flags[row] & PAE_XEN_L2))
        ptes = table.entries(mfn)[slots]
        ptes = ptes[ptes & np.uint64(PTE_P) != 0]
        targets = pte_frames(ptes)
        assert (table.owners(targets) == rows.owner[row]).all(), f"L{level} {mfn:#x} maps a foreign frame"
        writable = ptes & np.uint64(PTE_RW) != 0
        if level == 1:
            refer(targets[~writable], typed=False)
            refer(targets[writable], typed=True)
            assert (rows.type[table.rows_of(targets[writable])] == WRITABLE).all(), f"L1 {mfn:#x} can write a table"
        else:
            refer(targets[targets != mfn], typed=True)
            kinds = rows.type[table.rows_of(targets)]
            assert ((kinds == level - 1) | ((kinds == level) & ~writable)).all()
    for info in host.domains():
        for vcpu in range(info.max_vcpu + 1):
            held = host.hypervisor.vcpu_frames(info.domid, vcpu)
            refer(np.array([mfn for mfn in held if mfn], np.uint64), typed=True)
    np.testing.assert_array_equal(rows.ref_count[live], count[live])
    np.testing.assert_array_equal(rows.type_count[live], types[live])
    free = np.flatnonzero(rows.owner == NO_OWNER)
    for column in (rows.ref_count, rows.type_count, rows.flags, rows.type, rows.content):
        assert not column[free].any()
    for info in host.domains():
        mine = table.owned(info.domid + 1)
        assert len(mine) == info.pages + 1, "one more: its shared info"
        assert (host.m2p(mine) != mine).all()
        assert host.m2p(np.array([info.shared_info_mfn], np.uint64))[0] == INVALID_M2P_ENTRY
