"""The seal of a stream: digests of its pages and of all its records.

docs/reference/records.md has the format, docs/explanation/seal.md the reasons. A seal has one chain digest over all
bytes but the bodies of PAGE_DATA, and a digest for each PAGE_DATA record. The records XENPV_SEAL hold the digests of
the batches before them, so the chain vouches for those as well, and a batch that changed breaks nothing but its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol, Self

from xenpv.errors import RequestError, SealBroken, StreamError
from xenpv.stream import rules
from xenpv.stream.envelope import CONFIG_MAX
from xenpv.stream.fields import Buffer
from xenpv.stream.framing import RECORD_HEADER
from xenpv.stream.records import Seal, SealPart

if TYPE_CHECKING:
    from xenpv.stream.page_data import PageData

BATCHES_MAX = 256  # PAGE_DATA records between two seals: 1 GiB of pages as libxenguest and xenpv batch them
KEY_MIN = 16  # bytes
_PFNS_KEPT = 64 << 10  # bytes of a batch's entries that are kept until its seal comes
_SHOWN = 4
_PREFIX_MAX = 2 * CONFIG_MAX  # bytes before libxc's stream that are kept


class Algorithm(IntEnum):
    """How digests are made. The first two find damage, the third also forgery."""

    XXH3_128 = 1
    BLAKE2B_128 = 2
    HMAC_SHA256 = 3

    @property
    def digest_size(self) -> int:
        """Bytes of a digest."""
        return 32 if self is Algorithm.HMAC_SHA256 else 16


class Hash(Protocol):
    """A digest in the making, as hashlib, hmac and xxhash have it."""

    def update(self, data: Buffer, /) -> None:
        """Add bytes."""

    def digest(self) -> bytes:
        """Return the digest of all bytes so far."""

    def copy(self) -> Self:
        """Return an independent copy."""


def default_algorithm(key: bytes | None = None) -> Algorithm:
    """Return the keyed algorithm, or the fastest that is installed."""
    if key is not None:
        return Algorithm.HMAC_SHA256
    try:
        import xxhash  # noqa: F401, PLC0415  dom0 may lack it
    except ImportError:
        return Algorithm.BLAKE2B_128
    return Algorithm.XXH3_128


def hash_maker(algorithm: Algorithm, key: bytes | None = None) -> Callable[[], Hash]:
    """Return what makes an empty Hash.

    Raises:
        RequestError: xxhash is not installed, or the key is missing or too short.
    """
    if algorithm is Algorithm.HMAC_SHA256:
        if key is None or len(key) < KEY_MIN:
            raise RequestError(f"a seal's key has at least {KEY_MIN} bytes", needed=KEY_MIN, available=len(key or b""))
        import hmac  # noqa: PLC0415  OpenSSL, which few streams need

        empty = hmac.new(key, digestmod="sha256")
        return empty.copy
    if algorithm is Algorithm.BLAKE2B_128:
        import hashlib  # noqa: PLC0415

        return lambda: hashlib.blake2b(digest_size=16)
    try:
        import xxhash  # noqa: PLC0415
    except ImportError:
        raise RequestError("xxhash is not installed, so XXH3 seals cannot be checked: install python3-xxhash") from None
    return xxhash.xxh3_128


class Sealer:
    """Makes the seal of one stream for a Writer.

    Args:
        key: a secret of KEY_MIN bytes or more; None makes a seal without one, which anybody can make anew.
        algorithm: how to make digests; None chooses.

    Attributes:
        size: bytes added so far, without pages.

    Raises:
        RequestError: as hash_maker().
    """

    def __init__(self, key: bytes | None = None, algorithm: Algorithm | None = None) -> None:
        self.algorithm = algorithm or default_algorithm(key)
        self._make = hash_maker(self.algorithm, key)
        self._chain = self._make()
        self._digests: list[bytes] = []
        self._batches = 0
        self.size = 0

    @property
    def is_due(self) -> bool:
        """Whether as many batches wait as one record may hold."""
        return len(self._digests) >= BATCHES_MAX

    def add(self, buffers: Iterable[Buffer]) -> None:
        """Add bytes of the stream that are not the body of a PAGE_DATA record."""
        for buffer in buffers:
            self._chain.update(buffer)
            self.size += len(buffer)

    def add_pages(self, buffers: Iterable[Buffer]) -> None:
        """Add a PAGE_DATA record, of which the first buffer is the header."""
        batch = self._make()
        for index, buffer in enumerate(buffers):
            batch.update(buffer)
            if index == 0:
                self._chain.update(buffer)
        self._digests.append(batch.digest())
        self._batches += 1

    def seal(self, part: SealPart, covered: int = 0) -> Seal:
        """Return the seal of all that was added; the caller does not add it.

        ``covered``: for BEGIN, bytes before the image header that were added.
        """
        digests, self._digests = b"".join(self._digests), []
        number = covered if part is SealPart.BEGIN else self._batches
        size = len(digests) + self.algorithm.digest_size
        head = Seal(part=part, algorithm=self.algorithm, number=number, digests=digests)
        self._chain.update(RECORD_HEADER.pack(type=Seal.TYPE, length=Seal.FIELDS.size + size))
        for buffer in head.body():
            self._chain.update(buffer)
        digest = self._chain.digest()
        self._chain.update(digest)
        return Seal(part=part, algorithm=self.algorithm, number=number, digests=digests + digest)


@dataclass(frozen=True, slots=True)
class _Batch:
    """A PAGE_DATA record that awaits its seal; long ones have no ``entries``."""

    offset: int
    digest: bytes
    entries: bytes
    count: int

    def pfns(self) -> tuple[int, ...]:
        mask = (1 << 52) - 1
        words = (int.from_bytes(self.entries[i : i + 8], "little") for i in range(0, len(self.entries), 8))
        return tuple(word & mask for word in words)


@dataclass
class SealState:
    """What a Reader knows of the seal of a stream.

    Attributes:
        algorithm: how it was made; None for a stream without one.
        checked: whether its digests were compared, not whether they agree: those that do not are findings.
        complete: whether the last seal came, after which only END follows.
        covers_envelope: whether it vouches for the configuration and all else before libxc's stream.
        batches: how many PAGE_DATA records were compared.
        uncovered: names of records with content that followed the seal.
    """

    algorithm: Algorithm | None = None
    checked: bool = False
    complete: bool = False
    covers_envelope: bool = False
    batches: int = 0
    uncovered: list[str] = field(default_factory=list)

    @property
    def keyed(self) -> bool:
        """Whether a key is needed to make it."""
        return self.algorithm is Algorithm.HMAC_SHA256

    def gaps(self, *, keyed: bool = False) -> list[str]:
        """Return why the seal does not vouch for the whole stream; empty if it does.

        ``keyed``: whether a seal without a key is not enough.
        """
        if self.algorithm is None:
            return ["the stream has no seal"]
        gaps = []
        if keyed and not self.keyed:
            gaps.append("the seal was made without a key")
        if not self.checked:
            gaps.append("the seal was not checked")
        if not self.complete:
            gaps.append("the stream ends before its seal is complete")
        if not self.covers_envelope:
            gaps.append("the seal does not cover what precedes libxc's stream, such as the configuration")
        if self.uncovered:
            gaps.append(f"the seal does not cover {', '.join(sorted(set(self.uncovered))[:_SHOWN])} after it")
        return gaps


class SealChecker:
    """Compares a stream with its seal, for a Reader.

    The reader passes all bytes to ``update``, in order. Until the first record is known not to be a seal, they are
    kept; that is headers and configuration.

    Args:
        key: the key of keyed seals, None if there is none.
        report: called with each error; may raise it.
        warn: called with the reason why a seal cannot be checked.

    Attributes:
        state: what is known of the seal.
        active: whether the stream has a seal that is being checked, so that page content is needed.
    """

    def __init__(self, key: bytes | None, report: Callable[[StreamError], None], warn: Callable[[str], None]) -> None:
        self.state = SealState()
        self.active = False
        self._key = key
        self._report = report
        self._warn = warn
        self._prefix: bytearray | None = bytearray()
        self._image = 0  # where the image header begins, in the prefix
        self._has_gaps = False
        self._has_records = False
        self._make: Callable[[], Hash] | None = None
        self._chain: Hash | None = None
        self._before: Hash | None = None  # the chain after a seal's header, without its body
        self._batch: tuple[Hash, PageData | None] | None = None
        self._pending: list[_Batch] = []
        self._chain_broken = False

    # --- bytes -------------------------------------------------------------------------------------------------------

    def update(self, data: Buffer) -> None:
        """Take the next bytes of the stream."""
        if self._batch is not None:
            self._batch[0].update(data)
        elif self._chain is not None:
            self._chain.update(data)
        elif self._prefix is not None:
            self._prefix += data
            if len(self._prefix) > _PREFIX_MAX:  # a device model's state, as a section of its own
                self._prefix.clear()
                self._has_gaps = True

    def note_gap(self) -> None:
        """Note that bytes are skipped that a seal may cover."""
        self._has_gaps = self._prefix is not None or self._has_gaps

    def start_image(self) -> None:
        """Note that libxc's image header comes next."""
        if self._prefix is not None:
            self._image = len(self._prefix)
        elif self.state.algorithm is not None:
            self.state.uncovered.append("another libxc stream")

    @property
    def wants_bytes(self) -> bool:
        """Whether bytes have to be passed to ``update``."""
        return self._prefix is not None or self._chain is not None

    def start_record(self, *, is_seal: bool) -> None:
        """Note a libxc record, the header of which was just taken."""
        if self._chain is not None:
            self._before = self._chain.copy() if is_seal else None
        elif not is_seal or self._has_records:
            self._prefix = None
        self._has_records = True

    def start_pages(self, header: Buffer) -> None:
        """Start a batch: the header of a PAGE_DATA record was taken, its body follows."""
        if self._make is not None:
            batch = self._make()
            batch.update(header)
            self._batch = batch, None

    def end_pages(self, offset: int, record: PageData | None) -> None:
        """End a batch, of which all bytes were taken."""
        if self._batch is None:
            return
        digest, self._batch = self._batch[0].digest(), None
        raw = b"" if record is None else record.raw
        kept = raw if len(raw) <= _PFNS_KEPT else b""
        self._pending.append(_Batch(offset, digest, kept, len(raw) // 8))
        if len(self._pending) == BATCHES_MAX + 1:
            self._break(f"more than {BATCHES_MAX} batches came without a seal", offset)
        if len(self._pending) > 2 * BATCHES_MAX:
            self._pending = self._pending[-BATCHES_MAX:]

    # --- seals -------------------------------------------------------------------------------------------------------

    def check(self, record: Seal) -> None:
        """Compare a seal with what was taken before it; its own bytes were taken as well."""
        if record.part == SealPart.BEGIN:
            self._begin(record)
        elif self.state.algorithm is None:
            self._break("a seal continues, but none began", record.offset, record.name)
        elif self.active:
            self._compare(record)
            self.state.complete = record.part == SealPart.END

    def note(self, record: Seal) -> None:
        """Note a seal that is not checked."""
        self.state.algorithm = self.state.algorithm or Algorithm(record.algorithm)

    def end(self, offset: int) -> None:
        """Note libxc's END record: the seal has to be complete."""
        if self.active and not self.state.complete:
            self._break("the stream ends before its seal is complete", offset)
        self._chain = self._make = None
        self.active = False

    def check_after_end(self, name: str, offset: int) -> None:
        """Report a record between the last seal and END."""
        if self.state.complete and self.active:
            self._break(f"{name} follows the last seal", offset)
            self.state.uncovered.append(name)

    def _begin(self, record: Seal) -> None:
        state, prefix = self.state, self._prefix
        if state.algorithm is not None or prefix is None:
            self._break("a seal begins after other records", record.offset, record.name)
            return
        algorithm = state.algorithm = Algorithm(record.algorithm)
        self._prefix = None
        if algorithm is Algorithm.HMAC_SHA256 and self._key is None:
            self._warn("the seal was made with a key: give it (--seal-key) to check the seal")
            return
        try:
            self._make = hash_maker(algorithm, self._key)
        except RequestError as e:
            self._warn(str(e))
            return
        state.checked = self.active = True
        state.covers_envelope = record.number == self._image and not self._has_gaps
        if record.number and not state.covers_envelope:
            problem = f"the seal covers {record.number} bytes before libxc's stream; there are {self._image}"
            self._break(problem, record.offset, record.name)
        total = RECORD_HEADER.size + -(-record.length // 8) * 8
        start = self._image if not record.number else 0
        self._chain = self._make()
        self._chain.update(bytes(prefix[start : len(prefix) - total + RECORD_HEADER.size]))
        self._before = self._chain.copy()
        self._chain.update(bytes(prefix[len(prefix) - total + RECORD_HEADER.size :]))
        self._compare(record)

    def _compare(self, record: Seal) -> None:
        import hmac  # noqa: PLC0415

        state, before = self.state, self._before
        assert state.algorithm is not None
        assert before is not None
        size = state.algorithm.digest_size
        body = b"".join(record.body())
        before.update(body[:-size])
        digests = record.digests[:-size]
        wrong = record.algorithm != state.algorithm or len(digests) != len(self._pending) * size
        if record.part != SealPart.BEGIN:
            wrong |= record.number != state.batches + len(self._pending)
        if not self._chain_broken and (wrong or not hmac.compare_digest(before.digest(), record.digests[-size:])):
            self._chain_broken = True
            since = "header" if record.part == SealPart.BEGIN else "record"
            why = "or the key is another one" if record.part == SealPart.BEGIN and state.keyed else ""
            problem = f"a {since} before this seal was changed, removed, added or moved"
            self._break(f"{problem}, {why}" if why else problem, record.offset, record.name)
        for index, batch in enumerate(self._pending):
            if not hmac.compare_digest(batch.digest, digests[index * size : (index + 1) * size]):
                pfns = batch.pfns()
                message = (
                    f"the content of batch {state.batches + index} is not what was sealed: {_describe(batch, pfns)}"
                )
                self._report(
                    SealBroken(
                        message,
                        offset=batch.offset,
                        record="PAGE_DATA",
                        rule=rules.SEAL.name,
                        batch=state.batches + index,
                        pfns=pfns,
                    )
                )
        state.batches += len(self._pending)
        self._pending = []

    def _break(self, message: str, offset: int, record: str | None = None) -> None:
        self._report(SealBroken(message, offset=offset, record=record, rule=rules.SEAL.name))


def _describe(batch: _Batch, pfns: tuple[int, ...]) -> str:
    """Describe the pfns of a batch as ranges."""
    if not pfns:
        return f"{batch.count} pfns"
    ranges: list[list[int]] = []
    for pfn in sorted(pfns):
        if ranges and pfn == ranges[-1][1] + 1:
            ranges[-1][1] = pfn
        else:
            ranges.append([pfn, pfn])
    shown = ", ".join(f"{a:#x}" if a == b else f"{a:#x} to {b:#x}" for a, b in ranges[:_SHOWN])
    more = len(ranges) - _SHOWN
    return f"pfns {shown}" + (f" and {more} more ranges" if more > 0 else "")
