"""Inputs for the fuzz targets: sound streams of every kind, with a few things done to each.

A case is a function of a seed and a number alone, so that whatever fails can be had again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from random import Random

import numpy as np

from tests.support.writers.build import pv_domain
from tests.support.writers.domain import RW, Domain, P
from tests.support.writers.envelopes import ENVELOPES
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.stream import NOTAB, OPTIONAL, PAGE, PIN, XALLOC, XTAB, Piece, Stream, Wire

INTERESTING = (
    0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 24, 127, 128, 255, 256, 4095, 4096, 4097, 1 << 16, 1 << 20, (128 << 20) - 1,
    128 << 20, (128 << 20) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 52) - 1, 1 << 52, 1 << 60,
    5 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip


@cache
def corpus() -> tuple[Stream, ...]:
    """A small sound stream of each kind."""
    small = pv_domain(pfns=range(36))
    wire = Wire()
    rich = small.to_stream("libxl", batch=8)
    rich.before("X86_TSC_INFO", wire.verify(), wire.page_data([(0, 0), (36, 0xF)], [bytes(small.pages[0])]))
    rich.before("END", wire.record(OPTIONAL | 0x42, b"later"), wire.checkpoint())
    return (
        *(small.to_stream(envelope, batch=16) for envelope in ENVELOPES),
        small.to_stream("libxc", version=2, batch=16),
        small.to_stream("libxl", big_endian=True, batch=16),
        small.to_checkpointed(batch=16),
        pv_domain(width=4, pfns=range(36), vcpus=2, tree=True).to_stream("libxc", batch=16),
        rich,
        *(hvm_stream(envelope, pages=4) for envelope in ENVELOPES),
    )


def number(rng: Random, size: int) -> bytes:
    value = rng.choice(INTERESTING) if rng.random() < 0.8 else rng.getrandbits(8 * size)
    return (value % (1 << 8 * size)).to_bytes(size, rng.choice(("little", "little", "little", "big")))


def at_a_field(rng: Random, data: bytes, size: int) -> int:
    """A place to write to: near the start, where the fields are, or anywhere."""
    end = max(1, len(data) - size + 1)
    return min(rng.choice((0, 4, 8, 12, 16, rng.randrange(64), rng.randrange(end))), end - 1)


# --- of one piece ----------------------------------------------------------------------------------------------------


def flip_bits(rng: Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[at_a_field(rng, data, 1)] ^= 1 << rng.randrange(8)
    return bytes(out)


def write_number(rng: Random, data: bytes) -> bytes:
    size = rng.choice((1, 2, 4, 4, 8))
    at = at_a_field(rng, data, size)
    return (data[:at] + number(rng, size) + data[at + size :])[: len(data)]


def edit_length(rng: Random, data: bytes) -> bytes:
    if len(data) < 8:
        return data
    old = struct.unpack_from("<I", data, 4)[0]
    new = rng.choice((old + 1, old - 1, old + 8, old - 8, old * 2, rng.choice(INTERESTING)))
    return data[:4] + struct.pack("<I", new % (1 << 32)) + data[8:]


def cut_out(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice((1, 4, 8, 16, 4096)) :]


def put_in(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 4, 8, 16, 40))) + data[at:]


Change = Callable[[Random, bytes], bytes]


def a_few(rng: Random, data: bytes, header_field: Change) -> bytes:
    """A file with up to four things done to it, most of them to its headers' fields, by ``header_field``."""
    changes = (header_field, header_field, header_field, flip_bits, write_number, cut_out, put_in)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        data = rng.choice(changes)(rng, data) or b"\0"
    return data


def cut_short(rng: Random, data: bytes) -> bytes:
    """One in ten ends early."""
    return data if rng.random() < 0.9 else data[: rng.randrange(len(data) + 1)]


OF_A_PIECE: tuple[Change, ...] = (
    flip_bits, flip_bits, write_number, write_number, write_number, edit_length, edit_length, cut_out, put_in,
)  # fmt: skip


# --- of the whole ----------------------------------------------------------------------------------------------------


def change_a_piece(rng: Random, stream: Stream) -> None:
    i = rng.randrange(len(stream))
    if stream[i].data:
        stream[i] = Piece(stream[i].name, rng.choice(OF_A_PIECE)(rng, stream[i].data))


def splice(rng: Random, stream: Stream) -> None:
    """Pieces of another stream come in, anywhere."""
    donor = rng.choice(corpus())
    first = rng.randrange(len(donor))
    at = rng.randrange(len(stream) + 1)
    stream[at : at + rng.choice((0, 0, 1, 3))] = donor[first : first + rng.choice((1, 1, 2, 5))]


def shuffle(rng: Random, stream: Stream) -> None:
    i, j = rng.randrange(len(stream)), rng.randrange(len(stream))
    stream[i], stream[j] = stream[j], stream[i]


def repeat(rng: Random, stream: Stream) -> None:
    i = rng.randrange(len(stream))
    stream[i:i] = [stream[i]] * rng.choice((1, 1, 2, 20))


def lose(rng: Random, stream: Stream) -> None:
    if len(stream) > 1:
        del stream[rng.randrange(len(stream))]


OF_A_STREAM = (change_a_piece, change_a_piece, change_a_piece, change_a_piece, splice, shuffle, repeat, lose)


def case(seed: int, n: int) -> bytes:
    """The n-th input of a seed."""
    rng = Random(f"{seed}:{n}")
    stream = Stream(rng.choice(corpus()))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        rng.choice(OF_A_STREAM)(rng, stream)
    data = bytes(stream)
    if rng.random() < 0.15:
        data = data[: rng.randrange(len(data) + 1)]
    if rng.random() < 0.05:
        data += rng.randbytes(rng.randrange(40))
    return data


# --- of a domain -----------------------------------------------------------------------------------------------------

FLAGS = (0, P, P | RW, 0x67, 0x63, 0xE7, 0x167, 1 << 63 | 0x67, 1 << 52 | 0x67, 0x1F, 0x85)
TYPES = (NOTAB, 1, 2, 3, 4, PIN | 1, PIN | 2, PIN | 3, PIN | 4, 5, 0xD, XALLOC, XTAB)


@cache
def domains() -> tuple[Domain, ...]:
    """Small sound domains: both widths, each form of p2m, a user half, ballooned pages."""
    return (
        pv_domain(pfns=range(40), vcpus=2),
        pv_domain(pfns=range(40), tree=True, linear=False, ballooned=[41, 44]),
        pv_domain(pfns=range(44), tree=True),
        pv_domain(pfns=range(40), user=False),
        pv_domain(width=4, pfns=range(40), vcpus=2, tree=True),
        pv_domain(width=4, pfns=range(40)),
    )


def some_pfn(rng: Random, domain: Domain) -> int:
    """A pfn that plays a part, one that has no page, or one beyond the end."""
    return rng.choice([*domain.types, *domain.types, domain.entries, domain.entries + 1, 1 << 31, (1 << 40) - 1])


def change_entry(rng: Random, domain: Domain) -> None:
    """An entry of a page table names another frame, or has other flags."""
    tables = [pfn for pfn in domain.pages if 1 <= domain.types[pfn] & 7 <= 4 and domain.types[pfn] < XALLOC]
    if not tables:
        return
    entries = domain.table(rng.choice(tables))
    used = np.flatnonzero(entries).tolist()
    slot = rng.choice(used) if used and rng.random() < 0.7 else rng.randrange(512)
    entries[slot] = some_pfn(rng, domain) << 12 | rng.choice(FLAGS)


def change_type(rng: Random, domain: Domain) -> None:
    """A page is sent with another type."""
    pfn = rng.choice(list(domain.types))
    kind = rng.choice(TYPES)
    domain.types[pfn] = kind
    if kind in {XALLOC, XTAB, 0xD}:
        domain.pages.pop(pfn, None)
    else:
        domain.pages.setdefault(pfn, bytearray(PAGE))


def change_p2m_frames(rng: Random, domain: Domain) -> None:
    """The record of the p2m's frames names another pfn."""
    domain.p2m_pfns = domain.p2m_pfns.copy()
    domain.p2m_pfns[rng.randrange(len(domain.p2m_pfns))] = some_pfn(rng, domain)


def change_struct(rng: Random, struct: np.void, domain: Domain) -> None:
    """A member of a struct, or of one in it, holds an interesting number or a frame."""
    name = rng.choice([name for name in struct.dtype.names or () if name])
    value = struct[name]
    if isinstance(value, np.void) and value.dtype.names:
        change_struct(rng, value, domain)
        return
    number = rng.choice((*INTERESTING, some_pfn(rng, domain), some_pfn(rng, domain) << 12))
    if isinstance(value, np.ndarray):
        flat = value.reshape(-1)
        if flat.dtype.names:
            change_struct(rng, flat[rng.randrange(len(flat)) :][:1][0], domain)
            return
        if flat.dtype.kind in "ui":
            flat[rng.randrange(min(len(flat), 16))] = number % (1 << 8 * flat.dtype.itemsize)
        return
    if value.dtype.kind in "ui":
        struct[name] = number % (1 << 8 * value.dtype.itemsize)


def change_vcpu(rng: Random, domain: Domain) -> None:
    change_struct(rng, domain.vcpus[rng.choice(list(domain.vcpus))], domain)


def change_shared_info(rng: Random, domain: Domain) -> None:
    change_struct(rng, domain.shared_info, domain)


def change_start_info(rng: Random, domain: Domain) -> None:
    if domain.places.start_info in domain.pages:
        change_struct(rng, domain.start_info, domain)


def change_blob(rng: Random, domain: Domain) -> None:
    """Extended state, XSAVE or MSRs of a vcpu."""
    blobs = rng.choice([blobs for blobs in (domain.extended, domain.xsave, domain.msrs) if blobs] or [{0: b"\0" * 16}])
    vcpu = rng.choice(list(blobs))
    blobs[vcpu] = rng.choice((flip_bits, write_number, cut_out))(rng, blobs[vcpu] or b"\0" * 8)


def change_policy(rng: Random, domain: Domain) -> None:
    cpuid, msrs = domain.cpuid_policy, domain.msr_policy
    leaf = list(rng.choice(cpuid))
    leaf[rng.randrange(6)] = rng.choice(INTERESTING) % (1 << 32)
    if rng.random() < 0.5:
        cpuid.append(tuple(leaf))  # type: ignore[arg-type]
    else:
        msrs.append((rng.choice(INTERESTING) % (1 << 32), rng.choice((0, 0, 1)), rng.choice(INTERESTING)))


OF_A_DOMAIN = (
    change_entry, change_entry, change_entry, change_type, change_type, change_p2m_frames, change_vcpu, change_vcpu,
    change_vcpu, change_shared_info, change_start_info, change_blob, change_policy,
)  # fmt: skip


def domain_case(seed: int, n: int) -> bytes:
    """The n-th input of a seed: a stream whose framing is sound, of a domain in which a few things are wrong."""
    rng = Random(f"domain {seed}:{n}")
    domain = deepcopy(rng.choice(domains()))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(OF_A_DOMAIN)(rng, domain)
    return domain.to_bytes(rng.choice(("xl", "libxl", "libxc")), batch=rng.choice((8, 16, 64)))
