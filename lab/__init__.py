"""The lab: real Xen under QEMU's emulation, for tests and for people. See docs/howto/lab.md.

with lab.Host("4.17") as host:
    print(host.run("xl info").check().text)
"""

from __future__ import annotations

from . import guests
from .errors import LabError, LostVM, MissingPrograms
from .host import Host, Job, run
from .packages import PeerTools, fetch, headers, peer_tools
from .result import JobFailed, JobTimeout, Result
from .versions import DEFAULT, SUPPORTED, XenVersion

__all__ = [
    "DEFAULT",
    "SUPPORTED",
    "Host",
    "Job",
    "JobFailed",
    "JobTimeout",
    "LabError",
    "LostVM",
    "MissingPrograms",
    "PeerTools",
    "Result",
    "XenVersion",
    "fetch",
    "guests",
    "headers",
    "peer_tools",
    "run",
]
