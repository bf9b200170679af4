"""A kernel on a model host of its own, and checks that all views of its p2m agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.model_invariants import check_invariants
from tests.support.start_of_day import BootLayout, build_domain
from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.abi.xen import START_INFO
from xenpv.findings import Findings, Severity
from xenpv.frames import NO_FRAME, U64, DomId
from xenpv.guest_model.kernel import Kernel
from xenpv.guest_model.p2m_forms import FORMS
from xenpv.host.model.host import ModelHost
from xenpv.memory.p2m_reader import P2M
from xenpv.source.live import LiveDomain
from xenpv.verify.physmap import PhysmapCheck

WIDTHS: list[Width] = [8, 4]
ALL_FORMS = [
    (width, name)
    for width in WIDTHS
    for name, form in FORMS.items()
    if (form.linear or form.tree) and (width, name) != (4, "marked")
]
SOME_FORMS = [(width, name) for width, name in ALL_FORMS if not name.startswith("rooted") or name == "rooted4"]


@dataclass
class Guest:
    """A kernel, the host and domain that it runs in, and the layout that it booted from."""

    host: ModelHost
    domid: DomId
    kernel: Kernel
    layout: BootLayout

    @classmethod
    def boot(cls, form: str, width: Width = 8, pages: int = 4096, **how: Any) -> Guest:
        host, kernel = ModelHost(2 << 30), Kernel(form)
        layout = build_domain(host, width, pages, **how)
        host.run(layout.domid, kernel.boot)
        return cls(host, layout.domid, kernel, layout)

    def do(self, name: str, *arguments: Any) -> Any:
        """Run one of the kernel's methods on the host."""
        return self.host.run(self.domid, lambda view: getattr(self.kernel, name)(view, *arguments))

    def entries(self, wanted: U64) -> U64:
        """Return entries of the kernel's own p2m list."""
        entries = self.host.run(self.domid, lambda view: self.kernel.p2m.lookup(view, wanted))
        assert entries is not None
        return entries

    @property
    def live(self) -> LiveDomain:
        return LiveDomain(self.host, self.host.info(self.domid))

    def findings(self) -> Findings:
        findings = Findings()
        PhysmapCheck(self.live, findings).run()
        return findings

    def assert_consistent(self) -> list[str]:
        """Check that every published p2m equals the kernel's own list, and that nothing is wrong.

        Returns:
            The names of the rules of all notes.
        """
        findings = list(self.findings())
        assert [str(f) for f in findings if f.severity is not Severity.NOTE] == []
        live = self.live
        for root in live.anchors.roots:
            p2m = live.walk_p2m(root)
            assert p2m.entries == self.kernel.p2m.entries
            assert not p2m.unreadable
            for leaves in p2m.iter_leaves():
                np.testing.assert_array_equal(
                    leaves.mfns, self.entries(leaves.pfns.reshape(-1)).reshape(leaves.mfns.shape)
                )
        check_invariants(self.host)
        return [f.rule.name for f in findings]


def mfn_by_pfn(p2m: P2M) -> dict[int, int]:
    """Return the mfn of each pfn that has a frame."""
    return {
        pfn: mfn
        for leaves in p2m.iter_leaves()
        for pfn, mfn in zip(leaves.pfns.reshape(-1).tolist(), leaves.mfns.reshape(-1).tolist(), strict=True)
        if mfn != int(NO_FRAME)
    }


def cancel_suspend(guest: Guest) -> Any:
    """Resume the guest as a toolstack that cancels does: with result 1. What the kernel's resume returns."""
    context = np.frombuffer(bytearray(guest.host.vcpu_context(guest.domid, 0)), VCPU_GUEST_CONTEXT[guest.layout.width])
    context["user_regs"]["rax" if guest.layout.width == 8 else "eax"] = 1
    guest.host.set_vcpu_context(guest.domid, 0, context.tobytes())
    guest.host.resume(guest.domid)
    return guest.do("resume")


def ring_frames(guest: Guest) -> tuple[int, int]:
    """Return the frames of xenstore's and the console's ring in start info: mfns, or pfns of a suspended guest."""
    page, _ = guest.host.map_frames(guest.domid, guest.layout.mfns[guest.layout.start_info :][:1])
    info = START_INFO.read(page.tobytes(), guest.layout.width)
    return int(info["store_mfn"]), int(info["console"]["domU"]["mfn"])


def register(guest: Guest, name: str) -> int:
    """Return a register of vcpu 0."""
    return guest.host.guest_view(guest.domid).register(name)
