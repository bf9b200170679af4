"""Opening a domain in a save file or core, or one that runs on this host."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TypeAlias

from xenpv.errors import HostError, RequestError, StreamError
from xenpv.host.protocol import find_domain
from xenpv.io.progress import ProgressCallback
from xenpv.io.stream_input import Input
from xenpv.source.core import CoreDomain
from xenpv.source.domain import Domain
from xenpv.source.live import LiveDomain
from xenpv.source.saved import SavedDomain
from xenpv.stream.dumpcore import is_core
from xenpv.stream.rules import BreachHandler

FileDomain: TypeAlias = SavedDomain | CoreDomain

LARGE = 8 << 30  # bytes; reading a file of that size takes a tenth of a second


def open_domain(
    path_or_name: str | os.PathLike[str],
    *,
    on_breach: BreachHandler | None = None,
    progress: ProgressCallback | None = None,
    index: bool | None = None,
) -> Domain:
    """Open a domain: in a file, or running on this host.

    Close it when done, or use it as a context manager.

    Args:
        path_or_name: The path of a save file or core, or "-" for standard input. If there is no such file: the number,
            uuid or name of a running domain.
        on_breach: Called for each breach of a rule in a file, which is then read as far as possible. Otherwise the
            first breach raises StreamError.
        progress: Called while a file is read.
        index: As for ``open_path``.

    Returns:
        The domain. Its ``origin`` tells where it comes from.

    Raises:
        RequestError: The file cannot be opened, or there is none and ``path_or_name`` has "/" or ".", as paths have.
            Also for a running domain that is HVM or PVH.
        StreamError: The file is damaged.
        HostError: There is no such file, and no such domain or no Xen; or Xen refused an operation.
    """
    path_or_name = os.fspath(path_or_name)
    if path_or_name == "-" or os.path.lexists(path_or_name):
        return open_path(path_or_name, on_breach=on_breach, progress=progress, index=index)
    return open_running(path_or_name)


def open_running(name: str) -> LiveDomain:
    """Open a PV domain that runs on this host.

    Args:
        name: Its number, uuid or name.

    Raises:
        RequestError: The domain is HVM or PVH; or there is none, and ``name`` has "/" or ".", as paths have.
        HostError: There is no such domain, or no Xen.
    """
    from xenpv.host.xen.host import XenHost  # noqa: PLC0415  opens Xen's libraries

    with ExitStack() as stack:
        try:
            host = stack.enter_context(XenHost())
            info = find_domain(host, name)
        except HostError as e:
            if "/" not in name and "." not in name:
                raise
            raise RequestError(f"{name}: No such file or directory; no running domain either: {e}") from e
        if info.hvm:
            raise RequestError(f"dom{info.domid} is HVM or PVH: Xen keeps its p2m, the guest publishes none")
        return LiveDomain(host, info, stack.pop_all())


def open_path(
    path: str,
    *,
    on_breach: BreachHandler | None = None,
    progress: ProgressCallback | None = None,
    index: bool | None = None,
) -> FileDomain:
    """Open the domain in a save file or core.

    Args:
        path: The path, or "-" for standard input.
        on_breach: Called for each breach of a rule; reading then goes on as far as possible. Otherwise the first breach
            raises StreamError.
        progress: Called while the file is read.
        index: Whether to keep the index of a save file beside it (index_file.py), and to use one that is there. By
            default only for files of ``LARGE`` bytes and more. A file with faults gets none.

    Raises:
        RequestError: The path cannot be opened.
        StreamError: The file is damaged.
    """
    source = Input.open(path)
    try:
        core = source.seekable and is_core(os.pread(source.fd, 64, source.start))
    except BaseException:
        source.close()
        raise
    if core:
        return CoreDomain.from_source(source, on_breach=on_breach)
    uses_index = source.size >= LARGE if index is None else index
    if not uses_index or on_breach is not None or path == "-" or not source.seekable:
        return SavedDomain.from_source(source, on_breach=on_breach, progress=progress)
    return _open_with_index(path, source, progress)


def _open_with_index(path: str, source: Input, progress: ProgressCallback | None) -> SavedDomain:
    """Open a save file by its stored index; without one, read it and store its index."""
    from xenpv.source.index_file import FileState, StoredIndex, store_index  # noqa: PLC0415  few files are as large

    stored_index = StoredIndex.load(path, source)
    if stored_index is not None:
        try:
            return SavedDomain.from_source(source, progress=progress, stored_index=stored_index)
        except StreamError:
            source = Input.open(path)  # the index was false, or the file has changed
    try:
        state = FileState.from_source(source)
    except BaseException:
        source.close()
        raise
    saved = SavedDomain.from_source(source, progress=progress)
    store_index(path, source, saved.contents, state)
    return saved
