"""The HostError of a refused call, for the model and for real Xen."""

from __future__ import annotations

import errno
import os

from xenpv.errors import HostError


def host_error(op: str, number: int, domid: int | None = None, reason: str | None = None) -> HostError:
    """Return the HostError for an errno of Xen.

    Args:
        op: The operation, such as "getdomaininfo".
        number: The errno.
        domid: The domain that the operation was about, if any.
        reason: What is wrong, in our words; the meaning of the errno if None.
    """
    prefix = "" if domid is None else f"dom{domid}: "
    name = "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, str(number))  # not ENOTSUP
    return HostError(
        f"{prefix}{op}: {reason or _errno_reason(number, domid)} ({name})", op=op, domid=domid, errno=number
    )


def _errno_reason(number: int, domid: int | None) -> str:
    if number == errno.ESRCH and domid is not None:
        return "no such domain, or it has been destroyed meanwhile"
    if number in {errno.EPERM, errno.EACCES}:
        return "needs root in dom0"
    return os.strerror(number)
