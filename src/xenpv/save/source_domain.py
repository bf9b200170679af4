"""A domain that is about to leave this host, and how to undo the preparations."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from xenpv.errors import HostError, RequestError, XenPVError
from xenpv.frames import DomId
from xenpv.host.domain_names import AWAY
from xenpv.host.protocol import Mover
from xenpv.save.suspend import has_suspended, resume, suspend


class SourceState(Enum):
    """What the domain on the source host does after a save or a migration."""

    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDED = "suspended"  # as it was before the save
    SHUT_DOWN = "shut down"  # by itself, not for the save
    DESTROYED = "destroyed"


@dataclass(frozen=True)
class Rollback:
    """The result of undoing a failed save or migration.

    Attributes:
        label: The domain, for people: "dom5 (web)".
        state: What the domain does now; None if it could not be resumed, or that is unknown.
        error: Why undoing failed; None if it did not.
    """

    label: str
    state: SourceState | None
    error: XenPVError | None = None


class RollbackError(HostError):
    """A save or migration failed, and so did undoing it.

    The domain may stay suspended.

    Attributes:
        rollback: The result of undoing it.
    """

    def __init__(self, failure: BaseException, rollback: Rollback, *, domid: DomId) -> None:
        error = rollback.error
        outcome = (
            "could not be resumed"
            if rollback.state is None
            else f"is {rollback.state.value}, but not all of the save could be undone"
        )
        problem = f"{str(failure) or type(failure).__name__}; {rollback.label} {outcome}: {error}"
        super().__init__(problem, op="resume", domid=domid, errno=getattr(error, "errno", None))
        self.rollback = rollback


class DepartingDomain:
    """A domain that is saved or migrated away from this host.

    Attributes:
        info: The domain as it was at first.
        label: The domain, for people: "dom5 (web)".
        suspend_requested_at: When it was asked to suspend, by time.monotonic(); None before.
    """

    def __init__(self, host: Mover, domid: DomId, *, suspend_timeout: float = 60.0) -> None:
        self.host = host
        self.domid = domid
        self.info = host.info(domid)
        self.label = self.info.label
        self.suspend_requested_at: float | None = None
        self._suspend_timeout = suspend_timeout
        self._renamed = False

    @property
    def was_suspended(self) -> bool:
        """Whether it had suspended before this save.

        Then it stays suspended after a rollback.
        """
        return has_suspended(self.info)

    @property
    def downtime(self) -> float:
        """Seconds since it was asked to suspend; 0 if it was not."""
        return 0.0 if self.suspend_requested_at is None else time.monotonic() - self.suspend_requested_at

    def check(self) -> None:
        """Raise RequestError if xenpv alone cannot save the domain.

        Its devices or its state may be in the way.

        A guest suspends with its devices' frontends. Only a toolstack that knows their backends can give them new ones.
        """
        if self.domid == 0:
            raise RequestError("dom0 is the domain that xenpv runs in; it cannot be saved or migrated")
        if (self.info.name or "").endswith(AWAY):
            problem = f"{self.label} was given to another host, and may run there"
            raise RequestError(f"{problem}: xenpv migrate --settle {self.domid} HOST settles it")
        if devices := self.host.devices(self.domid):
            problem = f"{self.label} has devices, which only xl saves and moves: {', '.join(devices)}"
            raise RequestError(f"{problem}; use xl with LIBXL_SAVE_HELPER set to xenpv-save-helper")
        if self.info.paused and not self.info.shutdown:
            raise RequestError(f"{self.label} is paused, and cannot suspend: unpause it first")

    def suspend(self) -> None:
        """Ask the guest to suspend, and wait until it has.

        Raises as save.suspend.suspend().
        """
        self.suspend_requested_at = time.monotonic()
        suspend(self.host, self.domid, timeout=self._suspend_timeout)

    def mark_away(self) -> None:
        """Rename it, so that the list of domains shows that it may run elsewhere."""
        if self.info.name is not None:
            self._renamed = True
            self.host.rename(self.domid, self.info.name + AWAY)

    def rollback(self) -> SourceState:
        """Undo everything: the domain has its name again and runs if it ran before.

        Returns:
            What the domain does now.

        Raises:
            XenPVError: It could not be undone; the domain may stay suspended.
        """
        try:
            if self._renamed and self.info.name is not None:
                self.host.rename(self.domid, self.info.name)
        finally:  # a wrong name must not keep the guest suspended
            if self.suspend_requested_at is not None and has_suspended(self.host.info(self.domid)):
                resume(self.host, self.domid)
        return self._state()

    def _state(self) -> SourceState:
        info = self.host.info(self.domid)
        if has_suspended(info):
            return SourceState.SUSPENDED
        if info.shutdown:
            return SourceState.SHUT_DOWN
        return SourceState.PAUSED if info.paused else SourceState.RUNNING

    def rollback_after(self, failure: BaseException, report: Callable[[Rollback], None]) -> None:
        """Undo everything because of a failure, and report the result.

        RollbackError if that fails, too.
        """
        try:
            rollback = Rollback(self.label, self.rollback())
        except XenPVError as e:
            rollback = Rollback(self.label, self._state_despite(e), e)
        report(rollback)
        if rollback.error is not None:
            raise RollbackError(failure, rollback, domid=self.domid) from failure

    def _state_despite(self, error: XenPVError) -> SourceState | None:
        """Return the domain's state although undoing failed.

        None if it is suspended by us, or unknown.
        """
        try:
            state = self._state()
        except HostError as e:
            error.add_note(str(e))
            return None
        return None if state is SourceState.SUSPENDED and not self.was_suspended else state
