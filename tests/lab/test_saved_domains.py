"""Files that stock xl writes on real Xen, of each version: verified, shown, walked and read.

The oracles are stock tools: `xl list -l` for what the domain is, `xl dump-core` of the running guest for what is in
its memory, the guest's own /proc/kallsyms for where things are, and `xl restore` for whether a file restores.
"""

from __future__ import annotations

import os
import re
import struct
import threading
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

import lab
from lab import guests
from tests.support.bit_flips import KINDS, as_table, flip_survey
from tests.support.lab.debian import DEBIAN_MIB, Debian
from tests.support.lab.guest import Guest, start
from xenpv.abi.x86 import PTE_P, PTE_RW
from xenpv.cli.show import describe
from xenpv.frames import HAS_DATA, IS_TABLE, PAGE_SIZE, PageType
from xenpv.io.stream_input import Input
from xenpv.memory.page_tables import as_ptes, pte_frames
from xenpv.source.open import open_domain
from xenpv.source.saved import SavedDomain
from xenpv.stream.reader import Reader
from xenpv.verify.stream import Report, verify

LITMUS_MIB = 16
FORMS = {
    "tree": "three-level tree",
    "linear": "linear virtual list",
    "both": "linear virtual list and three-level tree",
}


def sound(report: Report) -> None:
    assert [str(finding) for finding in report.findings] == []
    assert report.deep


def test_verify_of_a_debian_guest_finds_nothing(debian: Debian) -> None:
    sound(verify(str(debian.path)))


def test_verify_of_a_debian_guest_from_a_pipe_finds_nothing(debian: Debian) -> None:
    with debian.path.open("rb") as file:
        r, w = os.pipe()

        def pump() -> None:
            with os.fdopen(w, "wb") as out:
                while data := file.read(1 << 20):
                    out.write(data)

        thread = threading.Thread(target=pump)
        thread.start()
        sound(verify(Input(r, "pipe")))
        thread.join()


def test_show_of_a_debian_guest_agrees_with_xl(debian: Debian, host: lab.Host) -> None:
    with SavedDomain.open(str(debian.path)) as saved:
        shown = describe(saved)
    config = debian.xl["config"]
    c_info, b_info = config["c_info"], config["b_info"]
    assert shown["config"]["name"] == c_info["name"]
    assert shown["config"]["uuid"] == c_info["uuid"]
    assert shown["config"]["max_memkb"] == b_info["max_memkb"] == DEBIAN_MIB * 1024
    assert shown["config"]["max_vcpus"] == b_info["max_vcpus"] == len(shown["vcpus"])
    assert shown["xen"] == host.xen
    assert (shown["width"], shown["levels"], shown["complete"]) == (8, 4, True)
    assert shown["memory_in_stream"] == DEBIAN_MIB << 20


def test_memory_at_a_symbols_address_is_the_kernels_banner(debian: Debian) -> None:
    with SavedDomain.open(str(debian.path)) as saved:
        banner = saved.memory.read_virtual(debian.symbols["linux_banner"], 200)
    text = banner.split(b"\0")[0].decode().strip()
    assert text.startswith("Linux version 6.1.")
    assert text == debian.version


def test_pages_of_the_save_file_equal_the_core(debian: Debian) -> None:
    """The kernel's read-only data is byte for byte as in a core of the running guest; its text all but.

    Freezing tasks for the suspend flips a static key, which patches two or five bytes wherever it is asked.
    """
    with debian.core.open("rb") as file, SavedDomain.open(str(debian.path)) as saved:
        p2m, pages = _core(file)
        core = np.frombuffer(pages, np.uint8).reshape(-1, PAGE_SIZE)
        for first, last, patched in (("__start_rodata", "__end_rodata", 0), ("_text", "_etext", 1e-4)):
            start, end = debian.symbols[first], debian.symbols[last] - PAGE_SIZE
            low, high = saved.memory.walk(start).pfn, saved.memory.walk(end).pfn
            assert low is not None
            assert high is not None
            pfns = np.arange(low, high + 1, dtype=np.uint64)
            assert len(pfns) == (end >> 12) - (start >> 12) + 1 > 500
            row = np.searchsorted(p2m[:, 0], pfns)
            assert np.array_equal(p2m[row, 0], pfns)
            assert np.mean(core[row] != saved.frames.pages(pfns)) <= patched
        # The p2m in the stream's frames is the one that the core lists: mfn for mfn.
        assert saved.p2m.lookup(p2m[:, 0].copy()).tolist() == p2m[:, 1].tolist()


def test_core_opens_as_the_saved_domain(debian: Debian) -> None:
    """Its page tables hold mfns, and nothing says which pages they are; the stream says so of the same guest later."""
    with open_domain(str(debian.core)) as core, SavedDomain.open(str(debian.path)) as saved:
        banner = core.memory.read_virtual(debian.symbols["linux_banner"], 200)
        assert banner.split(b"\0")[0].decode().strip() == debian.version
        pfns = saved.contents.index.pfns(HAS_DATA)
        there, here = saved.frames.types(pfns) & 7, core.frames.types(pfns)
        assert np.mean(there != here) < 0.005  # processes that came and went between
        assert np.array_equal(np.unique(here), np.arange(5))
        start, end = debian.symbols["__start_rodata"], debian.symbols["__end_rodata"]
        pages = (end - start) // PAGE_SIZE
        found = core.memory.translate(start, pages)
        assert np.array_equal(found, saved.memory.translate(start, pages))
        assert np.array_equal(core.frames.pages(found), saved.frames.pages(found))


def _core(file: BinaryIO) -> tuple[np.ndarray, bytes]:
    """The pfn and mfn pairs and the pages of a dump-core file (xen.git:docs/misc/dump-core-format.txt)."""
    elf: Any = ELFFile(file)  # type: ignore[no-untyped-call]
    p2m = np.frombuffer(elf.get_section_by_name(".xen_p2m").data(), "<u8").reshape(-1, 2)
    return p2m, elf.get_section_by_name(".xen_pages").data()


def test_restore_of_a_verified_file_by_xl_succeeds(debian: Debian, host: lab.Host) -> None:
    saved = host.put(debian.path, "debian-back.save")
    start = len(host.guest_console("debian-saved"))
    host.run(f"xl restore {saved}", timeout=120).check()
    host.wait_for_guest("debian-saved", guests.BEAT, after=start)
    host.run("xl destroy debian-saved").check()


def test_verify_with_one_flipped_bit_finds_it(debian: Debian, host: lab.Host) -> None:
    """A sample; docs/evidence/shown.md has a larger one, with the reasons of what cannot be found."""
    result = flip_survey(debian.path, KINDS, samples=120 if host.xen == lab.DEFAULT else 30, seed=5)
    print("\n" + as_table(result))
    least = {"page tables": 0.8, "p2m frame list": 0.98, "vcpu context": 0.65, "headers": 0.95, "page list": 0.98}
    assert {kind: tally.share for kind, tally in result.items() if tally.share < least[kind]} == {}


def test_restore_of_a_refused_file_by_xl_fails(debian: Debian, host: lab.Host, tmp_path: Path) -> None:
    """One bit: a page table's read-only mapping made writable, which Xen refuses when it validates the tables."""
    path = tmp_path / "broken.save"
    path.write_bytes(debian.path.read_bytes())
    with SavedDomain.open(str(path)) as saved:
        tables = saved.contents.index.pfns(IS_TABLE)
        l1s = tables[saved.frames.types(tables) & 7 == PageType.L1TAB]
        entries = as_ptes(saved.frames.pages(l1s))
        present = entries & np.uint64(PTE_P) != 0
        tops = IS_TABLE[saved.frames.types(pte_frames(entries).reshape(-1))].reshape(entries.shape)
        row, entry = (int(places[0]) for places in np.nonzero(present & tops))
        offset = int(saved.contents.index.offsets(l1s)[row]) + entry * 8
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<Q", int(entries[row, entry]) | PTE_RW))
    report = verify(str(path))
    assert [(finding.rule.name, finding.offset) for finding in report.findings] == [("pte-writable", offset)]
    result = host.run(f"xl restore {host.put(path, 'broken.save')}", timeout=120)
    assert result.status != 0
    # Whichever comes first to the table: loading vcpu 0's cr3, or pinning.
    assert re.search(rb"Failed to (set vcpu0's basic info|pin batch of pagetables)", result.stderr), result.tails()


@pytest.mark.parametrize("form", FORMS)
def test_verify_of_litmus_in_each_p2m_form_finds_nothing(host: lab.Host, form: str) -> None:
    name = f"litmus-{form}"
    config = host.write(f"{name}.cfg", guests.litmus_config(name, memory=LITMUS_MIB, vcpus=2, options=f"p2m={form}"))
    start = len(host.guest_console(name))
    host.run(f"xl create {config}").check()
    at = host.wait_for_guest(name, "litmus: heartbeat", after=start)
    result = host.run(f"xl save {name} /tmp/saved && cp /tmp/saved . && xl restore /tmp/saved && rm /tmp/saved").check()
    at = host.wait_for_guest(name, "litmus: resume", after=at)
    host.wait_for_guest(name, "litmus: pattern ok", after=at)
    host.run(f"xl destroy {name}").check()
    path = result.outputs / "saved"
    sound(verify(str(path)))
    with SavedDomain.open(str(path)) as saved:
        shown = describe(saved)
    assert shown["p2m"]["form"] == FORMS[form]
    assert len(shown["vcpus"]) == 2
    assert shown["memory_in_stream"] == LITMUS_MIB << 20


@pytest.mark.deep_elsewhere
def test_verify_of_a_pvh_guest_finds_nothing(host: lab.Host) -> None:
    """libxenguest writes HVM_CONTEXT before HVM_PARAMS, whatever the specification says, and restores that."""
    start(host, "pvh", guests.pvh_config("pvh"), guests.UP)
    saved = host.run("xl save pvh /tmp/pvh && cp /tmp/pvh .", timeout=300).check().outputs / "pvh"
    assert [str(finding) for finding in verify(str(saved)).findings] == []
    records = [event.name for event in Input.open(str(saved)).events(Reader())]
    assert records.index("HVM_CONTEXT") < records.index("HVM_PARAMS")
    host.run("xl restore /tmp/pvh && rm /tmp/pvh", timeout=300).check()
    Guest.expected(host, "pvh").beats(guests.BEAT)
