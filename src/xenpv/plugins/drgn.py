"""drgn on a running, saved or dumped domain, without writing a core first.

    python3 -m xenpv.plugins.drgn -s vmlinux web.save

or in your own program:

    with xenpv.open_domain("web.save") as domain:
        prog = program(domain)
        prog.load_debug_info(["vmlinux"])
        for task in for_each_task(prog): ...

drgn walks the kernel's page tables itself, since they hold pfns here. For a 32-bit guest, or a kernel without
VMCOREINFO, it cannot: then virtual memory is what vcpu 0 sees, walked by xenpv.
"""

from __future__ import annotations

import functools
import math
import os
import runpy
import struct
import sys
import traceback
from collections.abc import Callable

import click

try:
    import drgn
    from drgn.cli import default_globals, run_interactive, version_header
except ImportError:
    if __name__ != "__main__":
        raise
    sys.exit("xenpv: error: this needs drgn, which is not installed: pip install drgn")

from xenpv import Domain, RequestError, Rule, XenPVError
from xenpv.cli.main import EXIT_FAILED, run
from xenpv.cli.target import PAUSE, TARGET, open_target
from xenpv.findings import Severity
from xenpv.memory.vmcoreinfo import find_vmcoreinfo
from xenpv.plugins.recent import RecentPages
from xenpv.text import printable

_PHYSICAL_SIZE = {8: 1 << 52, 4: 1 << 32}  # bytes; drgn truncates addresses of a 32-bit program, even with PAE
_READ_SIZE = 1 << 20  # bytes
_CACHE_SECONDS = 1.0  # each page of a running domain costs hypercalls, and drgn walks page tables at every step
_PT_REGS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_ax", "rip", "cs", "rflags", "rsp", "ss"),
)


def program(domain: Domain, *, live: bool = False) -> drgn.Program:
    """Return a drgn Program with the domain's memory.

    It has no debugging information yet.

    Memory is read on demand, so the domain must stay open while the Program is used. Reading an absent page raises
    drgn.FaultError.

    Args:
        domain: The domain.
        live: Whether the domain runs meanwhile. Pages are then cached for a second only.
    """
    wide = domain.width == 8
    pages = RecentPages(domain.memory, seconds=_CACHE_SECONDS if live else math.inf)
    prog = drgn.Program(drgn.Platform(drgn.Architecture.X86_64 if wide else drgn.Architecture.I386))
    prog.add_memory_segment(0, _PHYSICAL_SIZE[domain.width], _segment_reader(pages.read), physical=True)
    text = find_vmcoreinfo(domain)
    if text is not None:
        prog.set_linux_kernel_custom(text, live)
    if text is None or not wide:
        memory = domain.memory
        prog.add_memory_segment(0, (1 << 8 * domain.width) - 1, _segment_reader(memory.read_virtual), physical=False)
    return prog


def _segment_reader(read: Callable[[int, int], bytes]) -> Callable[[int, int, int, bool], bytes]:
    def segment(address: int, count: int, _offset: int, _physical: bool) -> bytes:
        try:
            # In steps: the length may come from the guest, and most of the pages may be absent.
            steps = range(address, address + count, _READ_SIZE)
            return b"".join(read(step, min(_READ_SIZE, address + count - step)) for step in steps)
        except XenPVError as e:
            raise drgn.FaultError(str(e), address) from None

    return segment


def stack_of(prog: drgn.Program, domain: Domain, vcpu: int) -> drgn.StackTrace:
    """Return a vcpu's stack trace, from its registers on.

    drgn's own threads do not have one.

    Raises:
        RequestError: The registers are not known, or the guest is not 64-bit.
        LookupError: The Program has no debugging information.
    """
    registers = domain.registers(vcpu)
    if registers is None:
        raise RequestError(f"{domain.name}: the registers of vcpu {vcpu} are not known")
    if registers.width != 8:
        bits = 8 * registers.width
        reason = f"vcpu {vcpu} is {bits}-bit; drgn unwinds only 64-bit stacks"
        raise RequestError(f"{domain.name}: {reason}", needed=64, available=bits)
    values = {"orig_ax": (1 << 64) - 1} | registers.general | registers.segments
    pt_regs = struct.pack(f"<{len(_PT_REGS)}Q", *(values[name] for name in _PT_REGS))
    return prog.stack_trace(drgn.Object.from_bytes_(prog, "struct pt_regs", pt_regs))


@click.command(context_settings={"allow_interspersed_args": False})
@TARGET
@click.argument("script", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("-s", "--symbols", multiple=True, metavar="PATH", help="A vmlinux or module with debugging information.")
@click.option("-e", "code", metavar="CODE", help="Run a line of Python instead of a script.")
@click.option("--partial", is_flag=True, help="Open the readable part of a FILE that is cut off or damaged.")
@PAUSE
def main(
    target: str,
    script: str | None,
    arguments: tuple[str, ...],
    symbols: tuple[str, ...],
    code: str | None,
    partial: bool,
    pause: bool,
) -> None:
    """Open a domain in drgn: a running one (DOM), a save file or core (FILE).

    \b
    python3 -m xenpv.plugins.drgn -s vmlinux web.save
    python3 -m xenpv.plugins.drgn -s vmlinux web.save tasks.py
    python3 -m xenpv.plugins.drgn -s vmlinux --pause -e 'print(stack_of(0))' web

    Scripts, -e and the prompt have drgn's own names, `domain`, and `stack_of(VCPU)`. Without -s, drgn looks for the
    kernel's symbols in its usual places.
    """

    def print_breach(rule: Rule, message: str, offset: int, _record: str | None) -> None:
        if rule.severity is Severity.ERROR:
            click.echo(printable(f"xenpv: {message} (at {offset:#x})"), err=True)

    if target == "-":
        raise RequestError("drgn needs to seek: put the pipe's content into a file first")
    with open_target(target, pause=pause, allow_hvm=True, on_breach=print_breach if partial else None) as domain:
        prog = program(domain, live=domain.live is not None and not pause)
        if not prog.flags & drgn.ProgramFlags.IS_LINUX_KERNEL:
            click.echo("no VMCOREINFO in its memory: you can read memory, but drgn knows no kernel", err=True)
        else:
            try:
                prog.load_debug_info(symbols, default=not symbols)
            except drgn.MissingDebugInfoError as e:
                click.echo(str(e), err=True)
        extra_globals = {"domain": domain, "stack_of": functools.partial(stack_of, prog, domain)}
        if script is None and code is None:
            click.echo(version_header(), err=True)
            run_interactive(prog, globals_func=lambda drgn_globals: drgn_globals | extra_globals)
            return
        drgn.set_default_prog(prog)
        try:
            if code is not None:
                sys.argv = ["-e", *([script] if script else []), *arguments]
                exec(code, default_globals(prog) | extra_globals)  # noqa: S102
            else:
                assert script is not None
                sys.argv = [script, *arguments]
                sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
                runpy.run_path(script, extra_globals | {"prog": prog}, "__main__")
        except (XenPVError, OSError):
            raise
        except Exception:  # an error in the script, not in xenpv
            traceback.print_exc()
            sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    run(main)
