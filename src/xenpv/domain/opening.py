"""Any file that holds a domain, opened: told apart by looking."""

from __future__ import annotations

from xenpv.domain.input import Progress
from xenpv.domain.source import SavedDomain
from xenpv.stream.reader import FaultHandler


def open_domain(path: str, *, fault: FaultHandler | None = None, progress: Progress | None = None) -> SavedDomain:
    """The domain in the file at ``path``; "-" is standard input. To be closed, or used as a context manager.

    With ``fault``, breaches of rules go there and what can be read is; without, the first one raises StreamError.
    Raises RequestError when the path cannot be opened.
    """
    return SavedDomain.open(path, fault=fault, progress=progress)
