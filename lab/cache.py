"""The cache folder: where it is, and how a tree gets into it whole or not at all.

A tree's folder carries the hash of its recipe, so a changed recipe makes a new folder beside the old one and never
pulls files from under a running VM; a folder under its final name is complete.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def folder() -> Path:
    chosen = os.environ.get("XENPV_LAB_CACHE")
    if chosen:
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "xenpv" / "lab"


def trees() -> Path:
    return folder() / "trees"


def say(message: str) -> None:
    """One line of progress, away from the standard output that belongs to the command in dom0."""
    print(f"lab: {message}", file=sys.stderr, flush=True)


@contextmanager
def locked() -> Iterator[None]:
    """Only one process fetches; the others wait and then find the work done."""
    folder().mkdir(parents=True, exist_ok=True)
    with (folder() / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that fills {folder()}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def add_tree(name: str, fill: Callable[[Path], None]) -> Path:
    """Make trees()/name with `fill`, which is handed an empty folder; call with the lock held."""
    target = trees() / name
    if target.exists():
        return target
    trees().mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=trees()))
    try:
        unfinished.chmod(0o755)  # mkdtemp's 0700 would show up as the mode of dom0's root folder
        fill(unfinished)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def prune(wanted: set[str]) -> list[str]:
    """Remove trees of older recipes and what killed fetches left; call with the lock held."""
    removed = []
    for entry in sorted(trees().iterdir()) if trees().exists() else []:
        if entry.name not in wanted:
            shutil.rmtree(entry)
            removed.append(entry.name)
    return removed
