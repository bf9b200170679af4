"""Faults of saves on real Xen, in dom0, many in one process: outputs that end, helpers that are killed.

    python3 -m tests.support.lab.save_faults outputs DOM SEED COUNT
    python3 -m tests.support.lab.save_faults killed DOM SEED COUNT      xl save whose helper is killed, and xl restore

DOM runs on all the time. As faults.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.lab.faults import Parts
from tests.support.lab.leftovers import Left, Tally, said
from xenpv.errors import HostError, XenPVError
from xenpv.frames import DomId
from xenpv.host.protocol import find_domain
from xenpv.host.xen.host import XenHost
from xenpv.io.atomic_output import Output
from xenpv.save.file import configuration, save_file
from xenpv.save.precopy import PrecopyPolicy
from xenpv.save.save import save
from xenpv.save.source_domain import DepartingDomain

SETPIPE_SZ = 1031  # F_SETPIPE_SZ
SMALL = Path("/tmp/small")  # noqa: S108  a file system of its own


def outputs(host: XenHost, name: str, seed: int, count: int) -> dict[str, Any]:
    """The reader of a pipe goes, or a disk is full, after each record and at random; standing still, and live."""
    domid, chance, tally = find_domain(host, name).domid, random.Random(seed), Tally()
    SMALL.mkdir(exist_ok=True)
    said("mount", "-t", "tmpfs", "-o", "size=1G", "none", str(SMALL))
    ways: list[bool] = [False, True] if _can_log(host, domid) else [False]
    resumed = 0
    for live in ways:
        went = _saved(host, domid, str(SMALL / "whole"), live)
        assert went == "", went
        at, size = Parts.of(str(SMALL / "whole")).some_begins(count, chance), (SMALL / "whole").stat().st_size
        (SMALL / "whole").unlink()
        resumed += 1
        left = Left(host)
        places = [(place, "where a record begins") for place in at]
        places += [(chance.randrange(size), "anywhere") for _ in range(count)]
        for place, where in places:
            for fault in (_nobody_reads, _disk_full):
                what = fault.__name__.strip("_").replace("_", " ")
                with fault(place) as path:
                    words = _saved(host, domid, path, live)
                resumed += 1
                over = left.over() + [str(path) for path in SMALL.iterdir()]
                info = host.info(domid)
                over += ["it does not run"] * (info.shutdown or info.paused or info.dying)
                over += ["its log is on"] * _logs(host, domid)
                kind = f"{what} {where}, {'live' if live else 'standing still'}"
                tally.add(kind, words.rpartition(": ")[2] if words else "went well", words, f"{place:#x}", over)
    said("umount", str(SMALL))
    return tally.to_json() | {"begins": len(at), "bytes": size, "tried": resumed}


def _saved(host: XenHost, domid: DomId, path: str, live: bool) -> str:
    """Save it, and let it go on; what was said of it, nothing if all went well."""
    try:
        if not live:
            save_file(host, domid, path, keep=True)  # whether it runs is looked at
            return ""
        domain = DepartingDomain(host, domid)
        domain.check()
        try:
            with Output.open(path) as out:
                save(host, domid, out, config=configuration(host, domid), suspend=domain.suspend, live=PrecopyPolicy())
        finally:
            domain.rollback()
    except OSError as e:
        return f"{e.filename}: {e.strerror}"
    except XenPVError as e:
        return str(e)
    return ""


@contextlib.contextmanager
def _nobody_reads(place: int) -> Iterator[str]:
    """A pipe whose reader goes when it has had so many bytes."""
    path = SMALL / "pipe"
    os.mkfifo(path)

    def read() -> None:
        with open(path, "rb", buffering=0) as pipe:
            fcntl.fcntl(pipe, SETPIPE_SZ, 4096)
            rest = place
            while rest and (data := pipe.read(min(rest, 1 << 16))):
                rest -= len(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield str(path)
    finally:
        with contextlib.suppress(OSError):  # a reader that nobody has written to waits for somebody to come
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        reader.join()
        path.unlink()


@contextlib.contextmanager
def _disk_full(place: int) -> Iterator[str]:
    """A file system that has room for so many bytes, by pages."""
    said("mount", "-o", f"remount,size={max(place & ~4095, 4096)}", str(SMALL))
    try:
        yield str(SMALL / "saved")
    finally:
        (SMALL / "saved").unlink(missing_ok=True)
        said("mount", "-o", "remount,size=1G", str(SMALL))


def _logs(host: XenHost, domid: DomId) -> bool:
    try:
        host.dirty_pfns(domid, 1 << 12, clean=False)
    except HostError:
        return False
    return True


def _can_log(host: XenHost, domid: DomId) -> bool:
    try:
        host.log_dirty(domid, on=True)
    except HostError:
        return False
    host.log_dirty(domid, on=False)
    return True


# --- helpers that are killed -----------------------------------------------------------------------------------------


def killed(host: XenHost, name: str, seed: int, count: int) -> dict[str, Any]:
    """xl save and xl restore whose helper is killed, at a random time or when it has moved so much."""
    chance, tally = random.Random(seed), Tally()
    domid, path = find_domain(host, name).domid, "/tmp/killed.save"  # noqa: S108
    began = time.monotonic()
    whole, words = _helped(["xl", "save", "-c", name, path], lambda: False)
    assert whole, words
    took, size, resumed = time.monotonic() - began, os.stat(path).st_size, 1
    left = Left(host)
    for n in range(count):
        Path(path).unlink(missing_ok=True)
        went, words = _helped(["xl", "save", "-c", name, path], _moment(chance, n % 2 == 0, took, size, path))
        resumed += 1
        info = host.info(domid)
        over = left.over() + ["it does not run"] * (info.shutdown or info.paused or info.dying)
        tally.add("save", "went well" if went else "failed", words, str(n), over)
    said("sh", "-c", f"xl save {name} {path}")
    left = Left(host)
    for n in range(count):
        # A restore has no file whose growth could be seen: only times.
        went, words = _helped(["xl", "restore", "-p", path], _moment(chance, True, took, size, path))
        if went:
            host.destroy(find_domain(host, name).domid)
        tally.add("restore", "went well" if went else "failed", words, str(n), left.over())
    said("sh", "-c", f"xl restore {path}")
    return tally.to_json() | {"tried": resumed, "bytes": size, "seconds": took}


def _moment(chance: random.Random, by_time: bool, took: float, size: int, path: str) -> Callable[[], bool]:
    """Whether it is time to kill."""
    if by_time:
        until = time.monotonic() + chance.random() * took
        return lambda: time.monotonic() > until
    so_much = chance.randrange(size)
    return lambda: os.path.exists(path) and os.stat(path).st_size >= so_much


def _helped(command: list[str], now: Callable[[], bool]) -> tuple[bool, str]:
    """Whether xl did it with our helper, which is killed when it is time, and what it said."""
    helper = shutil.which("xenpv-save-helper")
    assert helper is not None
    xl = subprocess.Popen(
        command, env={**os.environ, "LIBXL_SAVE_HELPER": helper}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    dead = False
    while xl.poll() is None:
        if not dead and now():
            for pid in _children(xl.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
                    dead = True
        time.sleep(0.005)
    assert xl.stdout is not None
    return xl.returncode == 0, xl.stdout.read().decode()


def _children(pid: int) -> list[int]:
    """Processes that are a save helper, of those that one has started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(word) for word in path.read_text().split()] if path.exists() else []
    return [one for one in found if b"save_helper" in Path(f"/proc/{one}/cmdline").read_bytes()]


def main(what: str, name: str, seed: str, count: str) -> None:
    with XenHost() as host:
        print(json.dumps({"outputs": outputs, "killed": killed}[what](host, name, int(seed), int(count))))


if __name__ == "__main__":
    main(*sys.argv[1:])
