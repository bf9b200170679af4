"""The page in a real browser, headless: it renders, no script fails, nothing is asked for, and clicks do what they say.

Where there is no browser (make lab-deps installs one) it is skipped; in CI that is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support import browser
from tests.support.browser import Page
from tests.support.report_facts import hostile_facts
from tests.support.requirements import cannot_run
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from xenpv.findings import Findings
from xenpv.report.gather import CheckResult, gather_facts
from xenpv.report.page import render_page
from xenpv.source.saved import SavedDomain
from xenpv.verify.stream import verify_domain

pytestmark = pytest.mark.browser

Show = Callable[..., Page]
Broken = tuple[Domain, str]
END = 1 << 32  # pfns: 16 TiB
SEEN = "document.querySelector('#chart svg').getBoundingClientRect()"
CHOSEN = "document.querySelector('#place b')?.textContent ?? null"
HITS = "[...document.querySelectorAll('.finding.hit')].map(row => Number(row.dataset.finding))"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if browser.find() is None:
        cannot_run("chromium is not installed; `make lab-deps` installs it")
    with browser.opened(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Broken:
    """A domain with a few errors in its tables, and two pages at the end of 16 TiB; and its page."""
    domain = pv_domain(pfns=[*range(3000), END - 3, END - 2], vcpus=2)
    for table in domain.tables(1)[:3]:
        domain.table(table)[400:402] = domain.entries << 12 | 1
    save = tmp_path_factory.mktemp("broken") / "made.save"
    save.write_bytes(domain.to_bytes())
    findings = Findings()
    with SavedDomain.open(str(save), on_breach=findings.add_breach) as saved:
        report = verify_domain(saved, findings)
        facts = gather_facts(saved, CheckResult("so it is", report.ok, findings), content_pages=1 << 20)
    return domain, render_page(facts)


@pytest.fixture
def shown(tab: Page, tmp_path: Path) -> Iterator[Show]:
    """Shows a domain; behind each test, nothing has gone wrong in the browser and it has asked for nothing."""
    file = tmp_path / "page.html"

    def show(text: str, **settings: Any) -> Page:
        tab.forget()
        file.write_text(text)
        tab.look(**settings)
        tab.open(file)
        return tab

    yield show
    assert tab.errors == []
    assert tab.asked_for == {file.resolve().as_uri()}


def view(page: Page) -> tuple[float, float]:
    """Which part of the line is seen, from 0 to 1."""
    window = page.ask("(() => { const w = document.querySelector('#chart .window'), s = " + SEEN + ";"
                     "return [w.x.baseVal.value / s.width, w.width.baseVal.value / s.width]; })()")  # fmt: skip
    return window[0], window[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_page_at_any_size_renders_without_errors(shown: Show, broken: Broken, width: int, scheme: str) -> None:
    page = shown(broken[1], width=width, scheme=scheme)
    assert page.ask("document.documentElement.scrollWidth") <= width
    drawn = page.ask(f"{SEEN}.width")
    assert width * 0.85 < drawn <= width
    lanes = page.ask("[...document.querySelectorAll('#chart .lane')].map(lane => lane.textContent)")
    assert lanes == ["Findings", "Parts to play", "Memory", "Page tables", "p2m", "Zero and duplicate"]
    assert page.ask("document.querySelectorAll('#chart path[class^=k-][d^=M]').length") >= 8
    assert page.ask("document.querySelector('.drawing').getBoundingClientRect().height") > 100
    paper = [int(n) for n in page.ask("getComputedStyle(document.body).backgroundColor")[4:-1].split(",")]
    ink = [int(n) for n in page.ask("getComputedStyle(document.body).color")[4:-1].split(",")]
    assert (sum(paper) > 700) == (scheme == "light")
    assert abs(sum(paper) - sum(ink)) > 400


def test_map_of_16_tib_draws_far_pages_and_names_the_gap(shown: Show, broken: Broken) -> None:
    page = shown(broken[1])
    boxes = page.ask("(() => { const b = [...document.querySelectorAll('#chart path.k-data')].at(-1).getBBox();"
                     "return [b.x, b.x + b.width, chart.clientWidth]; })()")  # fmt: skip
    assert boxes[0] < 5
    assert boxes[1] > boxes[2] - 5
    assert "16.0 TiB" in page.ask("[...document.querySelectorAll('#chart .break')].map(b => b.textContent)")


def test_finding_and_map_link_to_each_other(shown: Show, broken: Broken) -> None:
    domain, text = broken
    page = shown(text)
    table = domain.tables(1)[1]
    assert page.ask(CHOSEN) is None
    page.click(f".finding[data-finding='{table}'] .pfn")
    assert page.ask(CHOSEN) == f"pfn {table:#x}"
    assert "L1 tables" in page.ask("document.getElementById('place').textContent")
    assert set(page.ask(HITS)) == {table}
    assert view(page)[1] < 0.1
    marked = page.ask("document.querySelector('#chart .chosen').getBoundingClientRect().x")
    assert 0 < marked < 1280
    other = domain.tables(1)[2]
    page.click(f"#chart .spot[data-pfn='{other}']")
    assert page.ask(CHOSEN) == f"pfn {other:#x}"
    assert set(page.ask(HITS)) == {other}
    assert page.ask("document.querySelector('.finding.hit').getBoundingClientRect().bottom - innerHeight") < 1


def test_map_click_names_the_page(shown: Show, broken: Broken) -> None:
    page = shown(broken[1])
    page.click("#chart", at=(0.5, 0.6))
    pfn = int(page.ask(CHOSEN).removeprefix("pfn "), 16)
    assert 1300 < pfn < 1700
    assert "ordinary pages" in page.ask("document.getElementById('place').textContent")


def test_map_zooms_by_every_means(shown: Show, broken: Broken) -> None:
    page = shown(broken[1])
    assert view(page)[1] == pytest.approx(1, abs=0.01)
    page.click("#zoom-in")
    assert view(page)[1] == pytest.approx(0.5, abs=0.01)
    page.ask("chart.focus()")
    page.key("+")
    assert view(page)[1] == pytest.approx(0.25, abs=0.01)
    before = view(page)[0]
    page.drag("#chart", (0.5, 0.7), 300)
    assert view(page)[0] < before - 0.02
    page.click("#zoom-out")
    assert view(page)[1] == pytest.approx(0.5, abs=0.01)
    for _ in range(60):
        page.ask("document.getElementById('zoom-in').click()")
    page.settle()
    ticks = page.ask("[...document.querySelectorAll('#chart .tick')].map(t => parseInt(t.textContent, 16))")
    assert len(ticks) > 4
    assert {b - a for a, b in pairwise(ticks)} <= {1, 2}  # pfn by pfn
    page.click("#zoom-all")
    assert view(page)[1] == pytest.approx(1, abs=0.01)


def test_p2m_box_click_shows_its_pfns(shown: Show, broken: Broken) -> None:
    page = shown(broken[1])
    page.click(".box.list[data-pfn='512']")
    assert page.ask(CHOSEN) == "pfns 0x200 to 0x3ff"


def test_hostile_text_runs_no_script(shown: Show, tmp_path: Path) -> None:
    page = shown(render_page(hostile_facts(tmp_path)))
    assert page.ask("document.title").startswith("</title><script>alert(1)</script>")
    assert page.ask("document.querySelectorAll('script').length") == 2
    page.click("#chart .spot.error")
    assert page.ask("document.querySelector('#chart .spot.error title').textContent").startswith(
        "0x5: </title><script>"
    )


def test_foreign_script_is_refused(shown: Show, tmp_path: Path, tab: Page) -> None:
    text = render_page(hostile_facts(tmp_path))
    page = shown(text.replace("</footer>", "</footer><script>document.title = 'taken'</script>"
                              "<img src='https://192.0.2.1/x' onerror=\"document.title = 'taken'\">"))  # fmt: skip
    assert page.ask("document.title") != "taken"
    assert any("Content Security Policy" in error for error in tab.errors)
    assert not [url for url in tab.asked_for if not url.startswith("file:")]
    tab.errors.clear()


def test_script_error_is_seen_by_the_test(shown: Show, broken: Broken, tab: Page) -> None:
    page = shown(broken[1])
    page.ask("setTimeout(() => { throw new Error('broken on purpose'); })")
    page.settle()
    assert any("broken on purpose" in error for error in tab.errors)
    tab.errors.clear()


def test_page_prints_all_sections(shown: Show, broken: Broken) -> None:
    page = shown(broken[1], media="print", width=700)
    assert page.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.ask("document.documentElement.scrollWidth") <= 700
    assert page.call("Page.printToPDF")["data"]
