"""The programs of this machine that the lab runs, and how to get those that are missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .errors import MissingPrograms

PACKAGE_OF = {
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "depmod": "kmod",
    "apt-get": "apt",
    "apt-config": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
}
# depmod is in /usr/sbin, which an ordinary user's PATH often lacks.
SEARCH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def find(program: str) -> str | None:
    return shutil.which(program, path=SEARCH)


def missing() -> dict[str, str]:
    """Missing programs and the Debian packages that bring them."""
    lacking = {program: package for program, package in PACKAGE_OF.items() if not find(program)}
    if not any(Path("/usr/share/keyrings").glob("debian-archive-keyring.*")):
        lacking["Debian's archive keys"] = "debian-archive-keyring"
    return lacking


def require() -> None:
    lacking = missing()
    if lacking:
        raise MissingPrograms(lacking)
