"""A xenstore for ModelHost: paths, values and watches, without permissions, quotas or transactions."""

from __future__ import annotations

from collections.abc import Callable

Watch = Callable[[str, str], None]  # path that changed, the watch's token


class ModelStore:
    """Paths are absolute, values bytes. Parents come into being with their children, as xenstored has it."""

    def __init__(self) -> None:
        self._nodes: dict[str, bytes] = {"/": b""}
        self._watches: dict[tuple[str, str], Watch] = {}

    def read(self, path: str) -> bytes | None:
        """The value, None where there is no such node."""
        return self._nodes.get(path)

    def write(self, path: str, value: bytes) -> None:
        parent = path
        while (parent := parent.rpartition("/")[0]) and parent not in self._nodes:
            self._nodes[parent] = b""
        self._nodes[path] = value
        self._fire(path)

    def remove(self, path: str) -> bool:
        """Remove a node and all below it; False where there is none."""
        gone = [p for p in self._nodes if p == path or p.startswith(path + "/")]
        for p in gone:
            del self._nodes[p]
        if gone:
            self._fire(path)
        return bool(gone)

    def list(self, path: str) -> list[str]:
        """The names of a node's children, sorted."""
        start = path.rstrip("/") + "/"
        return sorted({p[len(start) :].split("/")[0] for p in self._nodes if p.startswith(start) and p != "/"})

    def watch(self, path: str, token: str, call: Watch) -> None:
        """Call at once, as xenstored does, and for each change at or below the path, until unwatched."""
        self._watches[path, token] = call
        call(path, token)

    def unwatch(self, path: str, token: str) -> None:
        self._watches.pop((path, token), None)

    def _fire(self, changed: str) -> None:
        for (path, token), call in list(self._watches.items()):
            if changed == path or changed.startswith(path.rstrip("/") + "/"):
                call(changed, token)
            elif path.startswith(changed + "/"):  # removed with its parent
                call(path, token)
