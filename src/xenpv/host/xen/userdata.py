"""libxl's userdata files: the configuration of each domain.

xl needs it to save a domain, and to list it in full.

A file's name has the domain's id and uuid. A file appears under its name only when it is complete.

Source: xen.git:tools/libs/light/libxl_dom.c libxl__userdata_path(), libxl__userdata_store()
"""

from __future__ import annotations

import contextlib
import glob
import os
from uuid import UUID

from xenpv.errors import HostError
from xenpv.frames import DomId

FOLDER = "/var/lib/xen"  # XEN_LIB_DIR
_Folder = str | os.PathLike[str]
_CONFIGURATION = "libxl-json"
_LOCK = "domain-userdata-lock"  # its holder removes it


def write(domid: DomId, uuid: str | None, config: bytes, folder: _Folder = FOLDER) -> None:
    """Store a domain's configuration where libxl looks for it.

    Does nothing on a host without libxl. HostError.
    """
    if not os.path.isdir(folder):
        return
    new, path = (f"{folder}/{_stem(domid, uuid, kind)}.{_CONFIGURATION}" for kind in "nd")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        # O_EXCL: never write to an existing file, or through a link.
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(config)
            os.replace(new, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)
            raise
    except OSError as error:
        raise _userdata_error(domid, error) from error


def read(domid: DomId, uuid: str | None, folder: _Folder = FOLDER) -> bytes | None:
    """Return a domain's configuration; None if there is none.

    HostError if it cannot be read.
    """
    try:
        with open(f"{folder}/{_stem(domid, uuid, 'd')}.{_CONFIGURATION}", "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _userdata_error(domid, error) from error


def remove(domid: DomId, uuid: str | None, folder: _Folder = FOLDER) -> None:
    """Remove all userdata of a domain. HostError."""
    try:
        for name in glob.iglob(f"{_stem(domid, uuid and glob.escape(uuid), '?')}.*", root_dir=folder):
            if not name.endswith(_LOCK):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{folder}/{name}")
    except OSError as error:
        raise _userdata_error(domid, error) from error


def _stem(domid: DomId, uuid: str | None, kind: str) -> str:
    return f"userdata-{kind}.{domid}.{uuid or UUID(int=0)}"


def _userdata_error(domid: DomId, error: OSError) -> HostError:
    message = f"dom{domid}: userdata: xl's file cannot be read, written or removed: {error.strerror}: {error.filename}"
    return HostError(message, op="userdata", domid=domid, errno=error.errno)
