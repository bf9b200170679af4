"""Any file that holds a domain, opened: told apart by looking."""

from __future__ import annotations

import os
from typing import TypeAlias

from xenpv.errors import StreamError
from xenpv.io.progress import ProgressCallback
from xenpv.io.stream_input import Input
from xenpv.source.core import CoreDomain
from xenpv.source.saved import SavedDomain
from xenpv.stream.dumpcore import is_core
from xenpv.stream.rules import BreachHandler

KeptDomain: TypeAlias = SavedDomain | CoreDomain

LARGE = 8 << 30  # bytes from which on a file's index is kept unasked: to read such a file takes a tenth of a second


def open_domain(
    path: str,
    *,
    on_breach: BreachHandler | None = None,
    progress: ProgressCallback | None = None,
    index: bool | None = None,
) -> KeptDomain:
    """The domain in the file at ``path``, a save file or a core; "-" is standard input. To be closed, or used as a
    context manager.

    With ``on_breach``, breaches of rules go there and what can be read is; without, the first one raises StreamError.
    ``index``: keep the index of a save file beside it (kept_index.py), and use one that is there; if nothing is said,
    of large files. A file with faults gets none. Raises RequestError when the path cannot be opened.
    """
    source = Input.open(path)
    try:
        core = source.seekable and is_core(os.pread(source.fd, 64, source.start))
    except BaseException:
        source.close()
        raise
    if core:
        return CoreDomain.of(source, on_breach=on_breach)
    wanted = source.size >= LARGE if index is None else index
    if not wanted or on_breach is not None or path == "-" or not source.seekable:
        return SavedDomain.of(source, on_breach=on_breach, progress=progress)
    return _indexed(path, source, progress)


def _indexed(path: str, source: Input, progress: ProgressCallback | None) -> SavedDomain:
    from xenpv.source.index_file import KeptIndex, State, keep  # noqa: PLC0415  few files are as large

    known = KeptIndex.load(path, source)
    if known is not None:
        try:
            return SavedDomain.of(source, progress=progress, known=known)
        except StreamError:
            source = Input.open(path)  # the index led astray, or the file is no more what it was
    try:
        state = State.of(source)
    except BaseException:
        source.close()
        raise
    saved = SavedDomain.of(source, progress=progress)
    keep(path, source, saved.contents, state)
    return saved
