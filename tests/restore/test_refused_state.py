"""What Xen would refuse of vcpu state, TSC and CPU policy, restore refuses by the rule that verify names."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from tests.support.breakage import CASES, Case, as_stream
from tests.support.restoring import host_state, stream_input
from tests.support.writers.build import pv_domain
from tests.verify import cases_cpu, cases_vcpus
from xenpv.cpu import rules
from xenpv.errors import GuestError, HostError, Malformed
from xenpv.findings import Rule, Severity
from xenpv.host.model.host import ModelHost
from xenpv.restore import finish
from xenpv.restore.restore import restore_domain

assert cases_cpu
assert cases_vcpus

REFUSED = {rule for rule in vars(rules).values() if isinstance(rule, Rule) and rule.severity is Severity.ERROR}
OF_XEN = [
    case
    for case in CASES
    if case.rule in REFUSED - {rules.GDT_DESCRIPTOR} and not case.name.startswith("dr")  # Xen ignores these
]
GDTS = [case for case in CASES if case.rule is rules.GDT_DESCRIPTOR]


@pytest.mark.parametrize("case", OF_XEN, ids=lambda case: case.id)
def test_restore_of_state_that_xen_refuses_names_the_rule_of_verify(case: Case) -> None:
    domain = pv_domain(**case.make)
    if case.prepare:
        case.prepare(domain)
    place = case.spoil(domain)
    stream = as_stream(domain, case.config)
    if case.rewrite:
        case.rewrite(stream)
    host = ModelHost(96 << 20)
    before = host_state(host)
    with stream_input(bytes(stream)) as source, pytest.raises(Malformed) as error:
        restore_domain(host, source)
    assert error.value.rule == case.rule.name
    assert place.span is not None
    assert error.value.offset == place.span(stream)[0]
    assert host_state(host) == before


@pytest.mark.parametrize("case", GDTS, ids=lambda case: case.id)
def test_restore_of_a_gdt_that_xen_refuses_names_its_page(case: Case) -> None:
    domain = pv_domain(**case.make)
    place = case.spoil(domain)
    host = ModelHost(96 << 20)
    before = host_state(host)
    with stream_input(domain.to_bytes()) as source, pytest.raises(GuestError) as error:
        restore_domain(host, source)
    assert error.value.pfn == place.fields["pfn"]
    assert host_state(host) == before


@pytest.mark.parametrize("case", GDTS, ids=lambda case: case.id)
def test_model_refuses_the_context_with_a_gdt_that_xen_refuses(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The restorer's own check left out."""
    monkeypatch.setattr(finish, "refused_descriptors", lambda _pages, _width: np.zeros((1, 512), np.bool_))
    domain = pv_domain(**case.make)
    case.spoil(domain)
    with stream_input(domain.to_bytes()) as source, pytest.raises(HostError) as error:
        restore_domain(ModelHost(96 << 20), source)
    assert error.value.errno == errno.EINVAL


def test_restore_takes_every_descriptor_that_xen_takes() -> None:
    domain = pv_domain()
    gate = cases_cpu.CALL_GATE
    taken = [
        gate | 0xE033 << 16,
        gate | 3 << 45 | 0x10 << 16,
        gate | 0xFFFF << 16,  # of the LDT
        cases_cpu.PRESENT,  # the second half of a gate
        cases_cpu.TSS & ~cases_cpu.PRESENT,
        0x00AF_9B00_0000_FFFF,  # of level 0, which Xen raises
    ]
    for index, descriptor in enumerate(taken, 100):
        cases_cpu.set_descriptor(domain, domain.places.gdt[0], index, descriptor)
    with stream_input(domain.to_bytes()) as source:
        restore_domain(ModelHost(96 << 20), source)
