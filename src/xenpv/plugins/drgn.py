"""drgn over a domain, wherever it is: running, saved or dumped, without writing a core first.

    python -m xenpv.plugins.drgn -s vmlinux web.save

or in a program of one's own:

    with open_domain("web.save") as domain:
        prog = program(domain)
        prog.load_debug_info(["vmlinux"])
        for task in for_each_task(prog): ...

drgn walks the kernel's page tables by itself, since they name pfns here. Where it cannot (a 32-bit guest, a kernel
without VMCOREINFO) virtual memory is what vcpu 0 sees, by our walk.
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
    sys.exit("xenpv: error: this needs drgn, which is not installed: pip install 'xenpv[drgn]'")

from xenpv.cli.main import EXIT_FAILED, run
from xenpv.cli.target import PAUSE, TARGET, open_target
from xenpv.errors import RequestError, XenPVError
from xenpv.findings import Rule, Severity
from xenpv.memory.vmcoreinfo import find_vmcoreinfo
from xenpv.plugins.recent import RecentPages
from xenpv.source.domain import Domain
from xenpv.text import printable

_PHYSICAL = {8: 1 << 52, 4: 1 << 32}  # bytes; drgn cuts off an address of a 32-bit program, PAE or not
_AT_ONCE = 1 << 20
_FRESH = 1.0  # seconds: each page of a running domain costs hypercalls, and drgn walks page tables at every step
_PT_REGS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_ax", "rip", "cs", "rflags", "rsp", "ss"),
)


def program(domain: Domain, *, live: bool = False) -> drgn.Program:
    """A drgn Program whose memory is the domain's. ``live``: it runs on meanwhile; what is read is then as it was not
    more than a second ago.

    Only what is read of memory is, so the domain must stay open for as long as the Program is used. A read of what is
    not there raises drgn.FaultError. It has no debugging information yet: see Program.load_debug_info().
    """
    wide = domain.width == 8
    pages = RecentPages(domain.memory, seconds=_FRESH if live else math.inf)
    prog = drgn.Program(drgn.Platform(drgn.Architecture.X86_64 if wide else drgn.Architecture.I386))
    prog.add_memory_segment(0, _PHYSICAL[domain.width], _reader(pages.read), physical=True)
    text = find_vmcoreinfo(domain)
    if text is not None:
        prog.set_linux_kernel_custom(text, live)
    if text is None or not wide:
        memory = domain.memory
        prog.add_memory_segment(0, (1 << 8 * domain.width) - 1, _reader(memory.read_virtual), physical=False)
    return prog


def _reader(read: Callable[[int, int], bytes]) -> Callable[[int, int, int, bool], bytes]:
    def segment(address: int, count: int, _offset: int, _physical: bool) -> bytes:
        try:
            # Not all at once: the length may be what a guest says, and most of it not there.
            steps = range(address, address + count, _AT_ONCE)
            return b"".join(read(at, min(_AT_ONCE, address + count - at)) for at in steps)
        except XenPVError as e:
            raise drgn.FaultError(str(e), address) from None

    return segment


def stack_of(prog: drgn.Program, domain: Domain, vcpu: int) -> drgn.StackTrace:
    """What a vcpu was doing: the trace from its registers on, which drgn's own threads do not have.

    Raises RequestError where they are not known, or the guest is not 64-bit; LookupError without debugging information.
    """
    registers = domain.registers(vcpu)
    if registers is None or registers.width != 8:
        why = "its registers are not known" if registers is None else "drgn unwinds no 32-bit stacks"
        raise RequestError(f"{domain.name}: vcpu {vcpu}: {why}")
    held = {"orig_ax": (1 << 64) - 1} | registers.general | registers.segments
    pt_regs = struct.pack(f"<{len(_PT_REGS)}Q", *(held[name] for name in _PT_REGS))
    return prog.stack_trace(drgn.Object.from_bytes_(prog, "struct pt_regs", pt_regs))


@click.command(context_settings={"allow_interspersed_args": False})
@TARGET
@click.argument("script", required=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("-s", "--symbols", multiple=True, metavar="PATH", help="A vmlinux or module with debugging information.")
@click.option("-e", "code", metavar="CODE", help="Run a line of Python instead of a script.")
@click.option("--partial", is_flag=True, help="Open what is there of a FILE that was cut off or is damaged.")
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
    """Open a domain in drgn: one that runs (DOM), or is in a save file or core (FILE).

    \b
    python -m xenpv.plugins.drgn -s vmlinux web.save
    python -m xenpv.plugins.drgn -s vmlinux web.save tasks.py
    python -m xenpv.plugins.drgn -s vmlinux --pause -e 'print(stack_of(0))' web

    A script, a line or the prompt finds what drgn's own have, and `domain` and `stack_of(VCPU)`. Without -s, drgn looks
    for the kernel's symbols where it always does.
    """

    def fault(rule: Rule, message: str, offset: int, _record: str | None) -> None:
        if rule.severity is Severity.ERROR:
            click.echo(printable(f"xenpv: {message} (at {offset:#x})"), err=True)

    if target == "-":
        raise RequestError("drgn reads here and there, and a pipe passes by once: put it into a file first")
    with open_target(target, pause=pause, allow_hvm=True, on_breach=fault if partial else None) as domain:
        prog = program(domain, live=domain.live is not None and not pause)
        if not prog.flags & drgn.ProgramFlags.IS_LINUX_KERNEL:
            click.echo("no VMCOREINFO in its memory: memory can be read, but nothing is known of a kernel", err=True)
        else:
            try:
                prog.load_debug_info(symbols, default=not symbols)
            except drgn.MissingDebugInfoError as e:
                click.echo(str(e), err=True)
        ours = {"domain": domain, "stack_of": functools.partial(stack_of, prog, domain)}
        if script is None and code is None:
            click.echo(version_header(), err=True)
            run_interactive(prog, globals_func=lambda given: given | ours)
            return
        drgn.set_default_prog(prog)
        try:
            if code is not None:
                sys.argv = ["-e", *([script] if script else []), *arguments]
                exec(code, default_globals(prog) | ours)  # noqa: S102
            else:
                assert script is not None
                sys.argv = [script, *arguments]
                sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
                runpy.run_path(script, ours | {"prog": prog}, "__main__")
        except (XenPVError, OSError):
            raise
        except Exception:  # of the script's, and no bug of ours
            traceback.print_exc()
            sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    run(main)
