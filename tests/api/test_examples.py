"""Every example of docs/reference/api.md gives what the page says."""

from __future__ import annotations

import doctest
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import xenpv
from tests.support.migration import Move
from tests.support.writers.build import pv_domain
from tests.support.writers.kernel import Kernel
from tests.support.writers.legacy import Legacy, in_xl, pv_stream
from tests.support.writers.vmcoreinfo import RELEASE, UTS_OFFSET, text
from xenpv.migrate.receiver import receive_domain
from xenpv.migrate.transport import accept, listening

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "api.md"
EXAMPLE = re.compile(r"^```pycon\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BANNER = b"Linux version " + RELEASE + b" (builder@example) (gcc) #1 SMP\n"
VMCOREINFO_PFN, UTS_PFN, CHANGED_PFN, CUT = 2, 5, 20, 0x20020


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the page names, in the current folder."""
    monkeypatch.chdir(tmp_path)
    domain = pv_domain()
    at = domain.places
    names = b"".join(part.ljust(65, b"\0") for part in (b"Linux", b"web", RELEASE))
    domain.pages[UTS_PFN][UTS_OFFSET : UTS_OFFSET + len(names)] = names
    domain.pages[VMCOREINFO_PFN][:] = text(domain.vaddrs[UTS_PFN], top=domain.vaddrs[at.top]).ljust(4096, b"\0")
    domain.pages[3][-8:], domain.pages[4][: len(BANNER) - 8] = BANNER[:8], BANNER[8:]
    whole = domain.to_bytes()
    Path("web.save").write_bytes(whole)
    Path("broken.save").write_bytes(whole[:CUT])
    Path("old.save").write_bytes(bytes(in_xl(pv_stream(domain, Legacy()))))
    domain.pages[CHANGED_PFN][100] ^= 1
    Path("changed.save").write_bytes(domain.to_bytes())
    Path("vmlinuz").write_bytes(Kernel().to_bytes())


@pytest.fixture
def move() -> Iterator[Move]:
    """A running domain named web, and a receiver at unix:receiver."""
    move = Move.ready(name="web")

    def run_guest() -> None:
        if move.suspended and not move.source.info(move.guest.domid).shutdown:
            move.guest.do("resume")  # it was saved and runs on
            move.suspended = False
        move.live()

    move.source.set_time_slice(move.guest.domid, run_guest)
    with listening("unix:receiver") as listener:

        def receive() -> None:
            with accept(listener, "unix:receiver") as link:
                receive_domain(move.target, link)

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        yield move
        thread.join(60)
    assert not thread.is_alive()


def test_api_page_examples_print_what_it_shows(files: None, move: Move) -> None:
    page = PAGE.read_text(encoding="utf-8")
    examples = doctest.DocTestParser().get_doctest(
        "\n".join(match[1] for match in EXAMPLE.finditer(page)),
        {"host": move.source, "other_host": move.target},
        PAGE.name,
        str(PAGE),
        0,
    )
    report: list[str] = []
    results = doctest.DocTestRunner().run(examples, out=report.append)
    assert results.attempted > 40
    assert not results.failed, "".join(report)


def test_api_page_names_the_whole_api() -> None:
    page = PAGE.read_text(encoding="utf-8")
    code = "\n".join(match[1] for match in EXAMPLE.finditer(page))
    assert [name for name in xenpv.__all__ if not re.search(rf"\bxenpv\.{name}\b", code)] == []
