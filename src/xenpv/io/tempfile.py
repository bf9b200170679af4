"""Temporary files that hold guest memory."""

from __future__ import annotations

import os


def unlinked_file() -> int:
    """Return the descriptor of a temporary file of mode 0600 without a name.

    The guest memory in it leaves no trace when we end.
    """
    import tempfile  # noqa: PLC0415  for pipes only, and it imports much

    fd, path = tempfile.mkstemp(prefix="xenpv-")
    os.unlink(path)
    return fd
