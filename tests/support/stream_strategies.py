"""Hypothesis strategies for streams, and the small sound stream into which tests put one record of their own."""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st

from tests.support.stream_reading import Reading, one_chunk, read
from tests.support.writers.build import pv_domain
from tests.support.writers.stream import BROKEN, NOTAB, OPTIONAL, OURS, PIN, XALLOC, XTAB, Piece, Stream, Wire

KNOWN_TYPES = [NOTAB, 1, 2, 3, 4, *(PIN | n for n in range(1, 5)), BROKEN, XALLOC, XTAB]
LAST_PFN = (1 << 52) - 1
U32 = (1 << 32) - 1
U64 = (1 << 64) - 1

u32s = st.integers(0, U32)
u64s = st.integers(0, U64)
widths = st.sampled_from([4, 8])
known_types = st.sampled_from(KNOWN_TYPES)
unknown_types = st.integers(5, 8)
# "Reserved for future mandatory records", and optional ones: all but xenpv's own types, with and without bit 31.
_OURS = {kind & ~OPTIONAL for kind in OURS}
mandatory = st.integers(0x13, (1 << 31) - 1).filter(lambda kind: kind not in _OURS)
optional = mandatory.map(lambda kind: kind | OPTIONAL)
bodies = st.binary(max_size=100)


@cache
def _sound() -> Stream:
    """A PV stream that is as short as can be: headers, one page, what has to be there, END."""
    domain, wire = pv_domain(pfns=range(32), ballooned=()), Wire()
    head = [wire.image_header(), wire.domain_header(), wire.pv_info(), wire.static_data_end()]
    page = wire.page_data([(0, NOTAB)], [bytes(domain.pages[0])])
    tail = [wire.shared_info(bytes(domain.shared_page)), wire.vcpu_basic(0, domain.vcpus[0].tobytes()), wire.end()]
    return Stream([*head, wire.p2m_frames(0, 31, [1]), page, *tail])


def sound() -> Stream:
    """A copy, to be changed."""
    return Stream(_sound())


def hvm(*records: Piece, wire: Wire = Wire()) -> Stream:  # noqa: B008  frozen
    """Records in an HVM stream, where no p2m bounds the pfns; nothing else is in it."""
    return Stream([wire.image_header(), wire.domain_header(2), wire.static_data_end(), *records, wire.end()])


def collected(stream: Stream) -> Reading:
    return read(one_chunk(bytes(stream)), collect=True)


def raised(stream: Stream) -> Reading:
    return read(one_chunk(bytes(stream)))
