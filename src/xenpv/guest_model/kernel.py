"""The PV kernel of the model, in Python; guests/litmus is its twin on real Xen.

It uses a GuestView and nothing else, and obeys the rules of a PV guest. Page tables are read-only before they are used.
Pages are unmapped before they go back to Xen. After a restore every mfn has changed.

>>> kernel = Kernel("rooted4")                                      # doctest: +SKIP
>>> host.run(domid, kernel.boot)                                    # doctest: +SKIP
>>> host.run(domid, lambda view: kernel.balloon_out(view, pfns))    # doctest: +SKIP
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from xenpv.abi.xen import START_INFO
from xenpv.errors import GuestError, RequestError
from xenpv.frames import ENTRIES, I64, NO_FRAME, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_BATCH, U64, first_bad
from xenpv.guest_model.kernel_p2m import KernelP2M
from xenpv.guest_model.kernel_pages import LINKED_AT, KernelPages, StartInfo
from xenpv.guest_model.p2m_forms import PublishedForm, parse_form
from xenpv.host.model.guest_view import GuestView
from xenpv.host.model.host import SHUTDOWN_SUSPEND
from xenpv.host.xenstore_nodes import CONTROL_SHUTDOWN
from xenpv.memory.p2m_reader import names_local_frame

SUSPEND_EVENT_CHANNEL = "device/suspend/event-channel"
_COUNTER_SHIFT = np.uint64(40)


class Kernel:
    """A kernel, whose state moves with the guest to a new domain.

    Like the memory of a guest, the state has pfns and addresses, never mfns. If the reserve is used up, a call raises
    RequestError, and the kernel is as lost as one that panicked.

    Attributes:
        pages: Its pages, once it has booted.
        p2m: Its p2m, once it has booted.
        port: The event channel by which the toolstack asks it to suspend.

    Args:
        form: How it publishes its p2m.
        linked_at: The address of pfn 0 in the initial mapping; None: the usual one.
        reserve: Pages for page tables and trees; None: as many as its memory needs.
    """

    pages: KernelPages
    p2m: KernelP2M

    def __init__(
        self, form: PublishedForm | str = "linear", *, linked_at: int | None = None, reserve: int | None = None
    ) -> None:
        self.form = parse_form(form) if isinstance(form, str) else form
        self.port = 0
        self._linked_at, self._reserve = linked_at, reserve

    def boot(self, view: GuestView) -> None:
        """Boot in a domain as the builder left it.

        Map shared info, make the p2m, publish it, and offer to suspend.

        GuestError if there is no start info. RequestError if there are too few pages, or too many for the form.
        """
        self._start = start = StartInfo.read(view)
        base = LINKED_AT[view.width] if self._linked_at is None else self._linked_at
        reserve = _reserve(start.nr_pages) if self._reserve is None else self._reserve
        self.pages = KernelPages(view, start, base, reserve)
        self.p2m = KernelP2M(view, start, self.pages, self.form)
        self.p2m.publish(view)
        self._offer_suspend(view)

    # -- memory

    def free_pfns(self, view: GuestView) -> U64:
        """Return the pfns of all pages that are not the kernel's own, ascending.

        Reads the whole p2m.
        """
        return self.p2m.populated(view, self.pages.end)

    def write_pattern(self, view: GuestView, pfns: U64, counter: int) -> None:
        """Fill each page with the word ``counter << 40 | pfn``, as litmus does."""
        for batch in _batches(pfns):
            words = np.repeat(_pattern_words(batch, counter)[:, None], ENTRIES, axis=1)
            view.write_pages(self._map(view, batch), words.view(np.uint8).reshape(-1, PAGE_SIZE))

    def check_pattern(self, view: GuestView, pfns: U64, counter: int) -> U64:
        """Return the pfns of pages that differ from the pattern with this counter."""
        bad = [np.empty(0, np.uint64)]
        for batch in _batches(pfns):
            words = view.read_pages(self._map(view, batch)).view("<u8")
            bad.append(batch[(words != _pattern_words(batch, counter)[:, None]).any(axis=1)])
        return np.concatenate(bad)

    def balloon_out(self, view: GuestView, pfns: U64) -> None:
        """Return pages to Xen, after their mappings and their p2m entries.

        RequestError if a page is the kernel's own, or does not exist. GuestError if Xen does not take all.
        """
        mfns = self._lookup_free_pages(view, pfns)
        self.pages.unmap(view, pfns)
        self.p2m.store(view, pfns, np.full(len(pfns), NO_FRAME))
        released = view.decrease_reservation(mfns)
        if released < len(mfns):
            raise GuestError(
                f"Xen took {released} pages of {len(mfns)}: mfn {int(mfns[released]):#x} is not the domain's"
            )

    def balloon_in(self, view: GuestView, pfns: U64) -> U64:
        """Ask Xen for pages at vacant pfns; the p2m grows if it must.

        Return the pfns that got a page.

        RequestError if a pfn has a page already, or is beyond what the p2m can reach.
        """
        self._check_vacant(view, pfns)
        self.p2m.extend_to(view, pfns)
        mfns = view.populate_physmap(pfns)
        populated = pfns[: len(mfns)]
        self.p2m.store(view, populated, mfns)
        return populated

    def move(self, view: GuestView, pfns: U64, new: U64) -> None:
        """Give pages other pfns, in m2p and p2m; the p2m grows if it must.

        Their mappings stay.

        RequestError if a page is the kernel's own, or does not exist; if a new pfn has another page, or is beyond what
        the p2m can reach.
        """
        if len(pfns) != len(new) or len(np.unique(new)) < len(new):
            raise RequestError(f"{len(pfns)} pages need as many distinct new pfns, not {len(np.unique(new))}")
        mfns = self._lookup_free_pages(view, pfns)
        self._check_vacant(view, np.setdiff1d(new, pfns))
        self.p2m.extend_to(view, new)
        self.p2m.store(view, pfns, np.full(len(pfns), NO_FRAME))
        view.machphys_update(mfns, new)
        self.p2m.store(view, new, mfns)
        if len(pfns):
            self.pages.renumber(pfns, new)

    def spread(self, view: GuestView, end: int, groups: int = 64) -> U64:
        """Spread all free pages over ``end`` pfns, in ``groups`` of equal size.

        Each group ends where an equal part of the pfns ends.

        Returns:
            Their new pfns.

        Raises:
            RequestError: The pages do not fit, or the p2m cannot reach ``end``.
        """
        pfns = self.free_pfns(view)
        count: I64 = len(pfns) // groups + (np.arange(groups) < len(pfns) % groups)
        first = end - np.arange(groups)[::-1] * (end // groups) - count
        if first[0] < self.pages.end or (count > end // groups).any():
            message = f"{len(pfns)} pages do not fit {groups} groups in {end:#x} pfns"
            raise RequestError(message, needed=len(pfns), available=end)
        ends = np.cumsum(count)
        new = (np.repeat(first - (ends - count), count) + np.arange(len(pfns))).astype(np.uint64)
        self.move(view, pfns, new)
        return new

    def _map(self, view: GuestView, pfns: U64) -> U64:
        """Return the addresses of pages; map those that are not mapped yet."""
        new = np.unique(self.pages.unmapped(pfns))
        if len(new):
            self.pages.map(view, new, self._lookup_free_pages(view, new))
        return self.pages.vaddrs(pfns)

    def _lookup_free_pages(self, view: GuestView, pfns: U64) -> U64:
        """Return the mfns of pages that are not the kernel's own.

        RequestError if one is, does not exist, or appears twice.
        """
        if (own := first_bad(pfns < np.uint64(self.pages.end))) is not None:
            raise RequestError(f"pfn {int(pfns[own]):#x} is the kernel's own")
        mfns = self.p2m.lookup(view, pfns)
        if (absent := first_bad(~names_local_frame(mfns))) is not None:
            raise RequestError(f"pfn {int(pfns[absent]):#x} has no page")
        _check_unique(pfns)
        return mfns

    def _check_vacant(self, view: GuestView, pfns: U64) -> None:
        """Raise RequestError unless no pfn has a page, and each appears once."""
        is_occupied = (pfns < np.uint64(self.pages.end)) | (self.p2m.lookup(view, pfns) != NO_FRAME)
        if (first := first_bad(is_occupied)) is not None:
            raise RequestError(f"pfn {int(pfns[first]):#x} has a page already")
        _check_unique(pfns)

    # -- suspend and resume

    def poll(self, view: GuestView) -> None:
        """Suspend if asked by the event channel or by control/shutdown."""
        if view.consume_event(self.port):
            self.suspend(view)
        if view.xenstore_read(CONTROL_SHUTDOWN) == b"suspend":
            view.xenstore_write(CONTROL_SHUTDOWN, b"")
            self.suspend(view)

    def suspend(self, view: GuestView) -> NoReturn:
        """Prepare to be saved, and shut down.

        Start info names the two rings by pfn then; shared info is unmapped.

        The mfn of start info is the third argument of the hypercall.
        """
        for field in ("store_mfn", "console.domU.mfn"):
            mfn = np.array([self._read_field(view, field)], np.uint64)
            self._write_field(view, field, int(view.m2p(mfn)[0]))
        self.pages.map_shared_info(view, 0)
        pfn = self._start.address - self.pages.base >> PAGE_SHIFT
        view.shutdown(SHUTDOWN_SUSPEND, self._lookup(view, pfn))

    def resume(self, view: GuestView) -> bool:
        """Go on after a suspend.

        Return whether it was cancelled, which rax tells: then nothing has changed.

        Otherwise this is a new domain. The tables above the leaves hold mfns of the old host: make and publish them as
        at boot.
        """
        cancelled = view.register("ax") == 1
        if cancelled:
            for field in ("store_mfn", "console.domU.mfn"):
                self._write_field(view, field, self._lookup(view, self._read_field(view, field)))
        self.pages.map_shared_info(view, self._read_field(view, "shared_info"))
        if not cancelled:
            self.p2m.publish(view)
            self._offer_suspend(view)
        return cancelled

    def _offer_suspend(self, view: GuestView) -> None:
        self.port = view.alloc_event_channel()
        view.xenstore_write(SUSPEND_EVENT_CHANNEL, str(self.port).encode())

    def _lookup(self, view: GuestView, pfn: int) -> int:
        return int(self.p2m.lookup(view, np.array([pfn], np.uint64))[0])

    def _read_field(self, view: GuestView, name: str) -> int:
        """Read a field of start info."""
        vaddr = self._start.address + START_INFO.offset(view.width, name)
        return int.from_bytes(view.read(vaddr, view.width), "little")

    def _write_field(self, view: GuestView, name: str, value: int) -> None:
        vaddr = self._start.address + START_INFO.offset(view.width, name)
        view.write(vaddr, value.to_bytes(view.width, "little"))


def _check_unique(pfns: U64) -> None:
    if len(np.unique(pfns)) < len(pfns):
        raise RequestError("a pfn appears twice")


def _reserve(nr_pages: int) -> int:
    """Return how many pages to reserve.

    Enough for two copies of list tables and tree, and for tables that map 8 GiB.
    """
    return min(nr_pages // 4, 1024 + nr_pages // ENTRIES // ENTRIES * 8 + min(nr_pages // ENTRIES, 4096))


def _pattern_words(pfns: U64, counter: int) -> U64:
    return np.uint64(counter) << _COUNTER_SHIFT | pfns


def _batches(pfns: U64) -> list[U64]:
    return [pfns[i : i + PAGES_PER_BATCH] for i in range(0, len(pfns), PAGES_PER_BATCH)]
