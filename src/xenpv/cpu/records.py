"""The records of a stream that Xen would refuse, by the checks of this room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.cpu import policy, rules, state
from xenpv.cpu.context import iter_context_refusals
from xenpv.cpu.state import Refusal
from xenpv.findings import Rule
from xenpv.stream.contents import Contents, Vcpu
from xenpv.stream.framing import Record
from xenpv.stream.rules import breach


class RefusedRecord(NamedTuple):
    """A record that Xen refuses.

    Attributes:
        rule: The rule that it breaks.
        reason: What is wrong, with the value.
        record: The record.
        vcpu: The number of its vcpu; None if it is of the whole domain.
    """

    rule: Rule
    reason: str
    record: Record
    vcpu: int | None = None


def iter_refused_policies(contents: Contents) -> Iterator[RefusedRecord]:
    """Yield what is wrong with the CPU policy in a stream's static data."""
    cpuid, msrs = contents.cpuid_policy, contents.msr_policy
    if cpuid is not None:
        yield from _refused(rules.CPUID_POLICY, cpuid, policy.iter_cpuid_policy_refusals(bytes(cpuid.data)))
    if msrs is not None:
        yield from _refused(rules.MSR_POLICY, msrs, policy.iter_msr_policy_refusals(bytes(msrs.data)))


def iter_refused_tsc(contents: Contents) -> Iterator[RefusedRecord]:
    """Yield what is wrong with the TSC in a stream."""
    if (tsc := contents.tsc) is not None:
        yield from _refused(rules.TSC_INFO, tsc, state.iter_tsc_refusals(tsc.mode, tsc.khz))


def iter_refused_vcpu_state(contents: Contents, number: int, vcpu: Vcpu) -> Iterator[RefusedRecord]:
    """Yield what is wrong with a vcpu's records, apart from what they name in memory."""
    if vcpu.basic is not None:
        context = VCPU_GUEST_CONTEXT.read(vcpu.basic.context, contents.width)
        refusals = iter_context_refusals(context, contents.width, vcpu=number)
        yield from _refused(rules.VCPU_STATE, vcpu.basic, refusals, number)
    if vcpu.extended is not None:
        target = int.from_bytes(vcpu.extended.context[:4], "little")
        if len(vcpu.extended.context) >= 4 and target != number:  # libxenguest passes it to Xen unread
            reason = f"the record of vcpu{number} would set the state of vcpu{target}"
            yield RefusedRecord(rules.VCPU_EXTENDED, reason, vcpu.extended, number)
        refusals = state.iter_extended_refusals(vcpu.extended.context)
        yield from _refused(rules.VCPU_EXTENDED, vcpu.extended, refusals, number)
    if vcpu.xsave is not None:
        cpuid = contents.cpuid_policy
        supported = state.PV_XCR0 if cpuid is None else policy.xcr0_max(bytes(cpuid.data))
        refusals = state.iter_xsave_refusals(vcpu.xsave.context, supported)
        yield from _refused(rules.VCPU_XSAVE, vcpu.xsave, refusals, number)
    if vcpu.msrs is not None:
        yield from _refused(rules.VCPU_MSRS, vcpu.msrs, state.iter_msr_refusals(vcpu.msrs.context), number)


def raise_if_refused(records: Iterable[RefusedRecord]) -> None:
    """Raise StreamError for the first record that Xen would refuse."""
    for rule, reason, record, vcpu in records:
        message = reason if vcpu is None else f"vcpu{vcpu}: {reason}"
        raise breach(rule, message, offset=record.offset, record=record.name)


def _refused(
    rule: Rule, record: Record, refusals: Iterable[Refusal], vcpu: int | None = None
) -> Iterator[RefusedRecord]:
    for refusal in refusals:
        yield RefusedRecord(rule, refusal.reason, record, vcpu)
