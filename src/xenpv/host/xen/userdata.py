"""What libxl keeps of each domain in files: its configuration, without which xl neither saves a domain nor lists it in
full (xen.git:tools/libs/light/libxl_dom.c libxl__userdata_path(), libxl__userdata_store()).

A file's name has the domain's id and uuid, and is in its place only when it is whole.
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
_LOCK = "domain-userdata-lock"  # whoever holds it removes it


def write(domid: DomId, uuid: str | None, config: bytes, folder: _Folder = FOLDER) -> None:
    """Put a domain's configuration where libxl looks for it; nowhere where there is no libxl. HostError."""
    if not os.path.isdir(folder):
        return
    new, kept = (f"{folder}/{_stem(domid, uuid, kind)}.{_CONFIGURATION}" for kind in "nd")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
        # Ours and nobody else's: a file that lies there already, or a link, is not written to.
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(config)
            os.replace(new, kept)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)
            raise
    except OSError as error:
        raise _failed(domid, error) from error


def read(domid: DomId, uuid: str | None, folder: _Folder = FOLDER) -> bytes | None:
    """A domain's configuration; None where there is none. HostError for one that cannot be read."""
    try:
        with open(f"{folder}/{_stem(domid, uuid, 'd')}.{_CONFIGURATION}", "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _failed(domid, error) from error


def remove(domid: DomId, uuid: str | None, folder: _Folder = FOLDER) -> None:
    """Remove all that is kept of a domain. HostError."""
    try:
        for name in glob.iglob(f"{_stem(domid, uuid and glob.escape(uuid), '?')}.*", root_dir=folder):
            if not name.endswith(_LOCK):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{folder}/{name}")
    except OSError as error:
        raise _failed(domid, error) from error


def _stem(domid: DomId, uuid: str | None, kind: str) -> str:
    return f"userdata-{kind}.{domid}.{uuid or UUID(int=0)}"


def _failed(domid: DomId, error: OSError) -> HostError:
    why = f"what xl keeps of it cannot be read, written or removed: {error.strerror}: {error.filename}"
    return HostError(f"dom{domid}: userdata: {why}", op="userdata", domid=domid, errno=error.errno)
