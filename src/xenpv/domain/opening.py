"""Any file that holds a domain, opened: told apart by looking."""

from __future__ import annotations

import os
from typing import TypeAlias

from xenpv.domain.core import CoreDomain
from xenpv.domain.input import Input, Progress
from xenpv.domain.source import SavedDomain
from xenpv.stream.dumpcore import is_core
from xenpv.stream.reader import FaultHandler

KeptDomain: TypeAlias = SavedDomain | CoreDomain


def open_domain(path: str, *, fault: FaultHandler | None = None, progress: Progress | None = None) -> KeptDomain:
    """The domain in the file at ``path``, a save file or a core; "-" is standard input. To be closed, or used as a
    context manager.

    With ``fault``, breaches of rules go there and what can be read is; without, the first one raises StreamError.
    Raises RequestError when the path cannot be opened.
    """
    source = Input.open(path)
    try:
        core = source.seekable and is_core(os.pread(source.fd, 64, source.start))
    except BaseException:
        source.close()
        raise
    if core:
        return CoreDomain.of(source, fault=fault)
    return SavedDomain.of(source, fault=fault, progress=progress)
