"""A domain that is about to leave this host, and what was done to it for that: so that it can be undone."""

from __future__ import annotations

import time

from xenpv.errors import RequestError, XenPVError
from xenpv.frames import DomId
from xenpv.host.domain_names import AWAY
from xenpv.host.protocol import Mover
from xenpv.save.suspend import has_suspended, resume, suspend


class Leaving:
    """The domain. ``label`` is for people, ``stood_at`` when it was asked to suspend (time.monotonic())."""

    def __init__(self, host: Mover, domid: DomId, *, timeout: float = 60.0) -> None:
        self.host = host
        self.domid = domid
        self.info = host.info(domid)
        self.label = self.info.label
        self.stood_at: float | None = None
        self._timeout = timeout
        self._suspending = self._renamed = False

    @property
    def stands(self) -> bool:
        """Whether it had suspended before anybody here asked it to: then it is left so."""
        return has_suspended(self.info)

    def check(self) -> None:
        """RequestError for one that nobody can ask to suspend."""
        if self.domid == 0:
            raise RequestError("dom0 is what this runs in: it does not leave")
        if (self.info.name or "").endswith(AWAY):
            what = f"{self.label} was given to another host, and may run there"
            raise RequestError(f"{what}: xenpv migrate --settle {self.domid} HOST settles it")
        if self.info.paused and not self.info.shutdown:
            raise RequestError(f"{self.label} is paused, and cannot suspend: unpause it first")

    def suspend(self) -> None:
        """Ask it to suspend, and wait. Raises as domain.suspend.suspend()."""
        self._suspending = True
        self.stood_at = time.monotonic()
        suspend(self.host, self.domid, timeout=self._timeout)

    def mark_away(self) -> None:
        """By its name: whoever looks at the list sees that it may run elsewhere."""
        if self.info.name is not None:
            self._renamed = True
            self.host.rename(self.domid, self.info.name + AWAY)

    def take_back(self) -> str:
        """Undo all that was done: it goes on, if it ran before. What it does then, in words."""
        try:
            if self._renamed and self.info.name is not None:
                self.host.rename(self.domid, self.info.name)
            now = self.host.info(self.domid)
            if self._suspending and has_suspended(now):
                resume(self.host, self.domid)
                now = self.host.info(self.domid)
        except XenPVError as e:
            return f"{self.label} could not be resumed: {e}"
        if has_suspended(now):
            return f"{self.label} is suspended, as before"
        if now.shutdown:
            return f"{self.label} has shut down by itself"
        return f"{self.label} runs on here" + (", paused" if now.paused else "")
