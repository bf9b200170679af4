"""A guest asked to suspend, and let go on when nothing came of it.

The request is control/shutdown in xenstore, which every PV kernel knows; some also take an event channel, which is
quicker by a watch of xenstore's. xen.git:tools/libs/light/libxl_dom_suspend.c, tools/libs/guest/xg_resume.c.
"""

from __future__ import annotations

import contextlib
import time

import numpy as np

from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.errors import GuestError, HostError, RequestError
from xenpv.frames import DomId
from xenpv.host.protocol import DomainInfo, Mover

SUSPENDED = 2  # SHUTDOWN_suspend, xen.git:xen/include/public/sched.h
_REASONS = {0: "powered off", 1: "rebooted", 3: "crashed", 4: "was stopped by its watchdog", 5: "was soft-reset"}
_FIRST_LOOK, _LAST_LOOK = 0.001, 0.010  # seconds between looks


def suspend(host: Mover, domid: DomId, *, timeout: float = 60.0) -> None:
    """Ask the guest to suspend, and wait until it has. One that has suspended already is left as it is.

    Raises RequestError when it cannot react; GuestError when it did not within ``timeout`` seconds, or ended some other
    way meanwhile; HostError. The request is taken back then, also when the wait is interrupted; what the guest has seen
    of it by then it may still obey, later.
    """
    info = host.info(domid)
    if has_suspended(info):
        return
    if info.hvm:
        raise RequestError(f"{info.label} is an HVM domain; PV domains are suspended")
    _check_runs(info)
    if info.paused:
        raise RequestError(f"{info.label} is paused, and cannot suspend: unpause it first")
    host.request_shutdown(domid, "suspend")
    try:
        _wait(host, domid, timeout)
    except BaseException:
        with contextlib.suppress(HostError):  # the domain may have gone
            if host.shutdown_request(domid):
                host.request_shutdown(domid, "")
        raise


def has_suspended(info: DomainInfo) -> bool:
    """Whether it has shut down in order to be saved."""
    return info.shutdown and info.shutdown_reason == SUSPENDED


def _wait(host: Mover, domid: DomId, timeout: float) -> None:
    until, nap = time.monotonic() + timeout, _FIRST_LOOK
    while not has_suspended(info := host.info(domid)):
        _check_runs(info)
        left = until - time.monotonic()
        if left <= 0:
            raise GuestError(f"{info.label} did not suspend in {timeout:g} s: {_why(host, info)}")
        time.sleep(min(nap, left))
        nap = min(2 * nap, _LAST_LOOK)


def _check_runs(info: DomainInfo) -> None:
    if info.shutdown:
        how = _REASONS.get(info.shutdown_reason or 0, f"shut down for reason {info.shutdown_reason}")
        raise GuestError(f"{info.label} {how}, and cannot suspend")


def _why(host: Mover, info: DomainInfo) -> str:
    if info.paused:
        return "it was paused meanwhile"
    if host.shutdown_request(info.domid):
        return "its kernel has not reacted to control/shutdown; the request was taken back"
    return "its kernel has seen the request, and may still obey it"


def resume(host: Mover, domid: DomId) -> None:
    """Let a suspended guest go on where it is, as one whose suspend was cancelled: the call of vcpu 0 returns 1.

    RequestError when it has not suspended; HostError.
    """
    info = host.info(domid)
    if not has_suspended(info):
        raise RequestError(f"{info.label} has not suspended: there is nothing to resume")
    context = np.frombuffer(bytearray(host.vcpu_context(domid, 0)), VCPU_GUEST_CONTEXT[info.width])
    context["user_regs"]["rax" if info.width == 8 else "eax"] = 1
    host.set_vcpu_context(domid, 0, context.tobytes())
    host.resume(domid)
