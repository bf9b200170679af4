"""Give drgn the symbols of a kernel's System.map, and name the return addresses on a vcpu's stack."""

import bisect
from collections.abc import Iterator
from pathlib import Path

from drgn import Program, Symbol, SymbolBinding, SymbolKind


class SystemMap:
    """The symbols of a System.map, by name and by address."""

    def __init__(self, path: str) -> None:
        lines = Path(path).read_text().splitlines()
        rows = sorted((int(address, 16), name) for address, _, name in map(str.split, lines))
        self.addresses = [address for address, _ in rows]
        self.names = [name for _, name in rows]

    def find(self, _prog: Program, name: str | None, address: int | None, one: bool) -> list[Symbol]:
        """Return the symbols of that name, or the one at or below that address, as drgn asks for them."""
        if address is not None:
            index = bisect.bisect(self.addresses, address) - 1
            if index < 0:
                return []
            return [self._symbol(bisect.bisect_left(self.addresses, self.addresses[index]))]
        found = [self._symbol(index) for index, known in enumerate(self.names) if name in {None, known}]
        return found[:1] if one else found

    def _symbol(self, index: int) -> Symbol:
        start = self.addresses[index]
        following = bisect.bisect(self.addresses, start)
        end = self.addresses[following] if following < len(self.addresses) else start + 1
        return Symbol(self.names[index], start, end - start, SymbolBinding.GLOBAL, SymbolKind.UNKNOWN)


def load_system_map(prog: Program, path: str) -> None:
    """Let `prog.symbol()` answer from a System.map."""
    prog.register_symbol_finder("System.map", SystemMap(path).find, enable_index=0)


def return_addresses(prog: Program, sp: int, text: range) -> Iterator[tuple[int, str]]:
    """Yield each address on a stack's page, from `sp` up, that holds an address in the kernel's text, and its name."""
    for address in range(sp, (sp | 0xFFF) + 1, 8):
        value = prog.read_u64(address)
        if value in text:
            symbol = prog.symbol(value)
            yield address, f"{symbol.name}+{value - symbol.address:#x}"
