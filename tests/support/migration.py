"""A guest on one model host, another model host, and a link between them that can be cut wherever one likes."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from tests.support.kernel_guest import Guest
from tests.support.model_invariants import check_invariants
from xenpv.frames import U64, DomId
from xenpv.host.domain_names import AWAY, INCOMING
from xenpv.host.model.host import ModelHost
from xenpv.migrate.receiver import ReceivedDomain, receive_domain
from xenpv.migrate.sender import SentDomain, send_domain
from xenpv.migrate.transport import Link
from xenpv.source.config import libxl_config
from xenpv.stream.fields import Buffer

NAME, PAGES = "litmus", 1100
MEMORY = 256 << 20  # bytes of a host
UUID = "01234567-89ab-cdef-0123-456789abcdef"
CONFIG = libxl_config(NAME, UUID, pages=PAGES, vcpus=1)

L = TypeVar("L", bound=Link)


class Cut(Link):
    """A link of which only so many bytes get out: then the socket is shut down. ``lost``: what did not get out counts
    as sent, as with a network that has taken it and goes down.
    """

    limit: int | None = None
    lost = False
    message_ends: list[int]  # where each message ends, and each part of the stream

    def write(self, buffers: Sequence[Buffer]) -> None:
        if not hasattr(self, "message_ends"):
            self.message_ends = []
        data = b"".join(buffers)
        if self.limit is None or self.written + len(data) <= self.limit:
            super().write([data])
            self.message_ends.append(self.written)
            return
        super().write([data[: max(self.limit - self.written, 0)]])
        with socket.socket(fileno=os.dup(self.read_fd)) as one:
            one.shutdown(socket.SHUT_RDWR)
        if not self.lost:
            super().write([data])  # raises what a socket raises


@contextmanager
def linked(kind: type[L], idle_timeout: float) -> Iterator[tuple[L, L]]:
    """The two ends of one link: that of this host, and that of the other. ``idle_timeout`` in seconds."""
    one, other = socket.socketpair()
    with (
        kind.of_socket(one, "there", idle_timeout=idle_timeout) as here,
        kind.of_socket(other, "here", idle_timeout=idle_timeout) as there,
    ):
        yield here, there


@dataclass
class Ended:
    """How both sides ended."""

    given: SentDomain | None = None
    taken: ReceivedDomain | None = None
    here: BaseException | None = None
    there: BaseException | None = None
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    sent: Cut | None = None
    answered: Cut | None = None

    def heard(self, what: str) -> dict[str, Any]:
        """What was told of some event on this side."""
        return next(numbers for name, numbers in self.told if name == what)


@dataclass
class Move:
    """A guest that runs, with a pattern in its pages, and where it may go."""

    guest: Guest
    target: ModelHost
    pfns: U64
    counter: int = 7
    suspended: bool = False

    @classmethod
    def ready(cls, form: str = "linear", **how: Any) -> Move:
        guest = Guest.boot(form, pages=PAGES, **how)
        pfns = guest.do("free_pfns")
        guest.do("write_pattern", pfns, 7)
        guest.host.hypervisor.domains[guest.domid].uuid = UUID
        move = cls(guest, ModelHost(MEMORY), pfns)
        guest.host.set_time_slice(guest.domid, move.live)
        return move

    @property
    def source(self) -> ModelHost:
        return self.guest.host

    def live(self) -> None:
        """What it does as time passes: it looks whether it is to suspend."""
        self.guest.do("poll")
        self.suspended = self.source.info(self.guest.domid).shutdown

    def start(self, *, out: int | None = None, back: int | None = None, lost: bool = False, **how: Any) -> Ended:
        """Migrate it. ``out``, ``back``: after how many bytes the link is cut, that go there and that come back."""
        ended = Ended()
        with linked(Cut, 20.0) as (here, there):
            here.limit, there.limit = out, back
            here.lost = there.lost = lost
            ended.sent, ended.answered = here, there

            def receive() -> None:
                try:
                    ended.taken = receive_domain(self.target, there)
                except BaseException as e:  # it is looked at
                    ended.there = e
                finally:
                    there.close()

            thread = threading.Thread(target=receive)
            thread.start()
            try:
                ended.given = send_domain(
                    self.source,
                    self.guest.domid,
                    here,
                    config=CONFIG,
                    on_event=lambda what, **numbers: ended.told.append((what, numbers)),
                    **how,
                )
            except BaseException as e:  # it is looked at
                ended.here = e
            finally:
                here.close()
                thread.join(60)
            assert not thread.is_alive()
        return ended

    def fill(self, left: int) -> DomId:
        """Have another domain take the other host's memory, but for so many pages."""
        domid = self.target.create(8, max_pages=1 << 20)
        self.target.populate_physmap(domid, np.arange(self.target.free_pages() - left, dtype=np.uint64))
        return domid

    # --- how it is now -----------------------------------------------------------------------------------------------

    def runs_here(self) -> bool:
        """Whether the guest goes on here as if nothing had been, and nothing is left of what was tried."""
        info = self.source.info(self.guest.domid)
        if info.shutdown or info.paused or info.name != NAME:
            return False
        if self.suspended:
            assert self.guest.do("resume") is True, "it must see that its suspend was cancelled"
            self.suspended = False
        self._pattern(self.guest)
        assert self.source.hypervisor.domains[self.guest.domid].dirty_log is None, "log-dirty is on"
        check_invariants(self.source)
        return True

    def waits_here(self) -> bool:
        """Whether it stays suspended here, marked as given away."""
        info = self.source.info(self.guest.domid)
        return info.shutdown_reason == 2 and info.name == NAME + AWAY

    def is_gone_here(self) -> bool:
        return all(info.domid != self.guest.domid for info in self.source.domains())

    def nothing_there(self) -> bool:
        """Whether nothing of it is on the other host: no domain, no frame, no node."""
        check_invariants(self.target)
        fresh = ModelHost(MEMORY)
        remaining = {path for path, value in self.target.store._nodes.items() if value} - set(fresh.store._nodes)
        assert not remaining
        return [info.domid for info in self.target.domains()] == [0] and self.target.free_pages() == fresh.free_pages()

    def there(self) -> Guest | None:
        """The guest that runs there under its own name: it has resumed, and all its pages are as they were."""
        domains = [info for info in self.target.domains() if info.domid]
        assert all(not (info.name or "").endswith(INCOMING) for info in domains)
        if not domains or domains[0].paused:
            return None
        (info,) = domains
        assert info.name == NAME
        guest = Guest(self.target, DomId(info.domid), self.guest.kernel, self.guest.layout)
        assert guest.do("resume") is False, "it must see that it is in a new domain"
        self._pattern(guest)
        check_invariants(self.target)
        return guest

    def _pattern(self, guest: Guest) -> None:
        bad = guest.do("check_pattern", self.pfns, self.counter)
        np.testing.assert_array_equal(bad, np.empty(0, np.uint64))
