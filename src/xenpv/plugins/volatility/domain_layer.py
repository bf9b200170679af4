"""A layer for Volatility 3: a saved or dumped domain's pseudo-physical memory; and what puts it on such files.

Page tables in it hold pfns, so Volatility's own layers for Intel processors translate with them. What Volatility does
page by page in Python is done here for runs of pages, so that opening a file does not depend on its size.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
from volatility3.framework import constants, exceptions, interfaces
from volatility3.framework.configuration import requirements
from volatility3.framework.layers import physical

from xenpv.errors import GuestError, Unsupported, XenPVError
from xenpv.export.formats.job import readable_pages
from xenpv.findings import Rule, Severity
from xenpv.frames import PAGE_SHIFT
from xenpv.plugins.recent import RecentPages
from xenpv.source.open import FileDomain, open_path
from xenpv.stream.dumpcore import is_core
from xenpv.stream.envelope import SNIFF_SIZE, sniff

_log = logging.getLogger(__name__)
_AT_ONCE = 1 << 24  # bytes
_HEAD = max(SNIFF_SIZE, 64)  # bytes by which a file is told


class DomainLayer(interfaces.layers.DataLayerInterface):  # type: ignore[misc]
    """Memory by pfn << 12 | offset. An address of a page that has no content is invalid, and is not read as zeroes."""

    def __init__(
        self,
        context: interfaces.context.ContextInterface,
        config_path: str,
        name: str,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(context=context, config_path=config_path, name=name, metadata=metadata)
        self._path = _path(self.config["location"])
        self._open()

    def _open(self) -> None:
        """Raises Volatility's LayerException for what cannot be opened, or holds no page."""
        wrong: list[str] = []

        def fault(rule: Rule, message: str, offset: int, _record: str | None) -> None:
            if rule.severity is Severity.ERROR and len(wrong) < 3:
                wrong.append(f"{message} (at {offset:#x})")

        try:
            self._domain: FileDomain = open_path(self._path, on_breach=fault)
        except (XenPVError, OSError) as e:
            raise exceptions.LayerException(self.name, f"{self._path}: {e}") from e
        try:
            runs = readable_pages(self._domain)
            if not runs.total:
                raise GuestError(f"no page of memory in it: {'; '.join(wrong)}")
        except (XenPVError, OSError) as e:
            self._domain.close()
            raise exceptions.LayerException(self.name, f"{self._path}: {e}") from e
        self._starts: list[int] = (runs.first << np.uint64(PAGE_SHIFT)).tolist()
        self._ends: list[int] = (runs.first + runs.pages.astype(np.uint64) << np.uint64(PAGE_SHIFT)).tolist()
        if wrong:
            _log.warning("%s is damaged, and read as far as it goes: %s", self._path, "; ".join(wrong))
        self._recent = RecentPages(self._domain.memory)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which open the file anew: Volatility clones what it tries."""
        return {key: value for key, value in self.__dict__.items() if key not in {"_domain", "_recent"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def destroy(self) -> None:
        """Close the file."""
        self._domain.close()

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """What Volatility must know to make it again: where the file is."""
        return [requirements.StringRequirement(name="location", optional=False)]

    # --- addresses ---------------------------------------------------------------------------------------------------

    @property
    def minimum_address(self) -> int:
        """The first that is valid."""
        return self._starts[0]

    @property
    def maximum_address(self) -> int:
        """The last that is valid."""
        return self._ends[-1] - 1

    def _end_of_run(self, offset: int) -> int:
        """Where the run of pages ends that an address is in; the address itself if it is in none."""
        row = bisect_right(self._starts, offset) - 1
        return max(offset, self._ends[row]) if row >= 0 else offset

    def is_valid(self, offset: int, length: int = 1) -> bool:
        """Whether all of so many bytes are there."""
        return self._end_of_run(offset) >= offset + max(length, 1)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """What is there of a range: address and number of bytes, ascending."""
        row, end = max(0, bisect_right(self._starts, offset) - 1), offset + length
        while row < len(self._starts) and self._starts[row] < end:
            start, stop = max(offset, self._starts[row]), min(end, self._ends[row])
            if start < stop:
                yield start, stop - start
            row += 1

    # --- content -----------------------------------------------------------------------------------------------------

    def read(self, offset: int, length: int, pad: bool = False) -> bytes:
        """Content. What is not there is zeroes with ``pad``, else an InvalidAddressException."""
        if not pad:
            if length > 0 and not self.is_valid(offset, length):
                raise self._invalid(self._end_of_run(offset))
            return self._content(offset, length)
        out = bytearray(length)
        for start, count in self._pieces(offset, length):
            for at in range(start, start + count, _AT_ONCE):
                try:
                    content = self._content(at, min(_AT_ONCE, start + count - at))
                except exceptions.InvalidAddressException:
                    continue  # a damaged file
                out[at - offset : at - offset + len(content)] = content
        return bytes(out)

    def _content(self, offset: int, length: int) -> bytes:
        try:
            return self._recent.read(offset, length)
        except (XenPVError, OSError) as e:
            raise self._invalid(offset, str(e)) from e

    def _invalid(self, address: int, why: str = "no such page") -> exceptions.InvalidAddressException:
        return exceptions.InvalidAddressException(self.name, address, f"{address:#x}: {why}")

    def write(self, offset: int, data: bytes) -> None:  # noqa: ARG002
        """Nothing is written to a domain's file."""
        raise exceptions.LayerException(self.name, f"{self._path} is only read")

    def _scan_iterator(
        self, scanner: interfaces.layers.ScannerInterface, sections: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[list[tuple[str, int, int]], int]]:
        """What a scanner is shown: run by run, in chunks that overlap, so that holes cost nothing."""
        for section, length in sections:
            for start, count in self._pieces(section, length):
                for at in range(start, start + count, scanner.chunk_size):
                    size = min(scanner.chunk_size + scanner.overlap, start + count - at)
                    yield [(self.name, at, size)], at + size


def _path(location: str) -> str:
    return url2pathname(urlparse(location).path)


class DomainStacker(interfaces.automagic.StackerLayerInterface):  # type: ignore[misc]
    """Puts a DomainLayer on a file that looks like a saved or dumped domain."""

    stack_order = 5  # before Volatility's own for cores

    @classmethod
    def stack(
        cls,
        context: interfaces.context.ContextInterface,
        layer_name: str,
        progress_callback: constants.ProgressCallback = None,  # noqa: ARG003
    ) -> interfaces.layers.DataLayerInterface | None:
        """The layer, None where the file is none of ours, or nothing in it can be read."""
        file = context.layers[layer_name]
        if not isinstance(file, physical.FileLayer) or urlparse(file.location).scheme != "file":
            return None
        size = file.maximum_address + 1
        if not size or not _is_claimed(file.read(0, min(_HEAD, size))):
            return None
        name = context.layers.free_layer_name("DomainLayer")
        context.config[interfaces.configuration.path_join(name, "location")] = file.location
        try:
            return DomainLayer(context, name, name)
        except exceptions.LayerException as e:
            _log.warning("not opened by xenpv: %s", e)
            return None


def _is_claimed(head: bytes) -> bool:
    if is_core(head):
        return True
    try:
        return bool(sniff(head))
    except Unsupported:
        return False
