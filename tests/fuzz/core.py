"""Fuzz the reader of cores. One invariant: any bytes are a domain or an error of ours, in bounded memory and time.

The loop hands in streams; what is tried is the stream, and a core whose changes the stream's bytes are the seed of, so
that a case can be had again by its number here too.

python -m tests.fuzz.core [--seconds N] [--seed N] [--only N]
"""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from random import Random

import numpy as np

from tests.fuzz.mutate import a_few, cut_short, number
from tests.fuzz.run import MIB, bounded, main
from tests.support.made_cores import LONG_MODE, NON_PAE
from tests.support.writers.build import pattern, pv_domain
from tests.support.writers.core import core_of, hvm_core
from xenpv.errors import XenPVError
from xenpv.findings import Rule
from xenpv.frames import ABSENT
from xenpv.source.core import CoreDomain
from xenpv.source.open import open_domain

LOOK_AT = np.array([0, 1, 35, 0x1_0000, 1 << 31, (1 << 40) - 1, (1 << 64) - 1], np.uint64)
ADDRESSES = (0, 0xC000_0000, 0xFFFF_FFFF_8000_0000, 0xFFFF_8100_0000_0000)


@cache
def corpus() -> tuple[bytes, ...]:
    """A small sound core of each kind."""
    pfns = [*range(100), 0x1_0000]
    wide, narrow = (core_of(pv_domain(width=width, pfns=pfns, vcpus=2, tree=True)) for width in (8, 4))
    return (
        bytes(wide),
        bytes(narrow),
        bytes(hvm_core({pfn: bytes(pattern(pfn)) for pfn in range(30)}, [LONG_MODE, NON_PAE])),
    )


def header_field(rng: Random, data: bytes) -> bytes:
    """A number into the headers and notes, or the list of pages and what is behind it."""
    size = rng.choice((1, 2, 4, 8))
    at = rng.choice((rng.randrange(16, 64), rng.randrange(64, 2200), len(data) - rng.randrange(8, 1800)))
    return data[:at] + number(rng, size) + data[at + size :]


def core(rng: Random) -> bytes:
    """A core with a few things done to it."""
    return cut_short(rng, a_few(rng, rng.choice(corpus()), header_field))


def look(domain: CoreDomain) -> None:
    """Ask for all that there is."""
    kinds = domain.frames.types(LOOK_AT)
    last = -1
    for extents in domain.extents():
        for start, count in zip(extents.first.tolist(), extents.pages.tolist(), strict=True):
            assert start > last
            last = start + count - 1
            pfns = np.arange(start, start + min(count, 200), dtype=np.uint64)
            assert (domain.frames.types(pfns) != ABSENT).all()
            assert domain.frames.pages(pfns).shape == (len(pfns), 4096)
    assert (kinds[-2:] == ABSENT).all()
    for vcpu in domain.vcpus[:4]:
        domain.registers(vcpu)
        memory = domain.memory_of(vcpu)
        for vaddr in ADDRESSES:
            if memory.top is not None:
                memory.walk(vaddr)
    if not domain.hvm:
        domain.p2m.lookup(LOOK_AT)


def try_one(data: bytes, rng: Random) -> None:
    """Open it, with faults collected or not, and look into it."""
    faults: list[str] = []

    def collect(rule: Rule, message: str, offset: int, _: str | None) -> None:
        assert offset >= 0
        assert "\n" not in message
        faults.append(rule.name)

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        refused = ""
        try:
            with open_domain(file.name, on_breach=collect if rng.random() < 0.6 else None) as domain:
                if isinstance(domain, CoreDomain):
                    look(domain)
        except XenPVError as e:
            refused = str(e)
    assert "\n" not in refused
    assert len(faults) <= len(data) // 2 + 64


def target(data: bytes, n: int) -> None:
    """Try a stream, and the core that is made of it."""
    rng = Random(data)
    made = core(rng)
    with bounded(n, len(made), memory=64 * MIB):
        try_one(data, rng)
        try_one(made, rng)


if __name__ == "__main__":
    sys.exit(main(target, "tests.fuzz.core"))
