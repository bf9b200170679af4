"""``xenpv read``: a domain's memory, as a hex dump or raw."""

from __future__ import annotations

import sys

import click

from xenpv.cli.target import INDEX, PAUSE, TARGET, TOP, USER, VCPU, open_target, top_table, walk_attempts
from xenpv.cli.terminal import NUMBER
from xenpv.errors import Fault, RequestError

_CHUNK = 1 << 20  # bytes


@click.command()
@TARGET
@click.argument("address", type=NUMBER)
@click.argument("length", type=NUMBER)
@click.option("-p", "--physical", is_flag=True, help="Take ADDRESS as pseudo-physical: pfn * 4096 + offset.")
@click.option("--raw", is_flag=True, help="Write the bytes themselves, not a hex dump.")
@VCPU
@USER
@TOP
@INDEX
@PAUSE
def read(
    target: str,
    address: int,
    length: int,
    physical: bool,
    raw: bool,
    vcpu: int,
    user: bool,
    top: int | None,
    pause: bool,
) -> None:
    """Print LENGTH bytes of a domain's memory at a virtual ADDRESS.

    DOM is a running domain (id, uuid or name); FILE is a save file or a core. Numbers are decimal, hexadecimal (0x), or
    have a suffix K, M, G or T.

    \b
    Examples:
      xenpv read dom.save 0xffffffff81e00000 256
      xenpv read web 0xffffffff81e00000 256                    a running domain
      xenpv read --physical --raw dom.save 0x4a00000 4K > page    pfn 0x4a00
    """
    with open_target(target, pause=pause, allow_hvm=True) as domain:
        memory = domain.memory_of(vcpu)
        if raw and sys.stdout.isatty():
            raise RequestError("raw memory would garble a terminal: send it to a file or a pipe")
        for start in range(address, address + length, _CHUNK):
            count = min(_CHUNK, address + length - start)
            for attempts_left in reversed(range(walk_attempts(domain))):
                try:
                    table = None if physical else top_table(domain, vcpu, user, top)
                    data = memory.read(start, count) if table is None else memory.read_virtual(start, count, top=table)
                    break
                except Fault:
                    if not attempts_left:
                        raise
            if raw:
                sys.stdout.buffer.write(data)
            else:
                for line in _hex_dump(start, data):
                    click.echo(line)


def _hex_dump(address: int, data: bytes) -> list[str]:
    lines = []
    for i in range(0, len(data), 16):
        row = data[i : i + 16]
        text = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
        lines.append(f"{address + i:016x}  {row[:8].hex(' '):<23}  {row[8:].hex(' '):<23}  |{text}|")
    return lines
