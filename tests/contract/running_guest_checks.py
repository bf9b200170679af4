"""What every Mover must do with a running guest: functions of a host, a domain, and ``run_guest``.

They run on ModelHost with its kernel, and on XenHost in the lab with litmus (mover_on_xen.py). ``run_guest`` lets the
guest run and write its memory for a while. The checks do not call it while the domain is paused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from tests.contract.toolstack_checks import eventually
from xenpv.abi.declare import Width
from xenpv.abi.x86 import PAGE_SIZE, VCPU_GUEST_CONTEXT
from xenpv.abi.xen import START_INFO, START_INFO_MAGIC
from xenpv.frames import U8, U64, DomId
from xenpv.host.protocol import Mover
from xenpv.memory.p2m_reader import names_local_frame
from xenpv.source.live import LiveDomain

SUSPEND = 2  # SHUTDOWN_suspend
RAX: dict[Width, str] = {8: "rax", 4: "eax"}


@contextmanager
def paused(host: Mover, domid: DomId) -> Iterator[None]:
    host.pause(domid)
    try:
        yield
    finally:
        host.unpause(domid)


def contents(host: Mover, domid: DomId) -> tuple[U64, U8]:
    """Return the pfns of all pages, ascending, by the p2m; and their content."""
    live = LiveDomain(host, host.info(domid))
    pfns = [leaves.pfns[names_local_frame(leaves.mfns)] for leaves in live.p2m.iter_leaves()]
    mfns = [leaves.mfns[names_local_frame(leaves.mfns)] for leaves in live.p2m.iter_leaves()]
    numbers, frames = np.concatenate(pfns), np.concatenate(mfns)
    pages = np.empty((len(numbers), PAGE_SIZE), np.uint8)
    for at in range(0, len(numbers), 1024):
        pages[at : at + 1024] = host.map_frames(domid, frames[at : at + 1024])[0]
    return numbers, pages


def rings(host: Mover, domid: DomId, pfns: U64, pages: U8) -> U64:
    """Return the pfns of the rings of console and xenstore. Daemons write them, too, which no log has."""
    width = host.info(domid).width
    magic = np.frombuffer(START_INFO_MAGIC[width], np.uint8)
    infos = [START_INFO.read(page.tobytes(), width) for page in pages[(pages[:, : len(magic)] == magic).all(axis=1)]]
    mfns = [[int(info["store_mfn"]), int(info["console"]["domU"]["mfn"])] for info in infos]
    return np.intersect1d(host.m2p(np.array(mfns, np.uint64).reshape(-1)), pfns)


def log_dirty_logs_every_page_that_changes(host: Mover, domid: DomId, run_guest: Callable[[], None]) -> dict[str, int]:
    """Return how many pages changed, and how many are in the log; the caller compares them."""
    with paused(host, domid):
        pfns, before = contents(host, domid)
        entries = int(pfns[-1]) + 1
        host.log_dirty(domid, on=True)
    try:
        run_guest()
        first = host.dirty_pfns(domid, entries, clean=True)
        run_guest()
        with paused(host, domid):
            seen = host.dirty_pfns(domid, entries, clean=False)
            last = host.dirty_pfns(domid, entries, clean=True)
            assert not len(host.dirty_pfns(domid, entries, clean=True)), "while the domain is paused"
            again, after = contents(host, domid)
    finally:
        host.log_dirty(domid, on=False)
    assert np.array_equal(pfns, again)
    assert np.array_equal(seen, last)
    changed = pfns[(before != after).any(axis=1)]
    logged = np.union1d(first, last)
    assert len(changed)
    missing = np.setdiff1d(np.setdiff1d(changed, logged), rings(host, domid, pfns, after))
    assert not len(missing), f"pages that a migration would not have sent: {missing.tolist()}"
    assert len(first)
    assert len(last)
    return {"changed": len(changed), "logged": len(logged)}


def request_shutdown_is_withdrawn_before_the_guest_runs(
    host: Mover, domid: DomId, run_guest: Callable[[], None]
) -> None:
    with paused(host, domid):
        host.request_shutdown(domid, "suspend")
        assert host.shutdown_request(domid) == "suspend"
        host.request_shutdown(domid, "")
        assert host.shutdown_request(domid) == ""
    run_guest()
    assert not host.info(domid).shutdown


def request_shutdown_suspends_the_guest(host: Mover, domid: DomId, run_guest: Callable[[], None]) -> None:
    """The guest empties the request, and shuts down."""
    host.request_shutdown(domid, "suspend")
    assert eventually(lambda: host.info(domid).shutdown)
    assert host.info(domid).shutdown_reason == SUSPEND
    assert host.shutdown_request(domid) == ""
    host.request_shutdown(domid, "")
    assert host.info(domid).shutdown


def resume_cancels_a_suspend(host: Mover, domid: DomId, run_guest: Callable[[], None]) -> None:
    """The caller checks what the guest does then."""
    width = host.info(domid).width
    context = np.frombuffer(bytearray(host.vcpu_context(domid, 0)), VCPU_GUEST_CONTEXT[width])
    assert context["user_regs"][RAX[width]][0] == 0
    context["user_regs"][RAX[width]] = 1
    host.set_vcpu_context(domid, 0, context.tobytes())
    host.resume(domid)
    assert (host.info(domid).paused, host.info(domid).shutdown) == (False, False)
    run_guest()
    assert (host.info(domid).paused, host.info(domid).shutdown) == (False, False)


RUNNING_GUEST_CHECKS: tuple[Callable[[Mover, DomId, Callable[[], None]], object], ...] = (
    log_dirty_logs_every_page_that_changes,
    request_shutdown_is_withdrawn_before_the_guest_runs,
    request_shutdown_suspends_the_guest,
    resume_cancels_a_suspend,
)
