"""Records within HVM_CONTEXT, whole, cut off and lying."""

from __future__ import annotations

import random
import struct

import pytest

from tests.support.writers.hvm import cpu, hvm_context
from xenpv.abi.hvm_save import DESCRIPTOR, HVM_HW_CPU
from xenpv.errors import Malformed
from xenpv.stream.hvm_context import iter_entries, read_vcpus

TWO = hvm_context({0: cpu(rip=0x1234, cr3=0x5000), 3: cpu(rax=7, msr_efer=0x500)})


def test_read_vcpus_gives_vcpus_by_number() -> None:
    found = read_vcpus(TWO, offset=0)
    assert sorted(found) == [0, 3]
    assert (int(found[0]["rip"]), int(found[0]["cr3"]), int(found[3]["rax"])) == (0x1234, 0x5000, 7)
    assert DESCRIPTOR.size(8) == 8


def test_read_vcpus_short_record_of_older_xen_is_padded() -> None:
    """Before 4.7 it ended in front of flags, before 3.4 it had no msr_tsc_aux."""
    for short in (8, 16):
        context = hvm_context({0: cpu(cr4=0x20, msr_efer=0xD01)[:-short]})
        found = read_vcpus(context, offset=0)[0]
        assert (int(found["cr4"]), int(found["msr_efer"])) == (0x20, 0xD01)


@pytest.mark.parametrize("end", [*range(60), len(TWO) - 9, len(TWO) - 1])
def test_read_vcpus_truncated_context_is_malformed(end: int) -> None:
    with pytest.raises(Malformed) as e:
        read_vcpus(TWO[:end], offset=0x1000)
    assert e.value.record == "HVM_CONTEXT"


def test_read_vcpus_wrong_length_is_malformed() -> None:
    with pytest.raises(Malformed) as e:
        read_vcpus(struct.pack("<HHIQ", 2, 0, 0xFFFFFFFF, 0), offset=0x1000)
    assert (e.value.offset, e.value.record) == (0x1000, "HVM_CONTEXT")
    assert "4294967295" in e.value.reason
    with pytest.raises(Malformed, match="vcpu 9"):
        read_vcpus(struct.pack("<HHI16xHHI", 2, 9, 16, 0, 0, 0), offset=0)


def test_read_vcpus_random_changes_give_vcpus_or_malformed() -> None:
    rng = random.Random(5)
    for _ in range(500):
        data = bytearray(TWO)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            for found in read_vcpus(bytes(data), offset=0).values():
                assert found.dtype == HVM_HW_CPU[8]
        except Malformed:
            pass


def test_iter_entries_stops_at_end() -> None:
    assert [entry.typecode for entry in iter_entries(TWO + b"junk", offset=0)] == [1, 2, 2]
