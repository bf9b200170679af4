"""The words of an errno of Xen."""

from __future__ import annotations

import errno

from xenpv.host.errors import host_error


def test_host_error_names_operation_domain_and_errno() -> None:
    error = host_error("getvcpucontext", errno.ESRCH, 7)
    assert str(error) == "dom7: getvcpucontext: no such domain, or it has been destroyed meanwhile (ESRCH)"
    assert (error.op, error.domid, error.errno) == ("getvcpucontext", 7, errno.ESRCH)
    assert str(host_error("xen_version", errno.EPERM)) == "xen_version: needs root in dom0 (EPERM)"
    assert str(host_error("pausedomain", errno.EINVAL, 0)) == "dom0: pausedomain: Invalid argument (EINVAL)"
