"""The key file of a keyed seal."""

from __future__ import annotations

import os
import stat

from xenpv.errors import RequestError
from xenpv.stream.seal import KEY_MIN

KEY_MAX = 64 << 10  # bytes


def read_seal_key(path: str) -> bytes:
    """Return the key in a file: all of its bytes.

    Raises:
        RequestError: The file cannot be read, is no regular file, others than its owner may use it, or it has less
            than 16 bytes or more than 64 KiB.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        raise RequestError(f"{path}: {e.strerror}") from e
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise RequestError(f"{path}: is no regular file, so it holds no key")
        if info.st_mode & 0o077:
            mode = stat.S_IMODE(info.st_mode)
            raise RequestError(f"{path}: others may use this key (mode {mode:04o}): chmod 600 {path}")
        key = file.read(KEY_MAX + 1)
    if not KEY_MIN <= len(key) <= KEY_MAX:
        limits = f"a key has {KEY_MIN} to {KEY_MAX} bytes"
        raise RequestError(f"{path}: {limits}, not {len(key)}", needed=KEY_MIN, available=len(key))
    return key
