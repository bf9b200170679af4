"""Who is to blame: one class of error for each culprit, the numbers as attributes."""

from __future__ import annotations


class XenPVError(Exception):
    """Base of every error that xenpv raises on purpose; anything else is a bug of ours."""


class ImageError(XenPVError):
    """The kernel file is not one that can be read, or says something impossible.

    ``offset`` is the byte offset in the file, or, where the message begins with "in the unpacked kernel", in the ELF
    file that was packed inside; ``note`` is the name of the Xen ELF note to blame. None where there is none.
    """

    def __init__(self, message: str, *, offset: int | None = None, note: str | None = None) -> None:
        where = [f"at {offset:#x}"] if offset is not None else []
        where += [f"in note {note}"] if note else []
        super().__init__(f"{message} ({' '.join(where)})" if where else message)
        self.reason = message
        self.offset = offset
        self.note = note


class RequestError(XenPVError):
    """What was asked does not fit.

    ``needed`` and ``available`` are numbers in the unit that the message names, or None.
    """

    def __init__(self, message: str, *, needed: int | None = None, available: int | None = None) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available


class GuestError(XenPVError):
    """The guest's memory says something impossible.

    ``pfn`` is the page at fault, or None where it is no single page.
    """

    def __init__(self, message: str, *, pfn: int | None = None) -> None:
        super().__init__(message)
        self.pfn = pfn


class Fault(GuestError):
    """Nothing is there.

    ``space`` is "pfn" or "vaddr", ``address`` a pfn or a virtual address in bytes. For a virtual address, ``level``
    (4 to 1) and ``entry`` (0 to 511) name the page-table entry at which the walk ended.
    """

    def __init__(
        self, message: str, *, space: str, address: int, level: int | None = None, entry: int | None = None
    ) -> None:
        super().__init__(message, pfn=address if space == "pfn" else None)
        self.space = space
        self.address = address
        self.level = level
        self.entry = entry


class StreamError(XenPVError):
    """The bytes are wrong.

    ``offset`` is the byte offset in the file or pipe, ``record`` the name of the record there, ``rule`` the name of the
    rule that is broken; None where unknown.
    """

    def __init__(self, message: str, *, offset: int, record: str | None = None, rule: str | None = None) -> None:
        where = f"at {offset:#x}" + (f" in {record}" if record else "")
        super().__init__(f"{message} ({where})")
        self.reason = message
        self.offset = offset
        self.record = record
        self.rule = rule


class Truncated(StreamError):
    """The bytes end too early."""


class Malformed(StreamError):
    """A field has a value that it may not have."""


class OutOfOrder(StreamError):
    """A record comes where it may not, or one that must come is missing."""


class Unsupported(StreamError):
    """Something that is not, or not any longer, a stream that xenpv reads; the message says what it is."""


class HostError(XenPVError):
    """Xen said no, or is not there.

    ``op`` is what was asked of it, ``domid`` of which domain, ``errno`` its answer; None where there is none.
    """

    def __init__(self, message: str, *, op: str, domid: int | None = None, errno: int | None = None) -> None:
        super().__init__(message)
        self.op = op
        self.domid = domid
        self.errno = errno
