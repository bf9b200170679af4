"""``xenpv report``: the HTML file and the JSON, for every kind of domain."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import xenpv
from tests.support.kernel_guest import Guest
from tests.support.writers.core import core_of
from tests.support.writers.domain import Domain


def layers(facts: dict[str, Any]) -> dict[str, int]:
    return {layer["what"]: layer["pages"] for layer in facts["map"]["layers"]}


def test_report_replaces_the_file_and_only_its_owner_can_read_it(good: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("<!DOCTYPE html>the report of last week")
    ran = xenpv("report", good, "-o", out)
    assert (ran.code, ran.raw, ran.err) == (0, b"", "")
    assert out.stat().st_mode & 0o777 == 0o600
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert os.listdir(tmp_path) == ["report.html"]


def test_report_from_a_pipe_to_standard_output(good: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    ran = xenpv("report", "-", "-o", "-", stdin=good.read_bytes())
    assert (ran.code, ran.err) == (0, "")
    text = capfdbinary.readouterr().out.decode()
    assert text.startswith("<!DOCTYPE html>")
    assert text.rstrip().endswith("</html>")


def test_report_without_output_is_wrong_usage(good: Path) -> None:
    assert "-o report.html" in xenpv("report", good).usage_error


def test_report_that_cannot_be_written_leaves_no_file(good: Path, tmp_path: Path) -> None:
    assert os.strerror(errno.ENOENT) in xenpv("report", good, "-o", tmp_path / "nowhere" / "report.html").error
    assert os.strerror(errno.ENOSPC) in xenpv("report", good, "-o", "/dev/full").error
    assert os.listdir(tmp_path) == []


def test_report_json_has_every_figure(good: Path, domain: Domain) -> None:
    ran = xenpv("report", good, "--json")
    assert (ran.code, ran.err) == (0, "")
    facts = ran.json
    assert facts["identity"]["domain_type"] == "PV"
    assert facts["map"]["end"] == domain.entries
    found = layers(facts)
    assert sum(found[what] for what in found if what == "ordinary pages" or "tables" in what) == len(domain.pages)
    assert found["leaves of the p2m"] == len(set(domain.p2m_pfns.tolist()))
    assert {level["level"]: level["tables"] for level in facts["page_tables"]["levels"]} == {
        n: len(domain.tables(n)) for n in (1, 2, 3, 4)
    }
    assert facts["p2m"]["entries"]["own"] == len(domain.pages)
    assert facts["verify"]["ok"]
    (top,) = {vcpu["cr3"] for vcpu in facts["vcpus"]}
    assert top == domain.places.top
    for vcpu in facts["vcpus"]:
        context = domain.vcpus[vcpu["vcpu"]]
        assert vcpu["registers"]["general"]["rip"] == int(context["user_regs"]["rip"])
        assert {"gs_base", "other_gs_base"} <= vcpu["registers"].keys()
        assert vcpu["kernel_sp"] == int(context["kernel_sp"])
    assert {place["what"] for place in facts["places"]} >= {"start info", "xenstore ring", "console ring", "GDT"}


def test_report_of_a_pipe_equals_that_of_the_file_but_for_content(good: Path) -> None:
    of_file, of_pipe = (
        xenpv("report", good, "--json").json,
        xenpv("report", "-", "--json", stdin=good.read_bytes()).json,
    )
    for part in ("p2m", "page_tables", "vcpus"):
        assert of_pipe[part] == of_file[part]
    assert of_pipe["content"]["unread"] > 0 == of_file["content"]["unread"]


def test_report_links_each_finding_to_its_pfn_on_the_map(bad: Path, tmp_path: Path) -> None:
    facts = xenpv("report", bad, "--json").json
    verified = xenpv("verify", bad, "--json").json
    assert facts["verify"]["findings"] == verified["findings"]
    assert not facts["verify"]["ok"]
    out = tmp_path / "bad.html"
    assert xenpv("report", bad, "-o", out).code == 0  # a report about a broken domain is a success
    text = out.read_text()
    pfns = {finding["pfn"] for finding in verified["findings"] if "pfn" in finding}
    assert pfns
    for pfn in pfns:
        assert f'data-finding="{pfn}"' in text


@pytest.mark.parametrize("part", [0.05, 0.3, 0.9], ids=["5%", "30%", "90%"])
def test_report_of_a_cut_file_covers_its_readable_part(good: Path, tmp_path: Path, part: float) -> None:
    cut, out = tmp_path / "cut.save", tmp_path / "cut.html"
    data = good.read_bytes()
    cut.write_bytes(data[: int(len(data) * part)])
    ran = xenpv("report", cut, "-o", out, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert not ran.json["verify"]["ok"]
    assert "nothing after the first unreadable record was checked" in out.read_text()


def test_report_hvm_has_no_p2m_and_no_page_tables(hvm: Path, tmp_path: Path) -> None:
    out = tmp_path / "hvm.html"
    ran = xenpv("report", hvm, "-o", out, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["identity"]["domain_type"] == "HVM"
    assert (ran.json["p2m"], ran.json["page_tables"]) == (None, None)
    assert sum(layers(ran.json).values()) == 16
    assert "HVM" in out.read_text()


def test_report_content_option_bounds_the_pages_read(good: Path, domain: Domain) -> None:
    assert xenpv("report", good, "--json", "--content", "0").json["content"] is None
    content = xenpv("report", good, "--json", "--content", "40K").json["content"]
    assert (content["looked_at"], content["left_out"]) == (10, len(domain.pages) - 10)


@pytest.mark.parametrize("pause", [False, True], ids=["running", "paused"])
def test_report_of_a_running_domain(pause: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest, out = Guest.boot("both"), tmp_path / "report.html"
    paused: list[int | None] = []
    info = guest.host.info(guest.domid)
    monkeypatch.setattr("xenpv.source.open.open_running", lambda _target: guest.live)
    monkeypatch.setattr(guest.host, "pause", paused.append)
    monkeypatch.setattr(guest.host, "unpause", lambda _domid: paused.append(None))
    ran = xenpv("report", "litmus", "-o", out, "--json", *(["--pause"] if pause else []))
    assert (ran.code, ran.err) == (0, "")
    facts = ran.json
    assert facts["identity"]["kind"] == "running"
    assert facts["verify"]["ok"]
    found = layers(facts)
    assert sum(found[what] for what in found if what == "ordinary pages" or "tables" in what) == info.pages
    assert paused == ([guest.domid, None] if pause else [])
    assert out.read_text().startswith("<!DOCTYPE html>")


def test_report_of_no_domain_fails_and_leaves_no_file(tmp_path: Path) -> None:
    file, out = tmp_path / "text", tmp_path / "report.html"
    file.write_text("no domain " * 1000)
    for args, stdin in (((file,), None), (("-",), file.read_bytes())):
        assert xenpv("report", *args, "-o", out, stdin=stdin).error
    assert not out.exists()
    assert "pause" in xenpv("report", file, "-o", out, "--pause").error


def test_report_of_a_core_equals_that_of_the_save_file(domain: Domain, good: Path, tmp_path: Path) -> None:
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
