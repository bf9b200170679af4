"""What ModelHost is made of, and how its calls find what they are about."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from xenpv.errors import HostError
from xenpv.frames import U64, DomId
from xenpv.host.model.domain import Domain, Vcpu
from xenpv.host.model.frame_table import FrameTable, NoMemoryError
from xenpv.host.model.page_types import PageTypes, Refused
from xenpv.host.model.xenstore import ModelStore
from xenpv.host.protocol import XenVersion

if TYPE_CHECKING:
    from collections.abc import Iterator


class ModelCore:
    """Frames, their types, domains, and a xenstore."""

    def __init__(self, size: int, version: XenVersion, seed: int) -> None:
        self.frames = FrameTable(size, seed)
        self.types = PageTypes(self.frames, self._mark_frame)
        self.store = ModelStore()
        self._version = version
        self._domains: dict[int, Domain] = {}
        self._next = 0

    def _domain(self, op: str, domid: DomId) -> Domain:
        if domid not in self._domains:
            raise self._refusal(op, domid, errno.ESRCH, "no such domain")
        return self._domains[domid]

    def _vcpu(self, op: str, domid: DomId, vcpu: int) -> tuple[Domain, Vcpu]:
        domain = self._domain(op, domid)
        if not 0 <= vcpu < len(domain.vcpus):
            raise self._refusal(op, domid, errno.EINVAL, f"no vcpu {vcpu}")
        return domain, domain.vcpus[vcpu]

    def _ours(self, op: str, domid: DomId, mfns: U64) -> np.ndarray:
        mine: np.ndarray = self.frames.owner(mfns) == self._domain(op, domid).number
        return mine

    def _mark(self, domain: Domain, pfns: U64) -> None:
        if domain.dirty is not None:
            domain.dirty.mark(pfns)

    def _mark_frame(self, owner: int, mfn: int) -> None:
        domain = self._domains.get(owner - 1)
        if domain is not None and domain.dirty is not None:
            domain.dirty.mark(self.frames.m2p(np.array([mfn], np.uint64)))

    @contextmanager
    def _refusing(self, op: str, domid: DomId | None) -> Iterator[None]:
        try:
            yield
        except Refused as e:
            raise self._refusal(op, domid, e.errno, str(e)) from None
        except NoMemoryError:
            raise self._refusal(op, domid, errno.ENOMEM, "no frames left") from None

    @staticmethod
    def _refusal(op: str, domid: DomId | None, no: int, why: str) -> HostError:
        who = "" if domid is None else f"dom{domid}: "
        return HostError(f"{who}{op}: {os.strerror(no)}: {why}", op=op, domid=domid, errno=no)
