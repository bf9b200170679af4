"""The page: it loads nothing, and hostile text of a guest stays text."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.support.kernel_guest import Guest
from tests.support.report_facts import HOSTILE, hostile_facts
from tests.support.writers.build import pv_domain
from xenpv.errors import HostError, RequestError
from xenpv.report.gather import gather_facts
from xenpv.report.identity import find_notable_pages
from xenpv.report.page import render_page
from xenpv.source.open import open_domain


class Read(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and the text of some."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_render_page_escapes_hostile_text(tmp_path: Path) -> None:
    text = render_page(hostile_facts(tmp_path))
    read = Read(text)
    assert len(read.all("script")) == 2
    assert read.all("img") == []
    assert "49" not in read.texts["h1"][0]
    for tag, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert "style" not in attributes, tag  # which the policy refuses
    shown = HOSTILE.replace("\u202e", "?").replace("\x1b", "?")
    assert "".join(read.texts["h1"]) == shown
    assert "".join(read.texts["title"]) == f"{shown} · xenpv report"
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f]", text)
    data = json.loads(read.texts["script"][0])
    assert data["findings"] == [{"pfn": 5, "severity": "error", "message": shown}]


def test_render_page_loads_nothing_and_allows_one_script(tmp_path: Path) -> None:
    read = Read(render_page(hostile_facts(tmp_path)))
    for tag, attributes in read.tags:
        for name in ("href", "src", "srcset", "action", "data", "poster", "background"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (tag, value)
    (policy,) = [meta["content"] for meta in read.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "script-src": f"'sha256-{_sha256(read.texts['script'][1])}'",
        "style-src": f"'sha256-{_sha256(read.texts['style'][0])}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    ours = "".join(read.texts["style"] + read.texts["script"][1:]).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"@import|url\((?!#hatch)|https?:", ours)


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_render_page_links_lead_to_sections(tmp_path: Path) -> None:
    read = Read(render_page(hostile_facts(tmp_path)))
    ids = [attributes["id"] for _, attributes in read.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    targets = {link["href"] for link in read.all("a")}
    assert targets
    assert targets <= {f"#{name}" for name in ids}


def test_render_page_of_undecodable_text_encodes(tmp_path: Path) -> None:
    facts = hostile_facts(tmp_path)
    facts.identity.name = facts.identity.config = "a\udcffb"  # as file names come in
    assert "a?b" in render_page(facts).encode().decode()
    json.dumps(facts.to_json()).encode()


def test_render_page_cuts_a_huge_configuration(tmp_path: Path) -> None:
    facts = hostile_facts(tmp_path)
    facts.identity.config = "x" * 1_000_000
    text = render_page(facts)
    assert len(text) < 400_000
    assert "it goes on for 900,000 characters" in text


@pytest.mark.parametrize("form", ["both", "none", "invalid"])
def test_gather_facts_of_a_running_domain_renders(form: str) -> None:
    guest = Guest.boot(form)
    facts = gather_facts(guest.live, None, content_pages=100)
    report = facts.to_json()
    assert report["identity"]["kind"] == "running"
    text = render_page(facts)
    if form == "both":
        pages = sum(layer["pages"] for layer in report["map"]["layers"] if layer["lane"] in {"pages", "tables"})
        assert pages == guest.host.info(guest.domid).pages
        assert [shape["error"] for shape in report["p2m"]["shapes"]] == [None, None]
        assert report["content"]["looked_at"] == 100
    else:
        assert report["p2m"]["problem"] in text.replace("&#39;", "'")


def test_gather_facts_of_a_refusing_host_raises_host_error(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest.boot("linear")

    def refuse(*_: object) -> bytes:
        raise HostError("refused", op="getvcpucontext", errno=errno.EPERM)

    monkeypatch.setattr(guest.host, "vcpu_context", refuse)
    with pytest.raises(HostError):
        gather_facts(guest.live, None, content_pages=0)
    with pytest.raises(HostError):
        find_notable_pages(guest.live)


@pytest.mark.parametrize("pfn", [0x123_4567, None], ids=["absent", "another page"])
def test_find_notable_pages_with_bad_start_info_says_so(pfn: int | None, tmp_path: Path) -> None:
    domain = pv_domain()
    pfn = domain.places.text if pfn is None else pfn
    domain.vcpus[0]["user_regs"]["rdx"] = pfn
    path = tmp_path / "made.save"
    path.write_bytes(domain.to_bytes())
    with open_domain(str(path)) as saved:
        _, start_info = find_notable_pages(saved)
    assert f"{pfn:#x}" in start_info["Start info"]


def test_render_page_without_jinja_raises_request_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = hostile_facts(tmp_path)
    modules: dict[str, Any] = {"jinja2": None}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(RequestError) as e:
        render_page(facts)
    assert isinstance(e.value.__cause__, ImportError)
    assert e.value.__cause__.name == "jinja2"
