"""No verb replaces what it reads, or a file of another kind, by a slip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import Ran, xenpv
from tests.support.writers.build import pv_domain
from tests.support.writers.kernel import PV64, Kernel, note, quad

DOMAIN_VERBS = ("export", "report", "convert")
VERBS = (*DOMAIN_VERBS, "build", "layout")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "web.save").write_bytes(pv_domain(pfns=range(64)).to_bytes())
    (tmp_path / "kernel").write_bytes(Kernel(notes=[*PV64, note(15, quad(1 << 39))]).to_bytes())
    return tmp_path


def source_of(verb: str, folder: Path) -> Path:
    return folder / ("web.save" if verb in DOMAIN_VERBS else "kernel")


def run(verb: str, source: Path, out: Path, *options: str) -> Ran:
    match verb:
        case "export" | "convert":
            return xenpv(verb, *options, source, out)
        case "report":
            return xenpv(verb, *options, source, "-o", out)
        case _:
            return xenpv(verb, *options, source, "--memory", "16M", "-o", out)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("alias", ["itself", "symlink", "hard link"])
@pytest.mark.parametrize("verb", VERBS)
def test_verb_whose_output_is_its_input_keeps_the_input(verb: str, alias: str, force: bool, folder: Path) -> None:
    source = source_of(verb, folder)
    content = source.read_bytes()
    out = source if alias == "itself" else folder / "alias"
    if alias == "symlink":
        out.symlink_to(source)
    elif alias == "hard link":
        out.hardlink_to(source)
    ran = run(verb, source, out, *(["--force"] if force else []))
    assert ran.code == 1
    assert str(out) in ran.err
    assert source.read_bytes() == content


@pytest.mark.parametrize("verb", VERBS)
def test_verb_replaces_a_file_of_another_kind_only_by_force(verb: str, folder: Path) -> None:
    source, out = source_of(verb, folder), folder / "out"
    other = folder / ("kernel" if verb in DOMAIN_VERBS else "web.save")
    content = other.read_bytes() if verb != "build" else b"a letter"
    out.write_bytes(content)
    ran = run(verb, source, out)
    assert ran.code == 1
    assert "--force" in ran.err
    assert out.read_bytes() == content
    assert run(verb, source, out, "--force").code == 0
    assert out.read_bytes() != content
    assert run(verb, source, out).code == 0, "a file of the verb's own kind is replaced"


def test_verb_with_the_input_on_standard_input_keeps_it(folder: Path) -> None:
    """``xenpv convert - web.save < web.save``: the name says nothing, the file is the same."""
    source = folder / "web.save"
    content = source.read_bytes()
    command = [sys.executable, "-m", "xenpv", "convert", "-", str(source)]
    with source.open("rb") as file:
        process = subprocess.run(command, stdin=file, capture_output=True, check=False)
    assert process.returncode == 1
    assert source.read_bytes() == content
