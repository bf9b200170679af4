"""A symbol file for Volatility 3 out of what a stock kernel's image carries along: its types as BTF, and no more.

Volatility's users make theirs out of a kernel's debugging package (dwarf2json). BTF is in the image itself, has every
type and no variables; so the few symbols come from the guest, and of those only init_task has a type. That is enough
for finding the kernel and listing processes, and not for every plug-in.

BTF is described in Linux: Documentation/bpf/btf.rst; the symbol file in volatility3/schemas/schema-6.2.0.json.
"""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from elftools.elf.elffile import ELFFile

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT = range(1, 12)
FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(12, 20)
SAME_AS = {TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG}
SIGNED, CHAR, BOOL = 1, 2, 4

# By kind: bytes behind the type's head, once and for each of its parts.
BEHIND = {
    INT: (4, 0),
    ARRAY: (12, 0),
    STRUCT: (0, 12),
    UNION: (0, 12),
    ENUM: (0, 8),
    FUNC_PROTO: (0, 8),
    VAR: (4, 0),
    DATASEC: (0, 12),
    DECL_TAG: (4, 0),
    ENUM64: (0, 12),
}


@dataclass(frozen=True)
class Type:
    number: int
    kind: int
    name: str
    flag: bool
    size: int  # or the number of another type
    words: tuple[int, ...]  # what follows


class Btf:
    def __init__(self, data: bytes) -> None:
        magic, _version, _flags, header = struct.unpack_from("<HBBI", data)
        assert magic == 0xEB9F
        types, types_length, strings, strings_length = struct.unpack_from("<4I", data, 8)
        self._strings = data[header + strings : header + strings + strings_length]
        self.types = [Type(0, 0, "void", False, 0, ())]
        self.types += self._read(data[header + types : header + types + types_length])

    def text(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()

    def _read(self, data: bytes) -> Iterator[Type]:
        at = number = 0
        while at < len(data):
            name, info, size = struct.unpack_from("<3I", data, at)
            kind, parts, number = info >> 24 & 31, info & 0xFFFF, number + 1
            once, each = BEHIND.get(kind, (0, 0))
            length = once + each * parts
            yield Type(
                number,
                kind,
                self.text(name),
                bool(info >> 31),
                size,
                struct.unpack_from(f"<{length // 4}I", data, at + 12),
            )
            at += 12 + length

    def parts(self, of: Type) -> Iterator[tuple[int, ...]]:
        each = BEHIND[of.kind][1] // 4
        return (of.words[i : i + each] for i in range(0, len(of.words), each))

    def resolved(self, number: int) -> Type:
        found = self.types[number]
        while found.kind in SAME_AS:
            found = self.types[found.size]
        return found

    # --- as Volatility has them --------------------------------------------------------------------------------------

    def reference(self, number: int) -> dict[str, Any]:
        to = self.resolved(number)
        if to.kind == PTR:
            return {"kind": "pointer", "subtype": self.reference(to.size)}
        if to.kind == ARRAY:
            return {"kind": "array", "count": to.words[2], "subtype": self.reference(to.words[0])}
        if to.kind in {STRUCT, UNION, FWD}:
            kind = "union" if to.kind == UNION or (to.kind == FWD and to.flag) else "struct"
            return {"kind": kind, "name": name_of(to)}
        if to.kind in {ENUM, ENUM64}:
            return {"kind": "enum", "name": name_of(to)}
        if to.kind in {FUNC, FUNC_PROTO}:
            return {"kind": "function"}
        return {"kind": "base", "name": to.name}

    def base_types(self) -> dict[str, Any]:
        found = {"void": base(0, "void"), "pointer": base(8, "int")}
        for of in self.types:
            if of.kind == INT:
                encoding = of.words[0] >> 24 & 15
                kind = "bool" if encoding & BOOL else "char" if encoding & CHAR or of.size == 1 else "int"
                found[of.name] = base(of.size, kind, signed=bool(encoding & SIGNED))
            elif of.kind == FLOAT:
                found[of.name] = base(of.size, "float", signed=True)
        return found

    def user_types(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for of in self.types:
            if of.kind in {STRUCT, UNION}:
                fields = dict(self._field(of, i, *part) for i, part in enumerate(self.parts(of)))
                kind = "struct" if of.kind == STRUCT else "union"
                found.setdefault(name_of(of), {"kind": kind, "size": of.size, "fields": fields})
        return found

    def _field(self, of: Type, i: int, name: int, number: int, place: int) -> tuple[str, dict[str, Any]]:
        kind, bit, bits = self.reference(number), place, 0
        if of.flag:
            bit, bits = place & 0xFFFFFF, place >> 24
        offset = bit // 8
        if bits:
            whole = self.resolved(number).size
            offset = bit // 8 // whole * whole
            kind = {"kind": "bitfield", "bit_position": bit - offset * 8, "bit_length": bits, "type": kind}
        field: dict[str, Any] = {"type": kind, "offset": offset}
        if not self.text(name):
            return f"unnamed_field_{i}", field | {"anonymous": True}
        return self.text(name), field

    def enums(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for of in self.types:
            if of.kind in {ENUM, ENUM64}:
                signed = of.flag or of.kind == ENUM
                constants = {self.text(part[0]): value(part[1:], signed) for part in self.parts(of)}
                of_size = {1: "unsigned char", 4: "int" if signed else "unsigned int", 8: "long long int"}
                found.setdefault(
                    name_of(of), {"size": of.size, "base": of_size.get(of.size, "int"), "constants": constants}
                )
        return found


def value(words: tuple[int, ...], signed: bool) -> int:
    data = struct.pack(f"<{len(words)}I", *words)
    return int.from_bytes(data, "little", signed=signed)


def name_of(of: Type) -> str:
    return of.name or f"unnamed_{of.number:x}"


def base(size: int, kind: str, *, signed: bool = False) -> dict[str, Any]:
    return {"size": size, "signed": signed, "kind": kind, "endian": "little"}


def symbol_file(kernel: bytes, symbols: Mapping[str, int], banner: bytes) -> str:
    """``kernel``: the ELF file out of a bzImage. ``banner``: linux_banner, by which Volatility knows it again."""
    elf: Any = ELFFile(io.BytesIO(kernel))  # type: ignore[no-untyped-call]
    btf = Btf(elf.get_section_by_name(".BTF").data())
    types: dict[str, dict[str, Any]] = {
        "init_task": {"type": {"kind": "struct", "name": "task_struct"}},
        "linux_banner": {
            "type": {"kind": "array", "count": len(banner), "subtype": {"kind": "base", "name": "char"}},
            "constant_data": base64.b64encode(banner).decode(),
        },
    }
    return json.dumps(
        {
            "metadata": {"format": "6.2.0", "producer": {"name": "xenpv's tests, from BTF", "version": "1"}},
            "base_types": btf.base_types(),
            "user_types": btf.user_types(),
            "enums": btf.enums(),
            "symbols": {name: {"address": address} | types.get(name, {}) for name, address in symbols.items()},
        }
    )
