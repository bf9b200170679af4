"""Asks a guest to suspend, and resumes one.

The request is control/shutdown in xenstore, which every PV kernel knows. Some kernels also take an event channel, which
saves a xenstore watch.

Source: xen.git:tools/libs/light/libxl_dom_suspend.c, tools/libs/guest/xg_resume.c
"""

from __future__ import annotations

import time

import numpy as np

from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.errors import GuestError, HostError, RequestError
from xenpv.frames import DomId
from xenpv.host.protocol import DomainInfo, Mover

SHUTDOWN_SUSPEND = 2  # xen.git:xen/include/public/sched.h
_SHUTDOWN_REASONS = {
    0: "powered off",
    1: "rebooted",
    3: "crashed",
    4: "was stopped by its watchdog",
    5: "was soft-reset",
}
_POLL_MIN, _POLL_MAX = 0.001, 0.010  # seconds between looks at the domain


def suspend(host: Mover, domid: DomId, *, timeout: float = 60.0) -> None:
    """Ask a guest to suspend, and wait until it has.

    Does nothing if it has suspended already.

    On any error, also an interrupt, the request is withdrawn. A guest that has seen it by then may still obey.

    Args:
        host: The host that has the domain.
        domid: The domain.
        timeout: Seconds that the guest has.

    Raises:
        RequestError: The domain is paused, or no PV domain.
        GuestError: It did not suspend in time, or shut down for another reason.
        HostError: Xen or xenstore refused something, or the request could not be withdrawn.
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
    except BaseException as error:
        _withdraw_request(host, info, error)
        raise


def has_suspended(info: DomainInfo) -> bool:
    """Return whether a domain has shut down in order to be saved."""
    return info.shutdown and info.shutdown_reason == SHUTDOWN_SUSPEND


def _wait(host: Mover, domid: DomId, timeout: float) -> None:
    deadline, nap = time.monotonic() + timeout, _POLL_MIN
    while not has_suspended(info := host.info(domid)):
        _check_runs(info)
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise GuestError(f"{info.label} did not suspend in {timeout:g} s: {_explain_timeout(host, info)}")
        time.sleep(min(nap, remaining))
        nap = min(2 * nap, _POLL_MAX)


def _withdraw_request(host: Mover, info: DomainInfo, error: BaseException) -> None:
    """Withdraw the request to suspend.

    HostError if it stays: a guest that obeys later would stay suspended.
    """
    try:
        if host.shutdown_request(info.domid):
            host.request_shutdown(info.domid, "")
    except HostError as e:
        if not any(other.domid == info.domid for other in host.domains()):
            return  # a domain that is gone obeys no request
        first = str(error) or type(error).__name__
        problem = f"{first}; {info.label} may still suspend: the request to suspend could not be withdrawn"
        raise HostError(f"{problem}: {e}", op="suspend", domid=info.domid, errno=e.errno) from error


def _check_runs(info: DomainInfo) -> None:
    if info.shutdown:
        reason = info.shutdown_reason or 0
        how = _SHUTDOWN_REASONS.get(reason, f"shut down for reason {reason}")
        raise GuestError(f"{info.label} {how}, and cannot suspend")


def _explain_timeout(host: Mover, info: DomainInfo) -> str:
    if info.paused:
        return "it was paused meanwhile"
    if host.shutdown_request(info.domid):
        return "its kernel has not reacted to control/shutdown"
    return "its kernel has seen the request, and may still obey it"


def resume(host: Mover, domid: DomId) -> None:
    """Resume a suspended guest as one whose suspend was cancelled.

    Its hypercall on vcpu 0 returns 1.

    Raises:
        RequestError: It has not suspended.
        HostError: Xen refused something; the domain may stay suspended.
    """
    info = host.info(domid)
    if not has_suspended(info):
        raise RequestError(f"{info.label} has not suspended: there is nothing to resume")
    context = np.frombuffer(bytearray(host.vcpu_context(domid, 0)), VCPU_GUEST_CONTEXT[info.width])
    context["user_regs"]["rax" if info.width == 8 else "eax"] = 1
    host.set_vcpu_context(domid, 0, context.tobytes())
    host.resume(domid)
