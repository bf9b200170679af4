"""Errors: one class for each party at fault, with the numbers as attributes."""

from __future__ import annotations

from collections.abc import Iterator


class XenPVError(Exception):
    """The base of every error that xenpv raises on purpose.

    Any other exception is a bug in xenpv.
    """

    def __reduce__(self) -> tuple[object, ...]:
        """Return how to pickle it with all attributes.

        Worker processes do that, whatever the constructor demands.
        """
        return _unpickle, (type(self), self.args), self.__dict__


def _unpickle(kind: type[XenPVError], args: tuple[object, ...]) -> XenPVError:
    """Return an error without calling its constructor.

    A pickle does not have the constructor's keyword arguments.
    """
    error = kind.__new__(kind, *args)
    error.args = args
    return error


def iter_notes(error: BaseException | None) -> Iterator[str]:
    """Yield the notes of an error and of its causes.

    A note tells of another failure; ``BaseException.add_note`` stores it.
    """
    while error is not None:
        yield from getattr(error, "__notes__", ())
        error = error.__cause__


class ImageError(XenPVError):
    """The kernel file is damaged, or is no PV kernel.

    Attributes:
        reason: the message without the place.
        offset: the byte offset in the file, or in the ELF file packed inside if the message begins with "in the
            unpacked kernel"; None if unknown.
        note: the name of the Xen ELF note at fault, None if there is none.
    """

    def __init__(self, message: str, *, offset: int | None = None, note: str | None = None) -> None:
        parts = [f"at {offset:#x}"] if offset is not None else []
        parts += [f"in note {note}"] if note else []
        super().__init__(f"{message} ({' '.join(parts)})" if parts else message)
        self.reason = message
        self.offset = offset
        self.note = note


class RequestError(XenPVError):
    """The request cannot be met.

    Attributes:
        needed: in the unit that the message names, or None.
        available: in the same unit, or None.
    """

    def __init__(self, message: str, *, needed: int | None = None, available: int | None = None) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available


class GuestError(XenPVError):
    """The guest's memory contradicts itself.

    Attributes:
        pfn: the page at fault, None if it is no single page.
        mfn: the machine frame at fault, or None.
    """

    def __init__(self, message: str, *, pfn: int | None = None, mfn: int | None = None) -> None:
        super().__init__(message)
        self.pfn = pfn
        self.mfn = mfn


class Fault(GuestError):
    """An address of the guest cannot be read.

    Attributes:
        space: "pfn" or "vaddr".
        address: a pfn, or a virtual address in bytes.
        level: the level (5 to 1) of the page-table entry at which the walk ended, or of the bad entry; otherwise None.
        entry: the index of that entry, or None.
        page_type: the type of a page without content; otherwise None.
    """

    def __init__(
        self,
        message: str,
        *,
        space: str,
        address: int,
        level: int | None = None,
        entry: int | None = None,
        mfn: int | None = None,
        page_type: int | None = None,
    ) -> None:
        super().__init__(message, pfn=address if space == "pfn" else None, mfn=mfn)
        self.space = space
        self.address = address
        self.level = level
        self.entry = entry
        self.page_type = page_type


class StreamError(XenPVError):
    """A stream or core breaks the rules of its format.

    Attributes:
        reason: the message without the place.
        offset: the byte offset in the file or pipe.
        record: the name of the record there, None if unknown.
        rule: the name of the broken rule, None if unknown.
    """

    def __init__(self, message: str, *, offset: int, record: str | None = None, rule: str | None = None) -> None:
        place = f"at {offset:#x}" + (f" in {record}" if record else "")
        super().__init__(f"{message} ({place})")
        self.reason = message
        self.offset = offset
        self.record = record
        self.rule = rule


class Truncated(StreamError):
    """The stream ends too early."""


class Malformed(StreamError):
    """A field has an invalid value."""


class SealBroken(StreamError):
    """The stream is not what was sealed.

    Attributes:
        batch: the number of the PAGE_DATA record whose content changed; None if it is no single one.
        pfns: the pfns of that record; empty for a very long one, and if it is no single one.
    """

    def __init__(
        self,
        message: str,
        *,
        offset: int,
        record: str | None = None,
        rule: str | None = None,
        batch: int | None = None,
        pfns: tuple[int, ...] = (),
    ) -> None:
        super().__init__(message, offset=offset, record=record, rule=rule)
        self.batch = batch
        self.pfns = pfns


class OutOfOrder(StreamError):
    """A record is not allowed at its place, or a required record is missing."""


class Unsupported(StreamError):
    """The stream has a format that xenpv does not read; the message names it."""


class HostError(XenPVError):
    """Xen refused an operation, or is not there.

    Attributes:
        op: the operation.
        domid: its domain, or None.
        errno: Xen's answer, or None.
    """

    def __init__(self, message: str, *, op: str, domid: int | None = None, errno: int | None = None) -> None:
        super().__init__(message)
        self.op = op
        self.domid = domid
        self.errno = errno
