"""LiME, raw, kdump and xl's own cores: each by a reader that knows nothing of ours."""

from __future__ import annotations

import errno
import os
import struct
import threading
from pathlib import Path

import drgn
import numpy as np
import pytest

from tests.support.format_readers import Kdump, look_up_identity, parse_elf, parse_lime
from tests.support.made_domains import FAR, HOLE, PAGE, export_domain, made_domain, open_made
from tests.support.writers.build import pv_domain
from tests.support.writers.core import core_of
from tests.support.writers.domain import Domain
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.stream import XALLOC, Wire
from tests.support.writers.vmcoreinfo import text
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.errors import HostError, RequestError
from xenpv.export.export import FORMATS, export
from xenpv.export.formats.content import populated_runs
from xenpv.frames import U8, U64
from xenpv.source.open import open_domain
from xenpv.source.saved import FilePages


@pytest.fixture(params=[8, 4])
def domain(request: pytest.FixtureRequest) -> Domain:
    return made_domain(request.param)


def there(domain: Domain) -> dict[int, bytes]:
    return {pfn: bytes(page) for pfn, page in domain.pages.items()}


# --- LiME and raw ----------------------------------------------------------------------------------------------------


def test_lime_has_each_page_at_its_address(domain: Domain, tmp_path: Path) -> None:
    out, _ = export_domain(domain, tmp_path, "lime")
    assert parse_lime(out.read_bytes()) == there(domain)


def test_raw_is_memory_with_holes(domain: Domain, tmp_path: Path) -> None:
    out, exported = export_domain(domain, tmp_path, "raw")
    assert exported.bytes == out.stat().st_size == (FAR + 2) * PAGE
    assert out.stat().st_blocks * 512 < 2 << 20
    with out.open("rb") as file:
        for pfn in [*range(HOLE + 20), FAR, FAR + 1]:
            file.seek(pfn * PAGE)
            assert file.read(PAGE) == domain.pages.get(pfn, bytes(PAGE)), hex(pfn)
    absent = FAR + 2 - len(domain.pages)
    assert f"{absent} pfns" in " ".join(exported.remarks)


def test_file_that_ends_with_zeros_has_its_full_size(tmp_path: Path) -> None:
    domain = pv_domain(pfns=range(64))
    last = max(domain.places.data)
    assert last == 63
    domain.pages[last][:] = bytes(PAGE)
    for form, size in (("raw", 64 * PAGE), ("lime", 64 * PAGE + 32)):
        out, exported = export_domain(domain, tmp_path, form)
        assert out.stat().st_size == exported.bytes == size


# --- xl's own cores --------------------------------------------------------------------------------------------------


def sections(path: Path) -> dict[str, tuple[dict[str, int], bytes]]:
    with path.open("rb") as file:
        return {s.name: (dict(s.header), s.data()) for s in parse_elf(file).iter_sections()}


def test_dumpcore_equals_xls_core(domain: Domain, tmp_path: Path) -> None:
    out, _ = export_domain(domain, tmp_path, "dumpcore")
    reference = tmp_path / "reference.core"
    reference.write_bytes(bytes(core_of(domain)))
    ours, theirs = sections(out), sections(reference)
    assert list(ours) == list(theirs)
    for name, (header, _) in theirs.items():
        assert ours[name][0] == header, name
    assert out.stat().st_size == reference.stat().st_size
    for name in (".xen_p2m", ".xen_shared_info", ".shstrtab"):
        assert ours[name][1] == theirs[name][1], name
    pages = [np.frombuffer(of[".xen_pages"][1], np.uint64).reshape(-1, 512) for of in (ours, theirs)]
    own = np.ones(512, np.bool_)
    own[256:272] = False  # Xen's, in a top table
    for row, pfn in enumerate(sorted(domain.pages)):
        top = domain.is_table(pfn) and domain.types[pfn] & 7 == 4
        compared = own if top else np.ones(512, np.bool_)
        if domain.width == 4 and domain.types[pfn] & 7 == 2:
            compared[0x1AC:] = False  # Xen's, in the L2 below a last entry
        assert (pages[0][row] == pages[1][row])[compared].all(), hex(pfn)
        if top:
            frame = np.uint64(0xF_FFFF_FFFF_F000)
            assert pages[0][row, 258] & frame == pages[1][row, 258] & frame == domain.mfns[pfn] << 12
            assert not pages[0][row, 256:258].any()


def test_dumpcore_has_contexts_with_mfns(domain: Domain, tmp_path: Path) -> None:
    """As the host had them: cr3, the user half's, start info in the third argument, the GDT's frames."""
    out, _ = export_domain(domain, tmp_path, "dumpcore")
    data = sections(out)[".xen_prstatus"][1]
    for n, was in domain.vcpus.items():
        now = VCPU_GUEST_CONTEXT.read(data, domain.width, n * 5168)
        assert now["ctrlreg"][3] == domain.cr3(domain.mfns[domain.places.top])
        if domain.places.user_top >= 0:
            assert now["ctrlreg"][1] == domain.mfns[domain.places.user_top] << 12
        frames = -(-int(was["gdt_ents"]) // 512)
        assert [int(f) for f in now["gdt_frames"][:frames]] == [domain.mfns[int(f)] for f in was["gdt_frames"][:frames]]
        for name in was["user_regs"].dtype.names:
            expected = was["user_regs"][name]
            if n == 0 and name == ("rdx" if domain.width == 8 else "edx"):
                expected = domain.mfns[domain.places.start_info]
            assert np.array_equal(now["user_regs"][name], expected), name


def test_dumpcore_opens_as_the_same_domain(domain: Domain, tmp_path: Path) -> None:
    out, _ = export_domain(domain, tmp_path, "dumpcore")
    pfns = np.array(sorted(domain.pages), np.uint64)
    with open_domain(str(out)) as core:
        assert [page.tobytes() for page in core.frames.pages(pfns)] == [bytes(domain.pages[p]) for p in pfns.tolist()]


def test_dumpcore_of_an_hvm_domain_lists_pfns(tmp_path: Path) -> None:
    path, out = tmp_path / "hvm.save", tmp_path / "hvm.core"
    path.write_bytes(bytes(hvm_stream(pages=16)))
    with open_domain(str(path)) as opened:
        export(opened, str(out), "dumpcore")
        (pfns,) = populated_runs(opened.extents()).batches(100)
    elf_sections = sections(out)
    assert elf_sections[".xen_pfn"][1] == pfns.astype("<u8").tobytes()
    assert ".xen_p2m" not in elf_sections
    assert struct.unpack_from("<Q", elf_sections[".note.Xen"][1], 32)[0] == 0xF00F_EBEE


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "dumpcore"])
def test_export_of_an_hvm_domain_in_each_format_has_its_pages(form: str, tmp_path: Path) -> None:
    path, out = tmp_path / "hvm.save", tmp_path / "hvm.out"
    path.write_bytes(bytes(hvm_stream(pages=16)))
    with open_domain(str(path)) as opened:
        pages = populated_runs(opened.extents()).total
        assert export(opened, str(out), form).pages == pages > 10


def test_dumpcore_without_p2m_raises_request_error(tmp_path: Path) -> None:
    domain = made_domain()
    path = tmp_path / "none.save"
    path.write_bytes(bytes(domain.to_stream().drop("X86_PV_P2M_FRAMES")))
    with open_domain(str(path), on_breach=lambda *_: None) as opened, pytest.raises(RequestError, match="no p2m"):
        export(opened, str(tmp_path / "out"), "dumpcore")
    assert not (tmp_path / "out").exists()


# --- kdump -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_kdump_has_pages_bitmaps_and_headers(compression: str, domain: Domain, tmp_path: Path) -> None:
    out, exported = export_domain(domain, tmp_path, "kdump", compression=compression)
    read = Kdump(out.read_bytes())
    pages = dict(read.pages())
    assert {pfn: page for pfn, page in pages.items() if pfn <= FAR + 1} == there(domain)
    assert read.bitmap(0) == read.bitmap(1) == sorted(pages)
    assert (read.version, read.status) == (6, {"zlib": 1, "zstd": 0x20}[compression])
    assert read.end == read.max_mapnr == max(pages) + 1
    assert read.vcpus == 2
    assert read.uts[4] == ("x86_64" if domain.width == 8 else "i686")
    assert read.text == bytes(domain.pages[domain.places.data[0]]).rstrip(b"\0")
    assert read.text in read.notes
    assert exported.bytes == out.stat().st_size
    if domain.width == 8:
        assert look_up_identity(pages, FAR + 2, 5) == 5


def test_kdump_has_the_guests_utsname(tmp_path: Path) -> None:
    domain = made_domain()
    names = b"".join(name.ljust(65, b"\0") for name in (b"Linux", b"made", b"6.1.0-50-amd64", b"#1", b"x86_64", b""))
    pfn = domain.places.data[2]
    domain.pages[pfn][16 : 16 + len(names)] = names
    domain.pages[domain.places.data[0]][:] = text(domain.vaddrs[pfn], top=domain.vaddrs[domain.places.top]).ljust(
        PAGE, b"\0"
    )
    out, _ = export_domain(domain, tmp_path, "kdump")
    assert Kdump(out.read_bytes()).uts == ["Linux", "made", "6.1.0-50-amd64", "#1", "x86_64", ""]


def test_kdump_of_an_unreadable_utsname_has_a_remark(tmp_path: Path) -> None:
    domain = made_domain()  # its VMCOREINFO names an address that is not mapped
    out, exported = export_domain(domain, tmp_path, "kdump")
    assert Kdump(out.read_bytes()).uts[0] == "Linux"
    assert "utsname" in exported.remarks[-1]


def test_kdump_of_vmcoreinfo_without_utsname_has_a_remark(tmp_path: Path) -> None:
    domain = made_domain()
    page = domain.pages[domain.places.data[0]]
    page[:] = bytes(page).replace(b"init_uts_ns", b"init_abc_ns")
    _, exported = export_domain(domain, tmp_path, "kdump")
    assert "utsname" in exported.remarks[-1]


def test_kdump_of_a_domain_that_goes_meanwhile_raises_host_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HostError("no such domain", op="map", errno=errno.ESRCH)

    monkeypatch.setattr("xenpv.memory.domain.DomainMemory.read_virtual", refuse)
    with pytest.raises(HostError):
        export_domain(made_domain(), tmp_path, "kdump")


def test_kdump_larger_than_a_batch_keeps_the_order(tmp_path: Path) -> None:
    """Runs in the order of their pfns, though several threads pack them; those of zeros are there once."""
    domain = pv_domain(pfns=range(3000))
    for pfn in domain.places.data[100:1500]:
        domain.pages[pfn][:] = bytes(PAGE)
    out, _ = export_domain(domain, tmp_path, "kdump")
    read = Kdump(out.read_bytes())
    assert {pfn: page for pfn, page in read.pages() if pfn < 3000} == there(domain)
    assert out.stat().st_size < 1700 * PAGE + (1 << 20)


def test_kdump_opens_in_drgn(tmp_path: Path) -> None:
    domain = made_domain()
    out, _ = export_domain(domain, tmp_path, "kdump")
    prog = drgn.Program()
    prog.set_core_dump(out)
    for pfn, content in domain.pages.items():
        assert prog.read(pfn * PAGE, PAGE, physical=True) == bytes(content)
    assert prog.read(domain.vaddrs[7], 16) == bytes(domain.pages[7][:16])


def test_kdump_with_a_far_pfn_has_holes_in_bitmaps(tmp_path: Path) -> None:
    far = 1 << 26
    domain = pv_domain(pfns=[*range(64), far], linear=False, tree=True)
    out, exported = export_domain(domain, tmp_path, "kdump")
    assert exported.bytes > 2 * far // 8
    assert out.stat().st_blocks * 512 < exported.bytes // 8


# --- pages of zeros that were sent without content -------------------------------------------------------------------


@pytest.fixture
def with_blanks(domain: Domain) -> Domain:
    """As `convert --drop-zero` writes it: some pages have no content, and are the domain's all the same."""
    for pfn in domain.places.data[2:8]:
        del domain.pages[pfn]
        domain.types[pfn] = XALLOC
    return domain


def test_pages_sent_without_content_are_zeros_in_each_format(with_blanks: Domain, tmp_path: Path) -> None:
    blanks = with_blanks.places.data[2:8]
    expected = there(with_blanks) | dict.fromkeys(blanks, bytes(PAGE))
    out, exported = export_domain(with_blanks, tmp_path, "lime")
    assert (exported.pages, exported.lost) == (len(expected), 0)
    assert parse_lime(out.read_bytes()) == expected
    out, _ = export_domain(with_blanks, tmp_path, "kdump")
    assert dict(Kdump(out.read_bytes()).pages()).items() >= expected.items()
    out, _ = export_domain(with_blanks, tmp_path, "raw")
    with out.open("rb") as file:
        raw = file.read(HOLE * PAGE)  # a page lies far beyond
    assert all(raw[pfn * PAGE : (pfn + 1) * PAGE] == content for pfn, content in expected.items() if pfn < HOLE)
    out, _ = export_domain(with_blanks, tmp_path, "elf")
    with out.open("rb") as file:
        loads = [s.header for s in parse_elf(file).iter_segments("PT_LOAD")]
    assert all(any(s.p_paddr <= pfn * PAGE < s.p_paddr + s.p_memsz for s in loads) for pfn in blanks)


def test_dumpcore_with_pages_sent_without_content_walks_as_the_save_file(with_blanks: Domain, tmp_path: Path) -> None:
    """They were lost: their entries became 0x1ffffffffff, and tables that name them were no tables any more."""
    out, _ = export_domain(with_blanks, tmp_path, "dumpcore")
    with open_made(with_blanks, tmp_path) as saved, open_domain(str(out)) as core:
        for pfn, vaddr in with_blanks.vaddrs.items():
            here, there_ = (domain.memory.walk(vaddr) for domain in (saved, core))
            assert (here.pfn, there_.pfn) == (pfn, pfn) or here.pfn is None
            assert [step.table for step in here.steps] == [step.table for step in there_.steps]
        for pfn in with_blanks.places.data[2:8]:
            assert core.memory.page(pfn) == saved.memory.page(pfn) == bytes(PAGE)
        tables = np.array([pfn for pfn in with_blanks.pages if with_blanks.types[pfn] & 7], np.uint64)
        assert (core.frames.types(tables) & 7).tolist() == (saved.frames.types(tables) & 7).tolist()


def test_export_of_a_domain_of_blank_pages_reads_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """build -o of 640 GiB has some hundred pages with content; the others cost a look at their runs."""
    domain = pv_domain(pfns=range(64), ballooned=[1 << 16])
    domain.types.update(dict.fromkeys(range(64, 1 << 16), XALLOC))
    read, pages = list[int](), FilePages.pages

    def counted(self: FilePages, pfns: U64) -> U8:
        read.append(len(pfns))
        return pages(self, pfns)

    monkeypatch.setattr(FilePages, "pages", counted)
    out, exported = export_domain(domain, tmp_path, "lime")
    assert exported.pages == 1 << 16
    assert out.stat().st_blocks * 512 < 1 << 20
    assert sum(read) < 1 << 12


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", list(FORMATS))
def test_export_without_pages_writes_no_file(form: str, tmp_path: Path) -> None:
    path = tmp_path / "none.save"
    path.write_bytes(bytes(made_domain().to_stream().drop("PAGE_DATA")))
    with open_domain(str(path), on_breach=lambda *_: None) as opened, pytest.raises(RequestError) as e:
        export(opened, str(tmp_path / "out"), form)
    assert (e.value.needed, e.value.available) == (1, 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", list(FORMATS))
def test_export_of_the_last_pfn_writes_it_or_no_file(form: str, tmp_path: Path) -> None:
    """A damaged stream can name any pfn below 2^52: its address fits LiME, ELF and no offset of a file."""
    last, content, wire = (1 << 52) - 1, b"far" * 1365 + b"!", Wire()
    stream, path = made_domain().to_stream(), tmp_path / "far.save"
    stream.before("X86_TSC_INFO", wire.page_data([(last, 0)], [content]))
    path.write_bytes(bytes(stream))
    out = tmp_path / "out"
    with open_domain(str(path), on_breach=lambda *_: None) as opened:
        if form in {"raw", "kdump"}:
            with pytest.raises(RequestError) as e:
                export(opened, str(out), form)
            assert e.value.needed == last + 1 or form == "kdump"
            assert not out.exists()
        else:
            assert export(opened, str(out), form).last_pfn == last
            assert out.read_bytes().count(content) == 1


@pytest.mark.parametrize("form", ["elf", "lime", "raw", "dumpcore"])
def test_export_to_a_fifo_equals_the_file(form: str, tmp_path: Path) -> None:
    """What has no holes gets zeros."""
    domain = pv_domain(pfns=[*range(64), 70])
    out, _ = export_domain(domain, tmp_path, form)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    got = bytearray()
    reading = threading.Thread(target=lambda: got.extend(fifo.read_bytes()))
    reading.start()
    with open_made(domain, tmp_path) as opened:
        export(opened, str(fifo), form)
    reading.join(10)
    assert bytes(got) == out.read_bytes()
