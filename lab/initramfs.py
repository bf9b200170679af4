"""Writes an initramfs: the newc form of cpio, uncompressed, because unpacking under emulation costs more than reading.

Written here rather than by cpio(1) so that device nodes need no root and the same input gives the same bytes.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path


class Archive:
    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._inode = 0
        self._folders = {""}

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, content)

    def folder(self, name: str) -> None:
        if name not in self._folders:
            self._folders.add(name)
            self._add(name, stat.S_IFDIR | 0o755)

    def link(self, name: str, target: str) -> None:
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int) -> None:
        self._add(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def packed(self) -> bytes:
        self._entry("TRAILER!!!", 0, b"", (0, 0))
        return b"".join(self._parts)

    def _add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        parent = name.rpartition("/")[0]
        self.folder(parent)
        self._entry(name, mode, content, device)

    def _entry(self, name: str, mode: int, content: bytes, device: tuple[int, int]) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        links, owner, group, time, check = 1, 0, 0, 0, 0
        fields = (self._inode, mode, owner, group, links, time, len(content), 0, 0, *device, len(path), check)
        self._append(b"070701" + b"".join(b"%08X" % field for field in fields) + path)
        self._append(content)

    def _append(self, data: bytes) -> None:
        padding = -(self._size + len(data)) % 4
        self._parts += (data, bytes(padding))
        self._size += len(data) + padding


def modules_in_order(root: Path, names: Iterable[str]) -> list[Path]:
    """The files of the modules and of all that they need, each after what it needs, as depmod has worked out.

    A name that is not there is compiled into the kernel, or the boot will say what is missing.
    """
    [modules] = (root / "usr/lib/modules").iterdir()
    needs: dict[str, list[str]] = {}
    by_name: dict[str, str] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        file, _, others = line.partition(":")
        # depmod lists a module's needs so that the last is to be loaded first.
        needs[file] = [*reversed(others.split()), file]
        by_name[Path(file).stem] = file
    order = [file for name in names if name in by_name for file in needs[by_name[name]]]
    return [modules / file for file in dict.fromkeys(order)]
