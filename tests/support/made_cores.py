"""Cores of made domains, opened, and vcpu contexts for HVM cores."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.support.writers.build import pv_domain
from tests.support.writers.core import Core, core_of
from tests.support.writers.domain import Domain
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.findings import Rule
from xenpv.source.core import CoreDomain
from xenpv.source.open import open_path
from xenpv.stream.rules import BreachHandler

SPREAD = [*range(100), 0x1_0000, 0x1_0001]


def made_core() -> tuple[Domain, Core]:
    domain = pv_domain(pfns=SPREAD, vcpus=2)
    return domain, core_of(domain)


def open_core(core: Core, tmp_path: Path, on_breach: BreachHandler | None = None) -> CoreDomain:
    path = tmp_path / "made.core"
    path.write_bytes(bytes(core))
    domain = open_path(str(path), on_breach=on_breach)
    assert isinstance(domain, CoreDomain)
    return domain


def hvm_context(**registers: int) -> bytes:
    context = np.zeros(1, VCPU_GUEST_CONTEXT[8])
    control = {"cr0": 0, "cr3": 3, "cr4": 4}
    for name, value in registers.items():
        if name in control:
            context["ctrlreg"][0, control[name]] = value
        else:
            context["user_regs"][name] = value
    return context.tobytes()


LONG_MODE = hvm_context(cr0=0x8000_0011, cr4=0x20, cr3=0x5000, rip=0xFFFF_FFFF_8100_0000)
NON_PAE = hvm_context(cr0=0x8000_0011, cr4=0x10, cr3=0x2000, rip=0xC010_0000, rax=7)


class BreachRecorder(list[tuple[str, str]]):
    """A breach handler that remembers rule and message."""

    def __call__(self, rule: Rule, message: str, offset: int, record: str | None) -> None:
        assert offset >= 0
        assert record is None
        self.append((rule.name, message))
