"""A PV kernel for ModelHost: what guests/litmus is on real Xen, in Python.

It sees a GuestView and nothing else, and what it does goes by the same rules: page tables are read-only before they are
used, what is given back to Xen is mapped nowhere, and after a restore every mfn is another.

>>> kernel = Kernel("rooted4")                                      # doctest: +SKIP
>>> host.run(domid, kernel.boot)                                    # doctest: +SKIP
>>> host.run(domid, lambda view: kernel.balloon_out(view, pfns))    # doctest: +SKIP
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from xenpv.abi.xen import START_INFO
from xenpv.errors import GuestError, RequestError
from xenpv.frames import ENTRIES, I64, NO_FRAME, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_BATCH, U64
from xenpv.guest_model.kernel_p2m import KernelP2M
from xenpv.guest_model.kernel_pages import LINKED_AT, KernelPages, StartInfo
from xenpv.guest_model.p2m_forms import Published, parse_form
from xenpv.host.model.guest_view import GuestView
from xenpv.host.model.host import SHUTDOWN_SUSPEND
from xenpv.host.xenstore_nodes import CONTROL_SHUTDOWN
from xenpv.memory.p2m import names_local_frame

SUSPEND_KEY = "device/suspend/event-channel"
_COUNTER_SHIFT = np.uint64(40)


class Kernel:
    """A kernel that publishes its p2m in ``form``. What it knows is kept from one run to the next, as a guest's memory
    is, and goes with it to a new domain: by pfns and addresses, never mfns.

    ``linked_at``: the address of pfn 0 in the initial mapping; ``reserve``: pages for page tables and trees. Both are
    a choice of the kernel's if they are None. ``pages`` and ``p2m`` are there once it has booted; after that any call
    raises RequestError when the reserve is used up, and the kernel is as lost as one that panics.
    """

    pages: KernelPages
    p2m: KernelP2M

    def __init__(
        self, form: Published | str = "linear", *, linked_at: int | None = None, reserve: int | None = None
    ) -> None:
        self.form = parse_form(form) if isinstance(form, str) else form
        self.port = 0
        self._linked_at, self._reserve = linked_at, reserve

    def boot(self, view: GuestView) -> None:
        """From the builder's hands: map shared info, make the p2m of the form, publish it, ask for suspend events.

        GuestError if there is no start info; RequestError if there are too few pages, or the form cannot hold them.
        """
        self._start = start = StartInfo.read(view)
        base = LINKED_AT[view.width] if self._linked_at is None else self._linked_at
        reserve = _reserve(start.nr_pages) if self._reserve is None else self._reserve
        self.pages = KernelPages(view, start, base, reserve)
        self.p2m = KernelP2M(view, start, self.pages, self.form)
        self.p2m.publish(view)
        self._offer_suspend(view)

    # --- memory ------------------------------------------------------------------------------------------------------

    def free_pfns(self, view: GuestView) -> U64:
        """The pfns with a page that the kernel itself has no use for, ascending. Reads the whole list."""
        return self.p2m.populated(view, self.pages.end)

    def write_pattern(self, view: GuestView, pfns: U64, counter: int) -> None:
        """Fill pages with the pattern: 512 times ``counter << 40 | pfn``, as litmus does."""
        for some in _pieces(pfns):
            words = np.repeat(_words(some, counter)[:, None], ENTRIES, axis=1)
            view.write_pages(self._mapped(view, some), words.view(np.uint8).reshape(-1, PAGE_SIZE))

    def check_pattern(self, view: GuestView, pfns: U64, counter: int) -> U64:
        """Those pfns whose page is not, to the last word, what write_pattern wrote with that counter."""
        bad = [np.empty(0, np.uint64)]
        for some in _pieces(pfns):
            words = view.read_pages(self._mapped(view, some)).view("<u8")
            bad.append(some[(words != _words(some, counter)[:, None]).any(axis=1)])
        return np.concatenate(bad)

    def balloon_out(self, view: GuestView, pfns: U64) -> None:
        """Give pages back to Xen: first their mappings, then their entries, then they.

        RequestError if one is the kernel's own, or not there; GuestError if Xen does not take them all.
        """
        mfns = self._frames_of(view, pfns)
        self.pages.unmap(view, pfns)
        self.p2m.store(view, pfns, np.full(len(pfns), NO_FRAME))
        done = view.decrease_reservation(mfns)
        if done < len(mfns):
            raise GuestError(f"Xen took {done} pages of {len(mfns)}: mfn {int(mfns[done]):#x} is not the domain's")

    def balloon_in(self, view: GuestView, pfns: U64) -> U64:
        """Ask Xen for pages at pfns that have none, the p2m growing where it must: those that got one.

        RequestError if one of them has a page, or the p2m cannot reach it.
        """
        self._are_vacant(view, pfns)
        self.p2m.reach(view, pfns)
        mfns = view.populate_physmap(pfns)
        got = pfns[: len(mfns)]
        self.p2m.store(view, got, mfns)
        return got

    def move(self, view: GuestView, pfns: U64, new: U64) -> None:
        """Give pages other pfns, in the m2p and in the p2m, which grows where it must. Where they are mapped stays.

        RequestError if a page is the kernel's own, or not there, if another one's pfn would be taken, or the p2m
        cannot reach it.
        """
        if len(pfns) != len(new) or len(np.unique(new)) < len(new):
            raise RequestError(f"{len(pfns)} pages cannot go to {len(np.unique(new))} pfns")
        mfns = self._frames_of(view, pfns)
        self._are_vacant(view, np.setdiff1d(new, pfns))
        self.p2m.reach(view, new)
        self.p2m.store(view, pfns, np.full(len(pfns), NO_FRAME))
        view.machphys_update(mfns, new)
        self.p2m.store(view, new, mfns)
        if len(pfns):
            self.pages.renumber(pfns, new)

    def spread(self, view: GuestView, stretch: int, places: int = 64) -> U64:
        """Move all free pages apart: equally many to each of so many places, each ending where an equal part of
        ``stretch`` pfns ends, as litmus does. Their new pfns.

        RequestError if the stretch is too short for them, or the p2m cannot reach its end.
        """
        pfns = self.free_pfns(view)
        count: I64 = len(pfns) // places + (np.arange(places) < len(pfns) % places)
        first = stretch - np.arange(places)[::-1] * (stretch // places) - count
        if first[0] < self.pages.end or (count > stretch // places).any():
            what = f"{len(pfns)} pages do not fit {places} places in {stretch:#x} pfns"
            raise RequestError(what, needed=len(pfns), available=stretch)
        ends = np.cumsum(count)
        new = (np.repeat(first - (ends - count), count) + np.arange(len(pfns))).astype(np.uint64)
        self.move(view, pfns, new)
        return new

    def _mapped(self, view: GuestView, pfns: U64) -> U64:
        """The addresses of pages, which are mapped where they are not."""
        new = np.unique(self.pages.unmapped(pfns))
        if len(new):
            self.pages.map(view, new, self._frames_of(view, new))
        return self.pages.vaddrs(pfns)

    def _frames_of(self, view: GuestView, pfns: U64) -> U64:
        """The frames of free pages."""
        own = pfns < np.uint64(self.pages.end)
        if own.any():
            raise RequestError(f"pfn {int(pfns[own][0]):#x} is the kernel's own")
        mfns = self.p2m.lookup(view, pfns)
        bad = ~names_local_frame(mfns)
        if bad.any() or len(np.unique(pfns)) < len(pfns):
            why = f"pfn {int(pfns[bad][0]):#x} has no page" if bad.any() else "a pfn stands there twice"
            raise RequestError(why)
        return mfns

    def _are_vacant(self, view: GuestView, pfns: U64) -> None:
        taken = (pfns < np.uint64(self.pages.end)) | (self.p2m.lookup(view, pfns) != NO_FRAME)
        if taken.any() or len(np.unique(pfns)) < len(pfns):
            why = f"pfn {int(pfns[taken][0]):#x} is taken" if taken.any() else "a pfn stands there twice"
            raise RequestError(why)

    # --- suspend and resume ------------------------------------------------------------------------------------------

    def poll(self, view: GuestView) -> None:
        """Suspend if the toolstack asks for it, by the event channel or by control/shutdown; else nothing."""
        if view.consume_event(self.port):
            self.suspend(view)
        if view.xenstore_read(CONTROL_SHUTDOWN) == b"suspend":
            view.xenstore_write(CONTROL_SHUTDOWN, b"")
            self.suspend(view)

    def suspend(self, view: GuestView) -> NoReturn:
        """Make ready to be saved, and stop: the two rings are named by pfn, shared info is mapped nowhere, and start
        info is the third argument of the call.
        """
        for field in ("store_mfn", "console.domU.mfn"):
            mfn = np.array([self._field(view, field)], np.uint64)
            self._set_field(view, field, int(view.m2p(mfn)[0]))
        self.pages.map_shared_info(view, 0)
        pfn = self._start.address - self.pages.base >> PAGE_SHIFT
        view.shutdown(SHUTDOWN_SUSPEND, self._mfn(view, pfn))

    def resume(self, view: GuestView) -> bool:
        """Go on after a suspend; whether it was cancelled, which rax says, and nothing has changed.

        In a new domain start info was rewritten, and what is above the leaves holds the old host's mfns: it is made
        anew and published, as at boot.
        """
        cancelled = view.register("ax") == 1
        if cancelled:
            for field in ("store_mfn", "console.domU.mfn"):
                self._set_field(view, field, self._mfn(view, self._field(view, field)))
        self.pages.map_shared_info(view, self._field(view, "shared_info"))
        if not cancelled:
            self.p2m.publish(view)
            self._offer_suspend(view)
        return cancelled

    def _offer_suspend(self, view: GuestView) -> None:
        self.port = view.alloc_event_channel()
        view.xenstore_write(SUSPEND_KEY, str(self.port).encode())

    def _mfn(self, view: GuestView, pfn: int) -> int:
        return int(self.p2m.lookup(view, np.array([pfn], np.uint64))[0])

    def _field(self, view: GuestView, name: str) -> int:
        at = self._start.address + START_INFO.offset(view.width, name)
        return int.from_bytes(view.read(at, view.width), "little")

    def _set_field(self, view: GuestView, name: str, value: int) -> None:
        at = self._start.address + START_INFO.offset(view.width, name)
        view.write(at, value.to_bytes(view.width, "little"))


def _reserve(nr_pages: int) -> int:
    """Pages for tables: some, those of a list and a tree in an old and a new copy, and those that map 8 GiB."""
    return min(nr_pages // 4, 1024 + nr_pages // ENTRIES // ENTRIES * 8 + min(nr_pages // ENTRIES, 4096))


def _words(pfns: U64, counter: int) -> U64:
    return np.uint64(counter) << _COUNTER_SHIFT | pfns


def _pieces(pfns: U64) -> list[U64]:
    return [pfns[i : i + PAGES_PER_BATCH] for i in range(0, len(pfns), PAGES_PER_BATCH)]
