"""The calls of ModelHost with which a toolstack makes a domain, but for those that guests make too."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import numpy as np

from xenpv.abi.declare import Width
from xenpv.frames import PAGE_SIZE, U8, U64, DomId
from xenpv.host import xenstore_nodes
from xenpv.host.model.core import ModelCore
from xenpv.host.model.domain import Domain, Vcpu
from xenpv.host.model.frame_table import SPECIAL
from xenpv.host.protocol import DOM0, Daemons, Ring

MAX_VCPUS = 8192  # MAX_VIRT_CPUS of xen.git:xen/arch/x86/include/asm/config.h
_HYPERCALLS = PAGE_SIZE // 32
_IRET = 23  # the one hypercall that does not return, and is entered otherwise


class ModelBuild(ModelCore):
    """The Toolstack protocol's part."""

    def create(
        self,
        width: Width = 8,
        *,
        vcpus: int = 1,
        max_pages: int = 0,
        name: str | None = None,
        uuid: str | None = None,
    ) -> DomId:
        """A domain without memory, paused once."""
        if not 1 <= vcpus <= MAX_VCPUS:
            raise self._refusal("createdomain", None, errno.EINVAL, f"{vcpus} vcpus")
        domid = DomId(self._next)
        domain = Domain(domid, width, name, uuid, [Vcpu() for _ in range(vcpus)], max_pages)
        with self._refusing("createdomain", None):
            domain.shared_info_mfn = self.frames.take_special(domain.number)
        self._next += 1
        self._domains[domid] = domain
        self._write(xenstore_nodes.created(domid, name, uuid))
        return domid

    def set_width(self, domid: DomId, width: Width) -> None:
        """Make a domain without memory one for 32-bit guests."""
        domain = self._domain("set_address_size", domid)
        if width == domain.width:
            return
        if width == 8:
            raise self._refusal("set_address_size", domid, errno.EINVAL, "a 32-bit domain stays one")
        if self.frames.pages[domain.number]:
            raise self._refusal("set_address_size", domid, errno.EACCES, "it has memory")
        domain.width = width

    def destroy(self, domid: DomId) -> None:
        """End it, and free all that it has."""
        domain = self._domain("destroydomain", domid)
        if domid == DOM0:
            raise self._refusal("destroydomain", domid, errno.EINVAL, "the domain that asks")
        self.types.forget(domain.number)
        self.frames.forget(domain.number)
        del self._domains[domid]
        shared = any(other.uuid == domain.uuid for other in self._domains.values())
        for path in xenstore_nodes.all_of(domid, self.daemons(), None if shared else domain.uuid):
            self.store.remove(path)
            parent = path.rpartition("/")[0]
            while parent.startswith(f"{xenstore_nodes.home(DOM0)}/") and not self.store.list(parent):
                self.store.remove(parent)
                parent = parent.rpartition("/")[0]

    def rename(self, domid: DomId, name: str) -> None:
        """What it is called from now on."""
        domain = self._domain("rename", domid)
        domain.name = name
        self._write(xenstore_nodes.named(domid, name, domain.uuid))

    def set_memory_map(self, domid: DomId, pages: int) -> None:
        """Keep what the guest is to be told."""
        self._domain("set_memory_map", domid).memory_map = pages

    def told_memory(self, domid: DomId) -> int | None:
        """What memory_map was given; GuestView asks."""
        return self._domain("memory_map", domid).memory_map

    def free_pages(self) -> int:
        """How many pages nobody has."""
        return self.frames.free

    @contextlib.contextmanager
    def map_writable(self, domid: DomId, mfns: U64) -> Iterator[U8]:
        """Frames to write to until the block ends: a copy, which is written back then. A log of dirty pages does not
        have them, as on Xen, which marks what guests write and what it writes for them.
        """
        domain = self._may_write("map_writable", domid, mfns)
        pages = self.frames.read(mfns)
        rows = self.types.hold_writable(mfns)
        try:
            yield pages
        finally:
            if self._domains.get(domid) is domain:
                self.frames.write(mfns, pages)
                self.types.let_go(rows)

    def write_frames(self, domid: DomId, mfns: U64, pages: U8) -> None:
        """Write whole frames through foreign mappings, as a toolstack does. All or none.

        HostError: EINVAL for a frame not the domain's, EBUSY for one that may not be mapped writable: a page table.
        """
        self._may_write("write_frames", domid, mfns)
        self.frames.write(mfns, pages)

    def init_hypercall_page(self, domid: DomId, mfn: int) -> None:
        """Fill a frame with the code that makes hypercalls."""
        domain, frame = self._domain("hypercall_init", domid), np.array([mfn], np.uint64)
        self._own("hypercall_init", domid, frame)
        if not self.types.writable(domain.owner, frame)[0]:
            raise self._refusal("hypercall_init", domid, errno.EPERM, f"mfn {mfn:#x} is not writable")
        self.frames.write(frame, _hypercalls(domain.width))

    def pin_tables(self, domid: DomId, mfns: U64, levels: U8) -> None:
        """Pin one table after another, up to the first that is refused."""
        domain = self._domain("mmuext_op", domid)
        with self._refusing("mmuext_op", domid):
            for mfn, level in zip(mfns.tolist(), levels.tolist(), strict=True):
                self.types.pin(domain.owner, mfn, level)

    def write_shared_info(self, domid: DomId, data: bytes, offset: int = 0) -> None:
        """Write into the shared info page."""
        mfn = self._domain("shared_info", domid).shared_info_mfn
        if offset < 0 or offset + len(data) > PAGE_SIZE:
            raise self._refusal("shared_info", domid, errno.EINVAL, f"{len(data)} bytes at {offset:#x}")
        self.frames.page(mfn)[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def daemons(self) -> Daemons:
        """All in dom0."""
        return Daemons()

    def seed_grants(self, domid: DomId, *, console: int, xenstore: int) -> None:
        """Grant the daemons their rings."""
        self._own("seed_grants", domid, np.array([console, xenstore], np.uint64))
        self._domain("seed_grants", domid).grants.update({0: console, 1: xenstore})

    def introduce(self, domid: DomId, *, console: Ring, xenstore: Ring) -> None:
        """Write the nodes of its rings. There are no daemons that would look at them."""
        domain = self._domain("introduce", domid)
        if 1 not in domain.grants:
            raise self._refusal("introduce", domid, errno.EINVAL, "xenstored was granted no ring")
        info = domain.info(self.frames.pages[domain.number])
        self._write(xenstore_nodes.introduced(info, self.daemons(), console, xenstore))

    def set_configuration(self, domid: DomId, config: bytes) -> None:
        """Keep what it is made by. There is no xl that would ask."""
        self._domain("userdata", domid).config = config

    def configuration(self, domid: DomId) -> bytes | None:
        """What is kept of how it is made."""
        return self._domain("userdata", domid).config or None

    def _write(self, nodes: list[xenstore_nodes.Node]) -> None:
        for node in nodes:
            self.store.write(node.path, node.value.encode())

    def _may_write(self, op: str, domid: DomId, mfns: U64) -> Domain:
        domain = self._domain(op, domid)
        self._own(op, domid, mfns)
        ok = self.types.writable(domain.owner, mfns)
        if not ok.all():
            why = f"mfn {int(mfns[np.argmin(ok)]):#x} cannot be mapped writable"
            raise self._refusal(op, domid, errno.EBUSY, why)
        return domain

    def _own(self, op: str, domid: DomId, mfns: U64) -> None:
        """All of these are the domain's memory, not Xen's own pages for it."""
        ok = self._ours(op, domid, mfns) & ((self.frames.types(mfns)[1] & SPECIAL) == 0)
        if not ok.all():
            why = f"mfn {int(mfns[np.argmin(ok)]):#x} is not the domain's"
            raise self._refusal(op, domid, errno.EINVAL, why)


def _hypercalls(width: Width) -> U8:
    """The code that Xen puts into a hypercall page (xen.git:xen/arch/x86/pv/hypercall.c), uint8 (1, 4096)."""
    before, after = ("51 41 53", "0f 05 41 5b 59 c3") if width == 8 else ("", "cd 82 c3")
    page = np.zeros((_HYPERCALLS, 32), np.uint8)
    for number in range(_HYPERCALLS):
        last = after[:5] if number == _IRET else after
        push = "50" if number == _IRET else ""
        code = bytes.fromhex(f"{before} {push} b8 {number:02x} 00 00 00 {last}")
        page[number, : len(code)] = np.frombuffer(code, np.uint8)
    return page.reshape(1, PAGE_SIZE)
