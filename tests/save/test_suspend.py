"""Guests that are asked to suspend: those that do, and all that can come instead."""

from __future__ import annotations

import errno
import time
from dataclasses import replace

import pytest

from tests.support.kernel_guest import Guest
from tests.support.live_guests import attend
from tests.support.saving import BOTH, PatchedHost
from xenpv.abi.declare import Width
from xenpv.errors import GuestError, HostError, RequestError
from xenpv.frames import DomId
from xenpv.host.protocol import DomainInfo
from xenpv.save.suspend import has_suspended, resume, suspend


@BOTH
def test_suspend_and_resume_repeatedly_keeps_memory(width: Width) -> None:
    guest = Guest.boot("both", width)
    free = guest.do("free_pfns")
    guest.do("write_pattern", free, 5)
    attend(guest)
    for _ in range(2):
        suspend(guest.host, guest.domid)
        assert has_suspended(guest.host.info(guest.domid))
        assert guest.host.shutdown_request(guest.domid) == ""
        suspend(guest.host, guest.domid)  # has already
        resume(guest.host, guest.domid)
        assert guest.do("resume") is True, "cancelled, as it sees it"
        assert not len(guest.do("check_pattern", free, 5))
        assert set(guest.assert_consistent()) <= {"physmap-invalid"}


def test_suspend_unresponsive_guest_withdraws_the_request() -> None:
    guest = Guest.boot("linear")
    with pytest.raises(GuestError, match=r"dom1 \(litmus\) .*\b0\.05 s"):
        suspend(guest.host, guest.domid, timeout=0.05)
    assert guest.host.shutdown_request(guest.domid) == "", "the request was taken back"


def test_suspend_slow_guest_is_an_error_that_says_so() -> None:
    guest = Guest.boot("linear")
    guest.host.set_time_slice(guest.domid, lambda: guest.host.store.write("/local/domain/1/control/shutdown", b""))
    with pytest.raises(GuestError, match="still"):
        suspend(guest.host, guest.domid, timeout=0.02)


@pytest.mark.parametrize(("reason", "how"), [(0, "powered off"), (1, "rebooted"), (3, "crashed"), (77, "reason 77")])
def test_suspend_guest_that_shuts_down_is_an_error(reason: int, how: str) -> None:
    guest = Guest.boot("linear")
    guest.host.set_time_slice(guest.domid, lambda: guest.host.hypervisor.shutdown(guest.domid, reason))
    with pytest.raises(GuestError, match=how):
        suspend(guest.host, guest.domid)
    assert guest.host.shutdown_request(guest.domid) == ""
    with pytest.raises(GuestError, match=how):
        suspend(guest.host, guest.domid)
    with pytest.raises(RequestError):
        resume(guest.host, guest.domid)


def test_suspend_paused_guest_is_refused() -> None:
    guest = Guest.boot("linear")
    guest.host.pause(guest.domid)
    with pytest.raises(RequestError):
        suspend(guest.host, guest.domid)
    guest.host.unpause(guest.domid)
    guest.host.set_time_slice(guest.domid, lambda: guest.host.pause(guest.domid))
    with pytest.raises(GuestError):
        suspend(guest.host, guest.domid, timeout=0.02)
    assert guest.host.info(guest.domid).paused


def test_suspend_destroyed_guest_raises_host_error() -> None:
    guest = Guest.boot("linear")
    guest.host.set_time_slice(guest.domid, lambda: guest.host.destroy(guest.domid))
    with pytest.raises(HostError) as e:
        suspend(guest.host, guest.domid)
    assert e.value.errno == errno.ESRCH


def test_suspend_hvm_domain_is_refused() -> None:
    guest = Guest.boot("linear")

    def info(domid: DomId) -> DomainInfo:
        return replace(guest.host.info(domid), hvm=True)

    with pytest.raises(RequestError):
        suspend(PatchedHost(guest, info=info), guest.domid)


def test_suspend_interrupted_withdraws_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest.boot("linear")

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        suspend(guest.host, guest.domid)
    assert guest.host.shutdown_request(guest.domid) == ""
