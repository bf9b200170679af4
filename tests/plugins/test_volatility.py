"""The layer for Volatility 3: it reads what we read, has no address that has no page, and takes no file that is none.

What Volatility makes of a real kernel is in tests/lab/test_plugins.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from volatility3.framework import contexts, exceptions
from volatility3.framework.layers import intel, physical, scanners

import xenpv.plugins.volatility
from tests.support.vectors import unpack_vector
from tests.support.writers.build import USER_VADDR, pattern, pv_domain
from tests.support.writers.core import core_of, hvm_core
from tests.support.writers.domain import Domain
from tests.support.writers.hvm import hvm_stream
from tests.vectors.make import RECIPES
from xenpv.errors import GuestError, RequestError
from xenpv.plugins.volatility.domain_layer import DomainLayer, DomainStacker
from xenpv.source.open import open_domain

PAGE = 4096
HOLE = 80
RUNS = [range(HOLE), range(HOLE + 1, 97), range(0x1_0000, 0x1_0002)]


_MADE: list[contexts.Context] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    for context in _MADE:
        for name in context.layers:
            context.layers[name].destroy()
    _MADE.clear()


def stacked(path: Path) -> tuple[contexts.Context, DomainLayer | None]:
    """What Volatility does with a file."""
    context = contexts.Context()
    _MADE.append(context)
    context.config["file.location"] = path.as_uri()
    context.add_layer(physical.FileLayer(context, "file", "file"))
    layer = DomainStacker.stack(context, "file")
    if layer is not None:
        context.add_layer(layer)
    return context, layer


def open_layer(path: Path) -> DomainLayer:
    layer = stacked(path)[1]
    assert layer is not None
    return layer


@pytest.fixture(scope="module")
def domain() -> Domain:
    """Its pages are of many types, and in three runs."""
    return pv_domain(pfns=[pfn for run in RUNS for pfn in run], vcpus=2)


@pytest.fixture(scope="module")
def save(domain: Domain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("volatility") / "made.save"
    path.write_bytes(domain.to_bytes(batch=16))
    return path


@pytest.fixture(scope="module", params=["save", "core"])
def path(request: pytest.FixtureRequest, domain: Domain, save: Path) -> Path:
    if request.param == "save":
        return save
    save.with_suffix(".core").write_bytes(bytes(core_of(domain)))
    return save.with_suffix(".core")


@pytest.fixture
def layer(path: Path) -> DomainLayer:
    return open_layer(path)


# --- content and addresses -------------------------------------------------------------------------------------------


def test_layer_has_each_page_of_the_domain(domain: Domain, layer: DomainLayer) -> None:
    for pfn, content in domain.pages.items():
        assert layer.read(pfn * PAGE, PAGE) == bytes(content)
        assert layer.read(pfn * PAGE + 9, 7) == bytes(content[9:16])
        assert layer.is_valid(pfn * PAGE, PAGE)


def test_layer_reads_across_pages(domain: Domain, layer: DomainLayer) -> None:
    whole = b"".join(bytes(domain.pages[pfn]) for pfn in RUNS[0])
    for at, length in ((0, len(whole)), (4095, 2), (100, 3 * PAGE), (5, 0), (len(whole) - 1, 1)):
        assert layer.read(at, length) == layer.read(at, length, pad=True) == whole[at : at + length]


def test_layer_joins_runs_of_different_types(layer: DomainLayer) -> None:
    assert list(zip(layer._run_starts, layer._run_ends, strict=True)) == [(r.start * PAGE, r.stop * PAGE) for r in RUNS]
    assert (layer.minimum_address, layer.maximum_address) == (0, RUNS[-1].stop * PAGE - 1)


@pytest.mark.parametrize(
    ("address", "length", "invalid"),
    [
        (HOLE * PAGE, 1, HOLE * PAGE),
        (HOLE * PAGE - 1, 2, HOLE * PAGE),
        (HOLE * PAGE + 5, 1, HOLE * PAGE + 5),
        (0, 97 * PAGE, HOLE * PAGE),
        (1 << 60, 8, 1 << 60),
        (97 * PAGE, 1 << 50, 97 * PAGE),
    ],
)
def test_layer_read_of_an_absent_address_raises(layer: DomainLayer, address: int, length: int, invalid: int) -> None:
    assert not layer.is_valid(address, length)
    with pytest.raises(exceptions.InvalidAddressException) as e:
        layer.read(address, length)
    assert e.value.invalid_address == invalid


def test_layer_read_with_pad_fills_absent_pages_only(domain: Domain, layer: DomainLayer) -> None:
    around = layer.read((HOLE - 1) * PAGE + 8, 3 * PAGE, pad=True)
    expected = (
        bytes(domain.pages[HOLE - 1]) + bytes(PAGE) + bytes(domain.pages[HOLE + 1]) + bytes(domain.pages[HOLE + 2])
    )
    assert around == expected[8 : 8 + 3 * PAGE]
    assert layer.read(1 << 50, 16, pad=True) == bytes(16)


def test_layer_translates_by_volatilitys_own_walk(domain: Domain, path: Path) -> None:
    context, layer = stacked(path)
    assert layer is not None
    context.config["intel.memory_layer"] = layer.name
    context.config["intel.page_map_offset"] = domain.places.top * PAGE
    virtual = intel.Intel32e(context, "intel", "virtual")
    mask = (1 << 48) - 1
    for pfn, vaddr in domain.vaddrs.items():
        assert virtual.read(vaddr & mask, PAGE) == bytes(domain.pages[pfn])
    assert virtual.read(USER_VADDR, 64) == bytes(domain.pages[domain.places.user][:64])
    assert not virtual.is_valid(max(domain.vaddrs.values()) + PAGE & mask)


def test_layer_scan_finds_matches_once_and_none_across_a_hole(tmp_path: Path) -> None:
    domain = pv_domain(pfns=[pfn for run in RUNS for pfn in run])
    needle = b"needle of 16 b.."
    data = [pfn for pfn in domain.places.data if pfn + 1 in domain.places.data]
    inside, across = data[0], data[3]
    domain.pages[inside][100:116] = needle
    domain.pages[across][-8:], domain.pages[across + 1][:8] = needle[:8], needle[8:]
    domain.pages[HOLE - 1][-8:], domain.pages[HOLE + 1][:8] = needle[:8], needle[8:]
    domain.pages[RUNS[-1][-1]][-17:-1] = needle
    path = tmp_path / "needles.save"
    path.write_bytes(domain.to_bytes())
    context, layer = stacked(path)
    assert layer is not None
    expected = [inside * PAGE + 100, (across + 1) * PAGE - 8, RUNS[-1].stop * PAGE - 17]
    for size in (PAGE, 3 * PAGE, 1 << 24):
        scanner = scanners.BytesScanner(needle)
        scanner.chunk_size, scanner.overlap = size, 64
        assert sorted(layer.scan(context, scanner)) == expected


def test_layer_clone_reads_the_same(domain: Domain, path: Path) -> None:
    """Volatility clones what it tries, and destroys either."""
    context, layer = stacked(path)
    assert layer is not None
    _MADE.append(context.clone())
    other = _MADE[-1].layers[layer.name]
    assert other is not layer
    layer.destroy()
    assert other.read(0, PAGE) == bytes(domain.pages[0])


def test_layer_is_rebuilt_from_its_requirements(path: Path, layer: DomainLayer) -> None:
    context = contexts.Context()
    for key, value in layer.build_configuration().items():
        context.config[f"again.{key}"] = value
    context.add_layer(DomainLayer(context, "again", "again"))
    _MADE.append(context)
    assert context.layers["again"].read(5, 5000) == layer.read(5, 5000)


def test_layer_refuses_writes(path: Path, layer: DomainLayer) -> None:
    before = path.read_bytes()
    with pytest.raises(exceptions.LayerException) as e:
        layer.write(0, b"x")
    assert (type(e.value), e.value.layer_name, e.value.__cause__) == (exceptions.LayerException, layer.name, None)
    assert path.read_bytes() == before


def test_layer_of_an_hvm_domain_reads_its_memory(tmp_path: Path) -> None:
    pages = {pfn: bytes(pattern(pfn)) for pfn in (*range(16), 0x10_0000)}
    core, save = tmp_path / "hvm.core", tmp_path / "hvm.save"
    core.write_bytes(bytes(hvm_core(pages, [])))
    save.write_bytes(bytes(hvm_stream(pages=17)))
    for path in (core, save):
        layer = open_layer(path)
        assert layer.read(0, 16 * PAGE) == b"".join(pages[pfn] for pfn in range(16))
        assert layer.is_valid(16 * PAGE) == (path is save), "sent without content, so a page of zeros"
    assert open_layer(save).read(16 * PAGE, PAGE) == bytes(PAGE)
    assert open_layer(core).read(0x10_0000 * PAGE, PAGE) == pages[0x10_0000]


def test_layer_of_a_real_guest_reads_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "vector.save"
    for recipe in RECIPES:
        path.write_bytes(unpack_vector(recipe))
        layer = open_layer(path)
        runs = list(zip(layer._run_starts, layer._run_ends, strict=True))
        assert sum(end - start for start, end in runs) == recipe.memory << 20
        with open_domain(str(path)) as saved:
            for start, end in runs:
                length = min(end - start, 1 << 20)
                assert layer.read(start, length) == saved.memory.read(start, length)


# --- files that are none, or damaged ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\x7fELF" + bytes(100), bytes(1 << 16), b"LiME" + bytes(60), b"Xen saved domains\n" * 4]
)
def test_stacker_ignores_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    assert stacked(path)[1] is None


def test_stacker_ignores_layers_that_are_no_files(path: Path) -> None:
    context, layer = stacked(path)
    assert layer is not None
    assert DomainStacker.stack(context, layer.name) is None


def test_layer_of_a_cut_file_reads_what_is_there(
    domain: Domain, save: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, cut = save.read_bytes(), tmp_path / "cut.save"
    at = whole.index(bytes(domain.pages[40])) + PAGE
    cut.write_bytes(whole[: at + 100])
    layer = open_layer(cut)
    assert layer.read(40 * PAGE, PAGE) == bytes(domain.pages[40])
    assert f"{at + 100:#x}" in caplog.text
    last = int(layer._run_ends[-1]) // PAGE - 1
    assert layer.read(last * PAGE, PAGE) == bytes(domain.pages[last])


def test_stacker_ignores_a_file_without_pages_with_a_warning(
    save: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut = tmp_path / "cut.save"
    cut.write_bytes(save.read_bytes()[:100])
    assert stacked(cut)[1] is None
    logger = "xenpv.plugins.volatility.domain_layer"
    assert [record.name for record in caplog.records if record.levelname == "WARNING"] == [logger]
    context = contexts.Context()
    context.config["direct.location"] = cut.as_uri()
    with pytest.raises(exceptions.LayerException) as e:
        DomainLayer(context, "direct", "direct")
    assert type(e.value.__cause__) is GuestError
    context.config["direct.location"] = (tmp_path / "nowhere").as_uri()
    with pytest.raises(exceptions.LayerException) as e:
        DomainLayer(context, "direct", "direct")
    assert type(e.value.__cause__) is RequestError


def test_layer_of_a_damaged_file_raises_volatilitys_errors(path: Path, tmp_path: Path) -> None:
    """Cut anywhere, or with junk anywhere: a layer whose valid addresses can be read, or none."""
    whole, broken, chance = path.read_bytes(), tmp_path / "broken.save", random.Random(7)
    for turn in range(60):
        content = bytearray(whole)
        if turn % 2:
            del content[chance.randrange(len(content)) :]
        else:
            # Where the headers are: pages are most of the rest.
            at = chance.randrange(0, 2000 if turn % 4 else len(content) - 8)
            content[at : at + 8] = chance.randbytes(8)
        broken.write_bytes(content)
        layer = stacked(broken)[1]
        if layer is None:
            continue
        for start, end in zip(layer._run_starts, layer._run_ends, strict=True):
            try:
                assert len(layer.read(start, min(end - start, 1 << 16))) == min(end - start, 1 << 16)
            except exceptions.InvalidAddressException:
                assert len(layer.read(start, 64, pad=True)) == 64


def test_volatility_imports_only_the_layer() -> None:
    """It takes every file of a plug-in folder whose name does not begin with two underscores."""
    [folder] = xenpv.plugins.volatility.__path__
    modules: list[Any] = [file.name for file in Path(folder).glob("*.py") if not file.name.startswith("__")]
    assert modules == ["domain_layer.py"]
