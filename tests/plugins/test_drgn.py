"""drgn over a domain: it reads what we read, by its own walk of our page tables or by ours, and no more.

What it says of a real kernel, with debugging information, is in tests/lab/test_plugins.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import drgn
import pytest
from click.testing import CliRunner, Result

from tests.support.p2m_guest import P2MGuest
from tests.support.vectors import unpack_vector
from tests.support.writers.build import USER_VADDR, pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.vmcoreinfo import text
from tests.vectors.make import RECIPES
from xenpv.abi.declare import Width
from xenpv.errors import Fault, RequestError, Truncated
from xenpv.plugins.drgn import _PT_REGS, main, program, stack_of
from xenpv.source.open import FileDomain, open_path

PAGE = 4096
HOLE = 80


def make_domain(width: Width, *, linux: bool) -> Domain:
    domain = pv_domain(width=width, pfns=[*range(HOLE), *range(HOLE + 1, 97)], vcpus=2)
    if linux:
        at = domain.places
        domain.pages[at.data[0]][:] = text(0, top=domain.vaddrs[at.top]).ljust(PAGE, b"\0")
    return domain


@pytest.fixture(params=[(8, True), (8, False), (4, True), (4, False)], ids=lambda p: f"{p[0] * 8}-{p[1]}")
def domain(request: pytest.FixtureRequest) -> Domain:
    width, linux = request.param
    return make_domain(width, linux=linux)


@pytest.fixture
def saved(domain: Domain, tmp_path: Path) -> Iterator[FileDomain]:
    path = tmp_path / "made.save"
    path.write_bytes(domain.to_bytes())
    with open_path(str(path)) as saved:
        yield saved


def test_drgn_physical_memory_is_the_domains(domain: Domain, saved: FileDomain) -> None:
    prog = program(saved)
    for pfn, content in domain.pages.items():
        assert prog.read(pfn * PAGE, PAGE, physical=True) == bytes(content)
    assert prog.read(3 * PAGE + 5, 4 * PAGE, physical=True) == saved.memory.read(3 * PAGE + 5, 4 * PAGE)


def test_drgn_virtual_memory_is_vcpu_0s(domain: Domain, saved: FileDomain) -> None:
    """drgn walks the page tables by itself for a 64-bit kernel that it knows."""
    prog = program(saved)
    for pfn, vaddr in domain.vaddrs.items():
        assert prog.read(vaddr, PAGE) == bytes(domain.pages[pfn])
    start = domain.vaddrs[7] + 100
    assert prog.read(start, 5 * PAGE) == saved.memory.read_virtual(start, 5 * PAGE)
    assert prog.read(USER_VADDR + 8, 16) == bytes(domain.pages[domain.places.user][8:24])


def test_drgn_read_of_an_absent_page_raises_fault(domain: Domain, saved: FileDomain) -> None:
    prog = program(saved)
    hole = HOLE * PAGE
    for address, count in ((hole, 1), (hole - 1, 2), (200 * PAGE, 8), (1 << 31, 8), (hole - PAGE, 1 << 24)):
        with pytest.raises(drgn.FaultError):
            prog.read(address, count, physical=True)
    with pytest.raises(drgn.FaultError):
        prog.read(max(domain.vaddrs.values()) + PAGE, 8)
    with pytest.raises(drgn.FaultError):
        prog.read(0x1234_5000, 8)


def test_drgn_program_with_vmcoreinfo_is_a_kernel(tmp_path: Path) -> None:
    path = tmp_path / "made.save"
    for linux in (True, False):
        path.write_bytes(make_domain(8, linux=linux).to_bytes())
        with open_path(str(path)) as saved:
            prog = program(saved)
            assert bool(prog.flags & drgn.ProgramFlags.IS_LINUX_KERNEL) == linux
            assert not prog.flags & drgn.ProgramFlags.IS_LIVE
            assert bool(program(saved, live=True).flags & drgn.ProgramFlags.IS_LIVE) == linux


@pytest.mark.parametrize("form", ["tree", "linear"])
def test_drgn_program_of_a_running_domain_reads_its_memory(form: str) -> None:
    """Its page tables hold mfns; drgn sees pfns."""
    guest = P2MGuest(8, form)
    prog, memory = program(guest.live, live=True), guest.live.memory
    for pfn in range(0, 64, 7):
        assert prog.read(pfn * PAGE, PAGE, physical=True) == memory.page(pfn)
    vaddr = guest.model.vaddr(9)
    assert prog.read(vaddr, 3 * PAGE) == memory.read_virtual(vaddr, 3 * PAGE)


def test_drgn_program_of_a_real_guest_reads_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "vector.save"
    for recipe in RECIPES:
        path.write_bytes(unpack_vector(recipe))
        with open_path(str(path)) as saved:
            prog = program(saved)
            registers = saved.registers(0)
            assert registers is not None
            stack = saved.memory.read_virtual(registers.sp, 64)
            assert prog.read(registers.sp, 64) == stack
            pfn = saved.memory.walk(registers.sp).pfn
            assert pfn is not None
            assert prog.read(pfn * PAGE + registers.sp % PAGE, 64, physical=True) == stack


# --- what a vcpu was doing -------------------------------------------------------------------------------------------


def with_pt_regs(prog: drgn.Program) -> drgn.Program:
    """As if it had debugging information, of that one structure (Linux: arch/x86/include/asm/ptrace.h)."""
    word = prog.int_type("unsigned long", 8, False)
    members = [drgn.TypeMember(word, name, 64 * i) for i, name in enumerate(_PT_REGS)]
    kind = prog.struct_type("pt_regs", 8 * len(members), members)

    def find(_prog: drgn.Program, _kinds: object, name: str, _filename: str | None) -> drgn.Type | None:
        return kind if name == "pt_regs" else None

    prog.register_type_finder("test", find, enable_index=0)
    return prog


def test_stack_of_a_vcpu_begins_with_its_registers(tmp_path: Path) -> None:
    path = tmp_path / "made.save"
    path.write_bytes(make_domain(8, linux=True).to_bytes())
    with open_path(str(path)) as saved:
        prog = with_pt_regs(program(saved))
        for vcpu in saved.vcpus:
            registers = saved.registers(vcpu)
            assert registers is not None
            first = stack_of(prog, saved, vcpu)[0]
            assert {name: first.register(name) for name in registers.general} == registers.general
            assert first.pc == registers.ip
        with pytest.raises(RequestError) as e:
            stack_of(prog, saved, 9)
        assert saved.registers(9) is None
        assert (e.value.needed, e.value.available, "vcpu 9 " in str(e.value)) == (None, None, True)


def test_stack_of_without_debug_info_or_32_bit_raises(tmp_path: Path) -> None:
    path = tmp_path / "made.save"
    path.write_bytes(make_domain(8, linux=True).to_bytes())
    with open_path(str(path)) as saved, pytest.raises(LookupError):
        stack_of(program(saved), saved, 0)
    path.write_bytes(make_domain(4, linux=True).to_bytes())
    with open_path(str(path)) as saved, pytest.raises(RequestError) as e:
        stack_of(program(saved), saved, 0)
    assert (e.value.needed, e.value.available) == (64, 32)


# --- the command line ------------------------------------------------------------------------------------------------


def run_main(*arguments: str) -> Result:
    argv, path = sys.argv, list(sys.path)
    try:
        return CliRunner().invoke(main, arguments)
    finally:
        sys.argv, sys.path[:] = argv, path


@pytest.fixture
def linux(tmp_path: Path) -> Path:
    path = tmp_path / "linux.save"
    path.write_bytes(make_domain(8, linux=True).to_bytes())
    return path


def test_drgn_command_runs_a_line_of_python(linux: Path) -> None:
    result = run_main(
        "-e", "print(prog['nothing'] if 0 else domain.name, prog.read(4096, 4, physical=True).hex())", str(linux)
    )
    with open_path(str(linux)) as saved:
        assert result.stdout == f"{saved.name} {saved.memory.read(4096, 4).hex()}\n"
    assert "missing" in result.stderr  # of debugging information there is none


def test_drgn_command_runs_a_script_with_arguments(linux: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, drgn\nprint(drgn.get_default_prog() is prog, stack_of.args[1] is domain, sys.argv[1:])\n"
    )
    result = run_main("-s", "/nonexistent/vmlinux", str(linux), str(script), "--flag", "one")
    assert result.stdout == "True True ['--flag', 'one']\n"


def test_drgn_command_with_a_failing_script_exits_1(linux: Path, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("def wrong():\n    raise ZeroDivisionError\n")
    script = tmp_path / "script.py"
    script.write_text("import beside\nbeside.wrong()\n")
    for words in (["-e", "1 / 0", str(linux)], [str(linux), str(script)]):
        result = run_main(*words)
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        assert "ZeroDivisionError" in result.stderr
    assert isinstance(run_main("-e", "stack_of(9)", str(linux)).exception, RequestError)


def test_drgn_command_refuses_a_pipe() -> None:
    result = run_main("-e", "1", "-")
    assert isinstance(result.exception, RequestError)


def test_drgn_command_without_vmcoreinfo_warns(tmp_path: Path) -> None:
    path = tmp_path / "made.save"
    path.write_bytes(make_domain(8, linux=False).to_bytes())
    result = run_main("-e", "print(prog.read(0, 1, physical=True))", str(path))
    assert result.stdout == f"{bytes(make_domain(8, linux=False).pages[0][:1])!r}\n"
    assert "no VMCOREINFO in its memory" in result.stderr


def test_drgn_command_partial_opens_a_cut_file(linux: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.save"
    content = linux.read_bytes()
    first = bytes(make_domain(8, linux=True).pages[0])
    cut.write_bytes(content[: content.index(first) + 10 * PAGE])
    line = f"print(prog.read({PAGE - 8}, 4, physical=True).hex())"
    assert isinstance(run_main("-e", line, str(cut)).exception, Truncated)
    result = run_main("--partial", "-e", line, str(cut))
    assert result.stdout == f"{first[-8:-4].hex()}\n"
    assert f"{cut.stat().st_size:#x}" in result.stderr


def test_drgn_fault_names_the_page(linux: Path) -> None:
    with open_path(str(linux)) as saved:
        with pytest.raises(Fault) as fault:
            saved.memory.read(HOLE * PAGE, 8)
        with pytest.raises(drgn.FaultError) as drgn_fault:
            program(saved).read(HOLE * PAGE, 8, physical=True)
        assert str(fault.value) in str(drgn_fault.value)  # drgn passes it on
