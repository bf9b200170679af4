"""A layer for Volatility 3 with a domain's pseudo-physical memory.

Its stacker opens save files and cores.

Page tables hold pfns, so Volatility's own layers for Intel processors translate with them. The layer works on runs of
pages, not page by page as Volatility does, so the time to open a file does not depend on its size.
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

from xenpv import GuestError, Rule, Unsupported, XenPVError, open_domain
from xenpv.export.formats.job import readable_pages
from xenpv.findings import Severity
from xenpv.frames import PAGE_SHIFT
from xenpv.plugins.recent import RecentPages
from xenpv.stream.dumpcore import is_core
from xenpv.stream.envelope import SNIFF_SIZE, sniff

_log = logging.getLogger(__name__)
_READ_SIZE = 1 << 24  # bytes
_HEAD_SIZE = max(SNIFF_SIZE, 64)  # bytes by which a file is recognised


class DomainLayer(interfaces.layers.DataLayerInterface):  # type: ignore[misc]
    """Memory by pfn << 12 | offset.

    Addresses of pages without content are invalid; they do not read as zeros.
    """

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
        """Open the file.

        Raises Volatility's LayerException if it cannot be opened, or has no pages.
        """
        breaches: list[str] = []

        def add_breach(rule: Rule, message: str, offset: int, _record: str | None) -> None:
            if rule.severity is Severity.ERROR and len(breaches) < 3:
                breaches.append(f"{message} (at {offset:#x})")

        try:
            self._domain = open_domain(self._path, on_breach=add_breach)
        except (XenPVError, OSError) as e:
            raise exceptions.LayerException(self.name, f"{self._path}: {e}") from e
        try:
            runs = readable_pages(self._domain)
            if not runs.total:
                raise GuestError(f"the file has no page of memory: {'; '.join(breaches)}")
        except (XenPVError, OSError) as e:
            self._domain.close()
            raise exceptions.LayerException(self.name, f"{self._path}: {e}") from e
        self._run_starts: list[int] = (runs.first << np.uint64(PAGE_SHIFT)).tolist()
        self._run_ends: list[int] = (runs.first + runs.pages.astype(np.uint64) << np.uint64(PAGE_SHIFT)).tolist()
        if breaches:
            _log.warning("%s is damaged, and read as far as possible: %s", self._path, "; ".join(breaches))
        self._recent = RecentPages(self._domain.memory)

    def __getstate__(self) -> dict[str, Any]:
        """Return the layer's state without the open file.

        Volatility clones layers, and each copy opens the file anew.
        """
        return {key: value for key, value in self.__dict__.items() if key not in {"_domain", "_recent"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def destroy(self) -> None:
        """Close the file."""
        self._domain.close()

    @classmethod
    def get_requirements(cls) -> list[interfaces.configuration.RequirementInterface]:
        """Return what Volatility needs to make the layer again: where the file is."""
        return [requirements.StringRequirement(name="location", optional=False)]

    # --- addresses ---------------------------------------------------------------------------------------------------

    @property
    def minimum_address(self) -> int:
        """The first valid address."""
        return self._run_starts[0]

    @property
    def maximum_address(self) -> int:
        """The last valid address."""
        return self._run_ends[-1] - 1

    def _end_of_run(self, offset: int) -> int:
        """Return the end of the run of pages around an address.

        An address in no run is its own end.
        """
        row = bisect_right(self._run_starts, offset) - 1
        return max(offset, self._run_ends[row]) if row >= 0 else offset

    def is_valid(self, offset: int, length: int = 1) -> bool:
        """Return whether all of the bytes are there."""
        return self._end_of_run(offset) >= offset + max(length, 1)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield the populated parts of a range: address, number of bytes, ascending."""
        row, end = max(0, bisect_right(self._run_starts, offset) - 1), offset + length
        while row < len(self._run_starts) and self._run_starts[row] < end:
            start, stop = max(offset, self._run_starts[row]), min(end, self._run_ends[row])
            if start < stop:
                yield start, stop - start
            row += 1

    # --- content -----------------------------------------------------------------------------------------------------

    def read(self, offset: int, length: int, pad: bool = False) -> bytes:
        """Return bytes.

        Absent ones are zeros with ``pad``, otherwise they raise InvalidAddressException.
        """
        if not pad:
            if length > 0 and not self.is_valid(offset, length):
                raise self._invalid(self._end_of_run(offset))
            return self._content(offset, length)
        out = bytearray(length)
        for start, count in self._pieces(offset, length):
            for address in range(start, start + count, _READ_SIZE):
                try:
                    content = self._content(address, min(_READ_SIZE, start + count - address))
                except exceptions.InvalidAddressException:
                    continue  # a damaged file
                out[address - offset : address - offset + len(content)] = content
        return bytes(out)

    def _content(self, offset: int, length: int) -> bytes:
        try:
            return self._recent.read(offset, length)
        except (XenPVError, OSError) as e:
            raise self._invalid(offset, str(e)) from e

    def _invalid(self, address: int, reason: str = "no such page") -> exceptions.InvalidAddressException:
        return exceptions.InvalidAddressException(self.name, address, f"{address:#x}: {reason}")

    def write(self, offset: int, data: bytes) -> None:  # noqa: ARG002
        """Raise LayerException: the layer is read-only."""
        raise exceptions.LayerException(self.name, f"{self._path} is read-only")

    def _scan_iterator(
        self, scanner: interfaces.layers.ScannerInterface, sections: Iterable[tuple[int, int]]
    ) -> Iterator[tuple[list[tuple[str, int, int]], int]]:
        """Yield chunks for a scanner: run by run, overlapping, so that holes cost nothing."""
        for section, length in sections:
            for start, count in self._pieces(section, length):
                for address in range(start, start + count, scanner.chunk_size):
                    size = min(scanner.chunk_size + scanner.overlap, start + count - address)
                    yield [(self.name, address, size)], address + size


def _path(location: str) -> str:
    return url2pathname(urlparse(location).path)


class DomainStacker(interfaces.automagic.StackerLayerInterface):  # type: ignore[misc]
    """Puts a DomainLayer on a save file or core."""

    stack_order = 5  # before Volatility's own for cores

    @classmethod
    def stack(
        cls,
        context: interfaces.context.ContextInterface,
        layer_name: str,
        progress_callback: constants.ProgressCallback = None,  # noqa: ARG003
    ) -> interfaces.layers.DataLayerInterface | None:
        """Return the layer; None if the file is no readable save file or core."""
        file = context.layers[layer_name]
        if not isinstance(file, physical.FileLayer) or urlparse(file.location).scheme != "file":
            return None
        size = file.maximum_address + 1
        if not size or not _is_domain_file(file.read(0, min(_HEAD_SIZE, size))):
            return None
        name = context.layers.free_layer_name("DomainLayer")
        context.config[interfaces.configuration.path_join(name, "location")] = file.location
        try:
            return DomainLayer(context, name, name)
        except exceptions.LayerException as e:
            _log.warning("not opened by xenpv: %s", e)
            return None


def _is_domain_file(head: bytes) -> bool:
    if is_core(head):
        return True
    try:
        return bool(sniff(head))
    except Unsupported:
        return False
