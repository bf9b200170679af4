"""Two hosts; domains go from one to the other over this machine's loopback."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import lab
from tests.lab.conftest import Hosts

LINK = "python3 -m tests.support.lab.link"  # what xl migrate has for ssh
LISTENING = 240.0  # seconds that a receiver has to start, under emulation


@dataclass(frozen=True)
class Pair:
    """Who is reached at 10.0.2.2:``port`` from ``here`` is who listens at that port ``there``."""

    here: lab.Host
    there: lab.Host
    port: int

    @property
    def address(self) -> str:
        return f"10.0.2.2:{self.port}"

    def listener(self, command: str) -> lab.Job:
        """Start a command there, and wait until it says that it listens."""
        job = self.there.start(command)
        deadline = time.monotonic() + LISTENING
        while "listening" not in job.output_so_far():
            assert time.monotonic() < deadline, "it does not listen"
            assert not job.done(), job.wait().tails()
            time.sleep(0.1)
        return job

    def receiver(self, environment: str) -> lab.Job:
        """Have the next xl migrate received there, with a helper by that environment (guest.OURS, guest.STOCK)."""
        return self.listener(f"env {environment} {LINK} --listen {self.port}")


@contextmanager
def booted(xen: str, mem: str = "2G") -> Iterator[Pair]:
    """Both of that version of Xen."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    with (
        lab.Host(xen, mem=mem, dom0_mem="1G", listen=(port,)) as target,
        lab.Host(xen, mem=mem, dom0_mem="1G", network=True) as source,
    ):
        yield Pair(source, target, port)


@contextmanager
def two(hosts: Hosts, xen: str) -> Iterator[Pair]:
    """Those, in place of the one that runs."""
    hosts.close()
    with booted(xen) as pair:
        yield pair
