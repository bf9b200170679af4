"""``xenpv save`` and ``xenpv restore`` of a guest on the model host."""

from __future__ import annotations

import os
import signal
import stat
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import xenpv
from tests.support.migration import CONFIG, NAME, PAGES, Move
from tests.support.saved_files import verify_file
from xenpv.errors import HostError

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]


@pytest.fixture
def move(monkeypatch: pytest.MonkeyPatch) -> Move:
    move = Move.ready()
    monkeypatch.setattr("xenpv.host.xen.host.XenHost", lambda: nullcontext(move.source))
    return move


def on_target(move: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xenpv.host.xen.host.XenHost", lambda: nullcontext(move.target))


def test_save_then_restore_gives_the_same_domain(move: Move, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "web.save"
    ran = xenpv("save", NAME, file)
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.startswith(
        f"dom{move.guest.domid} ({NAME}): {PAGES} pages, 4.3 MiB, to {file}; it is gone from here"
    )
    assert move.is_gone_here()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["web.save"]
    assert verify_file(file).rules <= {"p2m-invalid"}
    on_target(move, monkeypatch)
    printed = xenpv("restore", "--json", file).json
    assert (printed["name"], printed["pages"], printed["running"]) == (NAME, PAGES, True)
    assert move.there() is not None


@pytest.mark.parametrize("option", ["-c", "-p"])
def test_save_with_checkpoint_or_paused_keeps_the_domain(move: Move, tmp_path: Path, option: str) -> None:
    file = tmp_path / "web.save"
    ran = xenpv("save", "--json", option, move.guest.domid, file)
    assert ran.code == 0
    assert ran.json["pages"] == PAGES
    assert ran.json["bytes"] == file.stat().st_size
    assert ran.json["seconds_down"] > 0
    if option == "-p":
        assert ran.json["now"] == "runs on here, paused"
        move.source.unpause(move.guest.domid)
    assert move.runs_here()


def test_save_to_standard_output_then_restore_from_standard_input(
    move: Move, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out"
    stdout_copy = os.dup(1)
    with file.open("wb") as out:
        os.dup2(out.fileno(), 1)
        try:
            assert xenpv("save", NAME, "-").code == 0
        finally:
            os.dup2(stdout_copy, 1)
            os.close(stdout_copy)
    on_target(move, monkeypatch)
    ran = xenpv("restore", "--name", "other", "--paused", "-", stdin=file.read_bytes())
    assert ran.code == 0
    assert ran.out.startswith("dom1 (other), 4.3 MiB, ")
    assert ran.out.endswith("xl unpause 1\n")
    (info,) = [info for info in move.target.domains() if info.domid]
    assert (info.name, info.paused) == ("other", True)


def test_save_stores_the_configuration_of_xl_or_one_of_its_own(move: Move, tmp_path: Path) -> None:
    """Without one from xl the file has what Xen and xenstore tell."""
    for config in (b"", CONFIG.replace(b'"pv"', b'"pv", "of": "xl"')):
        move.source.hypervisor.domains[move.guest.domid].config = config
        file = tmp_path / "web.save"
        assert xenpv("save", "-c", NAME, file).code == 0
        assert move.runs_here()
        printed = file.read_bytes()[:4096]
        assert (b'"of": "xl"' in printed) is bool(config)
        assert b'"max_memkb": 4400' in printed


def test_save_preflight_reports_form_and_size_and_changes_nothing(
    move: Move, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("changes something")

    for call in ("request_shutdown", "pause", "log_dirty", "destroy", "rename", "resume"):
        monkeypatch.setattr(move.source, call, never)
    ran = xenpv("save", "--preflight", NAME)
    who = f"dom{move.guest.domid} ({NAME})"
    assert ran.code == 0
    first, second = ran.out.splitlines()
    assert first.startswith(f"{who}: can be saved; ")
    assert first.endswith(f"linear virtual list, up to pfn {PAGES - 1:#x}")
    assert second.startswith(f"{PAGES} pages, 4.3 MiB; ")
    printed = xenpv("save", "--preflight", "--json", NAME).json
    assert (printed["name"], printed["pages"], printed["entries"]) == (who, PAGES, PAGES)
    monkeypatch.undo()
    monkeypatch.setattr("xenpv.host.xen.host.XenHost", lambda: nullcontext(move.source))
    assert xenpv("save", NAME, tmp_path / "x").code == 0
    assert abs(printed["bytes"] - (tmp_path / "x").stat().st_size) < 32 << 10


@pytest.mark.parametrize(
    ("node", "device"),
    [
        ("/local/domain/{}/device/vif/0/state", "vif 0"),
        ("/libxl/{}/device/pci/0/frontend", "pci 0"),
        ("/local/domain/{}/device/console/1/state", "console 1"),
        ("/local/domain/0/device-model/{}/state", "device model"),
    ],
    ids=["vif", "pci", "second console", "device model"],
)
@pytest.mark.parametrize("option", ["", "-c", "--preflight"])
def test_save_domain_with_devices_is_refused(move: Move, tmp_path: Path, node: str, device: str, option: str) -> None:
    """Its frontends would wait for ever after the restore: only libxl gives them new backends."""
    move.source.store.write(node.format(move.guest.domid), b"4")
    arguments = [NAME, option] if option == "--preflight" else [NAME, tmp_path / "web.save", option]
    ran = xenpv("save", *filter(None, arguments))
    assert ran.code == 1
    assert device in ran.err
    assert not move.suspended
    assert os.listdir(tmp_path) == []
    move.source.store.remove(node.format(move.guest.domid).rpartition("/")[0])
    assert move.runs_here()


def test_save_preflight_of_a_domain_without_a_p2m_fails(move: Move) -> None:
    move.guest.host.write_shared_info(move.guest.domid, bytes(4096 - 2048), 2048)  # the p2m's anchors are here
    ran = xenpv("save", "--preflight", NAME)
    assert (ran.code, ran.out) == (1, "")
    assert "xenpv: error: " in ran.err
    assert "p2m" in ran.err


def assert_rolled_back(move: Move, folder: Path, ran: Any, *parts: str) -> None:
    """The save failed with a message, left no file, and the guest runs."""
    assert ran.code in {1, 130}
    for part in parts:
        assert part in ran.err
    assert f"dom{move.guest.domid} ({NAME}) runs on here" in ran.err
    assert os.listdir(folder) == []
    assert move.runs_here()


def test_save_on_a_full_disk_leaves_the_guest_running(
    move: Move, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    ran = xenpv("save", NAME, tmp_path / "web.save")
    assert_rolled_back(move, tmp_path, ran, "web.save: No space left on device")


def test_save_of_a_guest_that_does_not_suspend_fails_after_the_timeout(move: Move, tmp_path: Path) -> None:
    move.source.set_time_slice(move.guest.domid, None)
    ran = xenpv("save", "--timeout", "0.05", NAME, tmp_path / "web.save")
    assert_rolled_back(move, tmp_path, ran, "did not suspend in 0.05 s")


@pytest.mark.parametrize("number", SIGNALS, ids=[number.name for number in SIGNALS])
def test_save_interrupted_by_a_signal_leaves_the_guest_running(
    move: Move, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes while the guest is suspended and the file is half written."""
    real, calls = os.writev, [0]

    def writev(fd: int, buffers: Any) -> int:
        calls[0] += 1
        if calls[0] == 5:
            assert move.source.info(move.guest.domid).shutdown
            signal.raise_signal(number)
        return real(fd, buffers)

    monkeypatch.setattr(os, "writev", writev)
    before = [signal.getsignal(number) for number in SIGNALS]
    ran = xenpv("save", NAME, tmp_path / "web.save")
    assert_rolled_back(move, tmp_path, ran, "interrupted")
    assert ran.code == 130
    assert before == [signal.getsignal(number) for number in SIGNALS]


def test_save_that_fails_and_cannot_resume_names_both_errors(
    move: Move, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    def fail(*_: Any) -> None:
        raise HostError("resume: no", op="resume")

    monkeypatch.setattr(os, "writev", full)
    monkeypatch.setattr(move.source, "resume", fail)
    ran = xenpv("save", NAME, tmp_path / "web.save")
    assert ran.code == 1
    assert "No space left on device" in ran.err
    assert f"dom{move.guest.domid} ({NAME}) could not be resumed: resume: no" in ran.err
    assert ran.err.count("could not be resumed") == 1
    assert os.listdir(tmp_path) == []


def test_save_that_cannot_destroy_the_domain_names_it_and_keeps_the_file(
    move: Move, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def destroy(_domid: int) -> None:
        raise HostError("destroy: no", op="destroy")

    monkeypatch.setattr(move.source, "destroy", destroy)
    ran = xenpv("save", NAME, tmp_path / "web.save")
    assert ran.code == 1
    assert f"web.save is complete, but dom{move.guest.domid} ({NAME}) could not be destroyed: destroy: no" in ran.err
    assert move.source.info(move.guest.domid).shutdown, "it must not run beside its copy"
    assert os.listdir(tmp_path) == ["web.save"]


@pytest.mark.parametrize("call", ["resume", "pause"])
@pytest.mark.parametrize("option", ["-c", "-p"])
def test_save_with_keep_and_a_failing_host_exits_with_failure(
    move: Move, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, call: str
) -> None:
    """A guest that stays suspended, or that runs where it should be paused, is no success."""

    def fail(*_: Any) -> None:
        raise HostError(f"{call}: no", op=call)

    monkeypatch.setattr(move.source, call, fail)
    ran = xenpv("save", option, NAME, tmp_path / "web.save")
    if call == "pause" and option == "-c":
        assert ran.code == 0
    else:
        assert ran.code == 1
        assert f"{call}: no" in ran.err
    assert move.source.info(move.guest.domid).shutdown is (call != "pause")
    assert verify_file(tmp_path / "web.save").rules <= {"p2m-invalid"}, "the file is complete all the same"
    if call == "pause":
        assert move.runs_here()


def test_restore_of_a_cut_file_leaves_no_domain(move: Move, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "web.save"
    assert xenpv("save", NAME, file).code == 0
    file.write_bytes(file.read_bytes()[:-100])
    on_target(move, monkeypatch)
    ran = xenpv("restore", file)
    assert ran.code == 1
    assert "xenpv: error: " in ran.err
    assert move.nothing_there()


@pytest.mark.parametrize(
    "args",
    [["save"], ["save", "x"], ["save", "--preflight", "x", "y"], ["save", "--timeout", "0", "x", "y"], ["restore"]],
)
def test_save_and_restore_wrong_usage_exits_64(args: list[str]) -> None:
    assert xenpv(*args).code == 64


def test_save_of_a_missing_domain_or_dom0_fails(move: Move, tmp_path: Path) -> None:
    ran = xenpv("save", "nobody", tmp_path / "x")
    assert ran.code == 1
    assert "'nobody'" in ran.err
    refused = xenpv("save", "0", tmp_path / "x")
    assert (refused.code, "dom0" in refused.err) == (1, True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("seconds", ["nan", "inf", "-inf", "0", "-1", "1e300"])
@pytest.mark.parametrize("option", ["save --timeout", "migrate --idle-timeout", "migrate --max-downtime"])
def test_seconds_that_no_wait_can_take_are_a_usage_error(option: str, seconds: str) -> None:
    verb, name = option.split()
    assert xenpv(verb, f"{name}={seconds}", "dom", "place").code == 64
