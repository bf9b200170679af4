"""A xenstore for ModelHost: paths, values and watches.

It has no permissions, quotas or transactions.
"""

from __future__ import annotations

from collections.abc import Callable

Watch = Callable[[str, str], None]  # called with the path that changed, and the watch's token


class ModelXenStore:
    """Nodes by absolute path. Writing a node creates its parents, as xenstored does."""

    def __init__(self) -> None:
        self._nodes: dict[str, bytes] = {"/": b""}
        self._watches: dict[tuple[str, str], Watch] = {}

    def read(self, path: str) -> bytes | None:
        """Return a node's value, None if there is no such node."""
        return self._nodes.get(path)

    def write(self, path: str, value: bytes) -> None:
        """Write a node."""
        parent = path
        while (parent := parent.rpartition("/")[0]) and parent not in self._nodes:
            self._nodes[parent] = b""
        self._nodes[path] = value
        self._fire_watches(path)

    def remove(self, path: str) -> bool:
        """Remove a node and all below it. Return whether there was one."""
        removed = [p for p in self._nodes if p == path or p.startswith(path + "/")]
        for p in removed:
            del self._nodes[p]
        if removed:
            self._fire_watches(path)
        return bool(removed)

    def list(self, path: str) -> list[str]:
        """Return the names of a node's children, sorted."""
        prefix = path.rstrip("/") + "/"
        return sorted({p[len(prefix) :].split("/")[0] for p in self._nodes if p.startswith(prefix) and p != "/"})

    def watch(self, path: str, token: str, callback: Watch) -> None:
        """Call back at once, and then for each change at or below the path."""
        self._watches[path, token] = callback
        callback(path, token)

    def unwatch(self, path: str, token: str) -> None:
        """Remove a watch."""
        self._watches.pop((path, token), None)

    def _fire_watches(self, changed: str) -> None:
        for (path, token), callback in list(self._watches.items()):
            if changed == path or changed.startswith(path.rstrip("/") + "/"):
                callback(changed, token)
            elif path.startswith(changed + "/"):  # removed with its parent
                callback(path, token)
