"""A temporary folder for one machine, that does not outlive it for long even if the process is killed.

Its process holds a lock in it; a folder whose lock is free has lost its process, and the next machine removes it.
Save files make such folders big, so leaving them would fill a developer's disk.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "xenpv-lab-"
YOUNG = 60.0  # seconds in which a folder may be without its lock because it is just being made


class Workspace:
    def __init__(self) -> None:
        _remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = (self.path / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime > YOUNG and _lock_is_free(folder / "lock"):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # another user's, or removed by its owner just now


def _lock_is_free(path: Path) -> bool:
    with path.open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
