"""C structs: declarations, and layouts at both guest widths as NumPy dtypes.

The rules are those of the x86 psABIs: members in order, each at a multiple of its alignment, the struct padded to a
multiple of the largest alignment. The widths differ in two things: ``unsigned long`` and pointers take 8 or 4 bytes,
and a uint64_t inside a struct is aligned to 8 or to 4. NumPy is imported with the first dtype: a reader of records
needs only sizes, and starts without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np

Width = Literal[4, 8]


class Scalar(NamedTuple):
    """A C integer type: its size in bytes at width 4 and at width 8."""

    size4: int
    size8: int

    def size(self, width: Width) -> int:
        """Return its size in bytes at this width."""
        return self.size8 if width == 8 else self.size4

    def align(self, width: Width) -> int:
        """Return its alignment in bytes."""
        return min(self.size(width), width)

    def dtype_spec(self, width: Width) -> Any:
        """Return the argument for np.dtype()."""
        return f"<u{self.size(width)}"


U8 = Scalar(1, 1)
U16 = Scalar(2, 2)
U32 = Scalar(4, 4)
U64 = Scalar(8, 8)
ULONG = Scalar(4, 8)  # unsigned long, xen_pfn_t, xen_ulong_t, pointers


@dataclass(frozen=True)
class Array:
    """A C array, ``element name[count]``.

    The count may differ by width: evtchn_pending has as many words as a word has bits.
    """

    element: Scalar | Struct
    count4: int
    count8: int

    def count(self, width: Width) -> int:
        """Return the number of elements."""
        return self.count8 if width == 8 else self.count4

    def size(self, width: Width) -> int:
        """Return its size in bytes."""
        return self.count(width) * self.element.size(width)

    def align(self, width: Width) -> int:
        """Return its alignment in bytes."""
        return self.element.align(width)

    def dtype_spec(self, width: Width) -> Any:
        """Return the argument for np.dtype()."""
        return (self.element.dtype_spec(width), (self.count(width),))


def array(element: Scalar | Struct, count: int, *, count4: int | None = None) -> Array:
    """Declare an array of ``count`` elements.

    ``count4`` is the number in the 32-bit header, if it differs.
    """
    return Array(element, count if count4 is None else count4, count)


@dataclass(frozen=True)
class Chars:
    """``char name[count]``, as bytes."""

    count: int

    def size(self, width: Width) -> int:  # noqa: ARG002  the same at both widths
        """Return its size in bytes."""
        return self.count

    def align(self, width: Width) -> int:  # noqa: ARG002
        """Return 1: characters need no alignment."""
        return 1

    def dtype_spec(self, width: Width) -> Any:  # noqa: ARG002
        """Return the argument for np.dtype()."""
        return f"S{self.count}"


Member = Scalar | Array | Chars


class WidthOnly(NamedTuple):
    """A member that only the header of one width has."""

    width: Width
    member: Member | Struct


class Struct:
    """A C struct.

    ``name`` is the C name after ``struct`` (or a typedef); members keep C's spelling.

    >>> START_INFO[8].itemsize, START_INFO[4].fields["flags"][1]
    (1168, 40)
    """

    def __init__(self, name: str, header: str, /, **members: Member | Struct | WidthOnly) -> None:
        self.name = name
        self.header = header  # below xen.git:xen/include/public
        self._members = members
        self._dtypes: dict[Width, np.dtype[np.void]] = {}
        self._offsets: dict[Width, dict[str, int]] = {8: {}, 4: {}}
        self._sizes: dict[Width, int] = {8: self._lay_out(8), 4: self._lay_out(4)}

    def members(self, width: Width) -> Iterator[tuple[str, Member | Struct]]:
        """Iterate over the name and type of each member that this width has, in order."""
        for name, member in self._members.items():
            if isinstance(member, WidthOnly):
                if member.width == width:
                    yield name, member.member
            else:
                yield name, member

    def _lay_out(self, width: Width) -> int:
        """Set the members' offsets, and return the struct's size."""
        end = 0
        for name, member in self.members(width):
            end = _round_up(end, member.align(width))
            self._offsets[width][name] = end
            end += member.size(width)
        return _round_up(end, self.align(width))

    def align(self, width: Width) -> int:
        """Return the largest alignment of a member, in bytes."""
        return max(member.align(width) for _, member in self.members(width))

    def size(self, width: Width) -> int:
        """Return sizeof(struct) in bytes."""
        return self._sizes[width]

    def dtype_spec(self, width: Width) -> Any:
        """Return the argument for np.dtype()."""
        members = list(self.members(width))
        return {
            "names": [name for name, _ in members],
            "formats": [member.dtype_spec(width) for _, member in members],
            "offsets": [self._offsets[width][name] for name, _ in members],
            "itemsize": self._sizes[width],
        }

    def __getitem__(self, width: Width) -> np.dtype[np.void]:
        """Return the NumPy dtype at that width."""
        if width not in self._dtypes:
            import numpy as np  # noqa: PLC0415  see above

            self._dtypes[width] = np.dtype(self.dtype_spec(width))
        return self._dtypes[width]

    def offset(self, width: Width, path: str) -> int:
        """Return offsetof(struct, path) in bytes.

        A path may lead into nested structs: ``arch.p2m_cr3``.
        """
        first, _, rest = path.partition(".")
        offset = self._offsets[width][first]
        if rest:
            inner = dict(self.members(width))[first]
            assert isinstance(inner, Struct)
            offset += inner.offset(width, rest)
        return offset

    def read(self, data: bytes | bytearray | memoryview | np.ndarray, width: Width, offset: int = 0) -> np.void:
        """Read one struct from bytes, without a copy.

        Raises:
            ValueError: there are too few bytes.
        """
        import numpy as np  # noqa: PLC0415

        return np.frombuffer(data, self[width], count=1, offset=offset)[0]  # type: ignore[no-any-return]


def _round_up(n: int, align: int) -> int:
    return -(-n // align) * align
