"""xenpv report: the page's file, and what is said of files of every kind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import xenpv
from tests.support.kernel_guest import Guest
from tests.support.writers.core import core_of
from tests.support.writers.domain import Domain


def layers(told: dict[str, Any]) -> dict[str, int]:
    return {layer["what"]: layer["pages"] for layer in told["map"]["layers"]}


def test_a_page_that_only_its_owner_can_read(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("what was there before")
    ran = xenpv("report", good, "-o", out)
    assert (ran.code, ran.raw, ran.err) == (0, b"", "")
    assert out.stat().st_mode & 0o777 == 0o600
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert os.listdir(tmp_path) == ["report.html"]


def test_on_standard_output_and_out_of_a_pipe(good: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    ran = xenpv("report", "-", "-o", "-", stdin=good.read_bytes())
    assert (ran.code, ran.err) == (0, "")
    text = capfdbinary.readouterr().out.decode()
    assert text.startswith("<!DOCTYPE html>")
    assert text.rstrip().endswith("</html>")


def test_where_it_goes_must_be_said(good: Path) -> None:
    ran = xenpv("report", good)
    assert ran.code == 64
    assert "-o report.html" in ran.err


def test_nothing_is_left_of_a_page_that_could_not_be_written(good: Path, tmp_path: Path) -> None:
    ran = xenpv("report", good, "-o", tmp_path / "nowhere" / "report.html")
    assert (ran.code, ran.raw) == (1, b"")
    assert "No such file or directory" in ran.err
    ran = xenpv("report", good, "-o", "/dev/full")
    assert ran.code == 1
    assert "No space left" in ran.err
    assert os.listdir(tmp_path) == []


def test_json(good: Path, domain: Domain) -> None:
    ran = xenpv("report", good, "--json")
    assert (ran.code, ran.err) == (0, "")
    told = ran.json
    assert told["identity"]["domain_type"] == "PV"
    assert told["map"]["end"] == domain.entries
    found = layers(told)
    assert sum(found[what] for what in found if what == "ordinary pages" or "tables" in what) == len(domain.pages)
    assert found["leaves of the p2m"] == len(set(domain.p2m_pfns.tolist()))
    assert {level["level"]: level["tables"] for level in told["page_tables"]["levels"]} == {
        n: len(domain.tables(n)) for n in (1, 2, 3, 4)
    }
    assert told["p2m"]["entries"]["own"] == len(domain.pages)
    assert told["verify"]["ok"]
    (top,) = {vcpu["cr3"] for vcpu in told["vcpus"]}
    assert top == domain.places.top
    for vcpu in told["vcpus"]:
        context = domain.vcpus[vcpu["vcpu"]]
        assert vcpu["registers"]["general"]["rip"] == int(context["user_regs"]["rip"])
        assert vcpu["kernel_sp"] == int(context["kernel_sp"])
    assert {place["what"] for place in told["places"]} >= {"start info", "xenstore ring", "console ring", "GDT"}


def test_a_pipe_says_the_same_but_for_what_went_by(good: Path) -> None:
    by_name, piped = xenpv("report", good, "--json").json, xenpv("report", "-", "--json", stdin=good.read_bytes()).json
    for part in ("p2m", "page_tables", "vcpus"):
        assert piped[part] == by_name[part]
    assert piped["content"]["unread"] > 0 == by_name["content"]["unread"]


def test_findings_have_their_places_on_the_map(bad: Path, tmp_path: Path) -> None:
    told = xenpv("report", bad, "--json").json
    verified = xenpv("verify", bad, "--json").json
    assert told["verify"]["findings"] == verified["findings"]
    assert not told["verify"]["ok"]
    out = tmp_path / "bad.html"
    assert xenpv("report", bad, "-o", out).code == 0  # a page of a broken domain is what was asked for
    text = out.read_text()
    pfns = {finding["pfn"] for finding in verified["findings"] if "pfn" in finding}
    assert pfns
    for pfn in pfns:
        assert f'data-finding="{pfn}"' in text


@pytest.mark.parametrize("part", [0.05, 0.3, 0.9])
def test_of_a_file_that_was_cut_off_what_there_is(good: Path, tmp_path: Path, part: float) -> None:
    cut, out = tmp_path / "cut.save", tmp_path / "cut.html"
    data = good.read_bytes()
    cut.write_bytes(data[: int(len(data) * part)])
    ran = xenpv("report", cut, "-o", out, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert not ran.json["verify"]["ok"]
    assert "nothing after the first unreadable record was checked" in out.read_text()


def test_hvm(hvm: Path, tmp_path: Path) -> None:
    out = tmp_path / "hvm.html"
    ran = xenpv("report", hvm, "-o", out, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["identity"]["domain_type"] == "HVM"
    assert (ran.json["p2m"], ran.json["page_tables"]) == (None, None)
    assert sum(layers(ran.json).values()) == 16
    assert "HVM" in out.read_text()


def test_content_can_be_left_out_or_bounded(good: Path, domain: Domain) -> None:
    assert xenpv("report", good, "--json", "--content", "0").json["content"] is None
    some = xenpv("report", good, "--json", "--content", "40K").json["content"]
    assert (some["looked_at"], some["left_out"]) == (10, len(domain.pages) - 10)


@pytest.mark.parametrize("pause", [False, True])
def test_a_running_domain(pause: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest, out = Guest.boot("both"), tmp_path / "report.html"
    paused: list[int | None] = []
    info = guest.host.info(guest.domid)
    monkeypatch.setattr("xenpv.cli.target.open_running", lambda _target: guest.live)
    monkeypatch.setattr(guest.host, "pause", paused.append)
    monkeypatch.setattr(guest.host, "unpause", lambda _domid: paused.append(None))
    ran = xenpv("report", "litmus", "-o", out, "--json", *(["--pause"] if pause else []))
    assert (ran.code, ran.err) == (0, "")
    told = ran.json
    assert told["identity"]["kind"] == "running"
    assert told["verify"]["verdict"] == "p2m and m2p agree"
    found = layers(told)
    assert sum(found[what] for what in found if what == "ordinary pages" or "tables" in what) == info.pages
    assert paused == ([guest.domid, None] if pause else [])
    assert out.read_text().startswith("<!DOCTYPE html>")


def test_what_is_no_domain(tmp_path: Path) -> None:
    file, out = tmp_path / "text", tmp_path / "report.html"
    file.write_text("no domain " * 1000)
    for args, stdin in (((file,), None), (("-",), file.read_bytes())):
        ran = xenpv("report", *args, "-o", out, stdin=stdin)
        assert ran.code == 1
        assert ran.err.startswith("xenpv: error: ")
    assert not out.exists()
    ran = xenpv("report", file, "-o", out, "--pause")
    assert "only a running domain can be paused" in ran.err


def test_a_core_shows_what_the_save_file_shows(domain: Domain, good: Path, tmp_path: Path) -> None:
    core, out = tmp_path / "made.core", tmp_path / "core.html"
    core.write_bytes(bytes(core_of(domain)))
    ran = xenpv("report", core, "-o", out, "--json")
    assert (ran.code, ran.err) == (0, "")
    dumped, saved = ran.json, xenpv("report", good, "--json").json
    assert dumped["identity"]["kind"] == "dumped"
    assert [vcpu["cr3"] for vcpu in dumped["vcpus"]] == [vcpu["cr3"] for vcpu in saved["vcpus"]]
    for one, other in zip(dumped["page_tables"]["levels"], saved["page_tables"]["levels"], strict=True):
        assert one.pop("pinned") is None  # a core does not say
        other.pop("pinned")
        assert one == other
    for part in ("mapped", "writable", "several", "loose"):
        assert dumped["page_tables"][part] == saved["page_tables"][part]
    assert dumped["content"] == saved["content"]
    assert dumped["p2m"]["entries"] == saved["p2m"]["entries"]
    assert [shape["form"] for shape in dumped["p2m"]["shapes"]] == [shape["form"] for shape in saved["p2m"]["shapes"]]
    assert out.stat().st_mode & 0o777 == 0o600
