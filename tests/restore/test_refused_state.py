"""What Xen would refuse of vcpu state, TSC and CPU policy, restore refuses by the rule that verify names."""

from __future__ import annotations

import pytest

from tests.support.breakage import CASES, Case, as_stream
from tests.support.restoring import host_state, stream_input
from tests.support.writers.build import pv_domain
from tests.verify import cases_cpu, cases_vcpus
from xenpv.cpu import rules
from xenpv.errors import Malformed
from xenpv.findings import Rule, Severity
from xenpv.host.model.host import ModelHost
from xenpv.restore.restore import restore_domain

assert cases_cpu
assert cases_vcpus

REFUSED = {rule for rule in vars(rules).values() if isinstance(rule, Rule) and rule.severity is Severity.ERROR}
OF_XEN = [case for case in CASES if case.rule in REFUSED and not case.name.startswith("dr")]


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
