"""The calls of ModelHost with which a domain is saved, restored and migrated, and how time passes for its guest."""

from __future__ import annotations

import errno
from collections.abc import Callable
from struct import pack

from xenpv.frames import U64, DomId
from xenpv.host import xenstore_nodes
from xenpv.host.model.build import ModelBuild
from xenpv.host.model.dirty_log import DirtyLog
from xenpv.host.model.vcpu_state import changed_policy, changed_state, changed_time
from xenpv.host.protocol import CpuPolicy, TscInfo, VcpuState


class ModelMove(ModelBuild):
    """The Mover protocol's part."""

    def vcpu_state(self, domid: DomId, vcpu: int) -> VcpuState:
        """What the vcpu has beyond its context."""
        state = self._vcpu("get_ext_vcpucontext", domid, vcpu)[1].state
        return state._replace(extended=pack("<I", vcpu) + state.extended[4:])

    def set_vcpu_state(self, domid: DomId, vcpu: int, state: VcpuState) -> None:
        """Set what is not empty."""
        domain, v = self._vcpu("set_ext_vcpucontext", domid, vcpu)
        with self._refusing("set_ext_vcpucontext", domid):
            v.state = changed_state(v.state, state, domain.width)

    def tsc_info(self, domid: DomId) -> TscInfo:
        """How the domain sees the TSC. Its clock stands still."""
        return self._domain("gettscinfo", domid).tsc

    def set_tsc_info(self, domid: DomId, info: TscInfo) -> None:
        """Set it."""
        domain = self._domain("settscinfo", domid)
        with self._refusing("settscinfo", domid):
            domain.tsc = changed_time(info)

    def cpu_policy(self, domid: DomId) -> CpuPolicy:
        """What the domain is told of its CPU."""
        return self._domain("get_cpu_policy", domid).policy

    def set_cpu_policy(self, domid: DomId, policy: CpuPolicy) -> None:
        """Set it."""
        domain = self._domain("set_cpu_policy", domid)
        if domain.has_run:
            raise self._refusal("set_cpu_policy", domid, errno.EEXIST, "the domain runs, or has run")
        with self._refusing("set_cpu_policy", domid):
            domain.policy = changed_policy(domain.policy, policy)

    def log_dirty(self, domid: DomId, *, on: bool) -> None:
        """Begin or end keeping which pages are written. EINVAL when it is on, or off, already."""
        domain = self._domain("shadow_op", domid)
        if on == (domain.dirty is not None):
            raise self._refusal("shadow_op", domid, errno.EINVAL, f"log-dirty is {'on' if on else 'off'} already")
        domain.dirty = DirtyLog() if on else None

    def dirty_pfns(self, domid: DomId, pages: int, *, clean: bool) -> U64:
        """The pfns below ``pages`` that were written, ascending; with ``clean``, and begin anew."""
        self._pass_time(domid)
        domain = self._domain("shadow_op", domid)
        if domain.dirty is None:
            raise self._refusal("shadow_op", domid, errno.EINVAL, "log-dirty is off")
        return domain.dirty.clean(pages) if clean else domain.dirty.peek(pages)

    def request_shutdown(self, domid: DomId, value: str) -> None:
        """Ask the guest for something, by control/shutdown."""
        asked = self.shutdown_request(domid)
        if value or asked:
            self.store.write(f"{xenstore_nodes.home(domid)}/{xenstore_nodes.CONTROL}", value.encode())
        self._pass_time(domid)

    def shutdown_request(self, domid: DomId) -> str:
        """What is asked of the guest still."""
        self._domain("xenstore", domid)
        return (self.store.read(f"{xenstore_nodes.home(domid)}/{xenstore_nodes.CONTROL}") or b"").decode()

    def resume(self, domid: DomId) -> None:
        """Let a domain that shut down run on, as after a suspend that was cancelled."""
        self._domain("resumedomain", domid).shutdown_reason = None

    def attend(self, domid: DomId, passes: Callable[[], None] | None) -> None:
        """What a domain does as time passes: called whenever its dirty pages are asked for, or it is asked something,
        and it can run. There are no threads: nothing else makes it run.
        """
        self._domain("run", domid).passes = passes

    def _pass_time(self, domid: DomId) -> None:
        domain = self._domain("run", domid)
        if domain.passes is not None and not domain.pauses and domain.shutdown_reason is None:
            domain.passes()
