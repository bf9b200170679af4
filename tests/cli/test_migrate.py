"""``xenpv migrate`` and ``xenpv receive`` between two model hosts, over sockets."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.command import Ran, xenpv
from tests.support.migration import CONFIG, NAME, PAGES, Move
from xenpv.errors import HostError
from xenpv.host.domain_names import AWAY
from xenpv.migrate.receiver import receive_domain
from xenpv.migrate.sender import send_domain
from xenpv.migrate.transport import accept, connect, listening


@pytest.fixture
def move(monkeypatch: pytest.MonkeyPatch) -> Move:
    move = Move.ready()
    monkeypatch.setattr("xenpv.host.xen.host.XenHost", lambda: nullcontext(move.source))
    return move


def run_beside(peer: Callable[[], object], command: Callable[[], Ran]) -> tuple[Ran, object]:
    """Run a command while the peer runs in a thread; return both results, or the peer's exception."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(peer())
        except BaseException as e:  # the test looks at it
            result.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    ran = command()
    thread.join(30)
    return ran, result[0]


def migrated(move: Move, folder: Path, *args: object) -> tuple[Ran, object]:
    """``xenpv migrate``, to a receiver in a thread."""
    address = f"unix:{folder / 'link'}"
    with listening(address) as listener:

        def receive() -> object:
            with accept(listener, address, idle_timeout=20.0) as link:
                return receive_domain(move.target, link)

        return run_beside(receive, lambda: xenpv("migrate", *args, NAME, address))


@pytest.mark.parametrize(
    "option",
    [[], ["--no-live"], ["--max-iterations", 1], ["--bandwidth", "1G"]],
    ids=lambda option: " ".join(map(str, option)),
)
def test_migrate_moves_the_domain(move: Move, tmp_path: Path, option: list[object]) -> None:
    ran, _ = migrated(move, tmp_path, *option)
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.startswith(f"dom{move.guest.domid} ({NAME}) runs on unix:{tmp_path}/link as dom1: 4.3 MiB sent, ")
    assert move.is_gone_here()
    assert move.there() is not None


def test_migrate_json_prints_events_in_order(move: Move, tmp_path: Path) -> None:
    ran, _ = migrated(move, tmp_path, "--json")
    events = [json.loads(line) for line in ran.out.splitlines()]
    names = [event["event"] for event in events]
    assert [name for name in names if name != "progress"] == ["connected", "accepted", "sent", "ready", "running"]
    progress = [event for event in events if event["event"] == "progress"]
    assert {"copying", "suspending", "finishing", "done"} == {event["phase"] for event in progress}
    assert {"round", "pages", "dirty", "rate", "downtime", "left"} <= set(progress[0])
    assert events[names.index("sent")]["pages"] >= PAGES
    assert events[-1]["domid"] == 1
    assert events[-1]["downtime"] > 0


def test_migrate_refused_by_the_receiver_leaves_the_guest_running(move: Move, tmp_path: Path) -> None:
    move.target.create(8, max_pages=1, name=NAME)
    ran, _ = migrated(move, tmp_path)
    assert ran.code == 1
    assert f"xenpv: dom{move.guest.domid} ({NAME}) runs on here\n" in ran.err
    assert f"dom1 ({NAME})" in ran.err
    ran, _ = migrated(move, tmp_path, "--json")
    assert json.loads(ran.out.splitlines()[-1]) == {
        "event": "kept",
        "state": f"dom{move.guest.domid} ({NAME}) runs on here",
    }
    assert move.runs_here()


def test_migrate_by_ssh_runs_the_receiver_there(move: Move, tmp_path: Path) -> None:
    """A program in place of ssh checks its arguments and connects to a receiver."""
    program = tmp_path / "ssh"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, socket, sys, threading\n"
        f"assert sys.argv[1:] == ['-p', '22', 'host', 'xenpv receive'], sys.argv\n"
        "one = socket.socket(socket.AF_UNIX)\n"
        f"one.connect({str(tmp_path / 'link')!r})\n"
        "def out():\n"
        "    while data := one.recv(1 << 16): os.write(1, data)\n"
        "threading.Thread(target=out, daemon=True).start()\n"
        "while data := os.read(0, 1 << 16): one.sendall(data)\n"
        "one.close()\n"
    )
    program.chmod(0o755)
    address = f"unix:{tmp_path / 'link'}"
    with listening(address) as listener:

        def receive() -> object:
            with accept(listener, address, idle_timeout=20.0) as link:
                return receive_domain(move.target, link)

        ran, _ = run_beside(receive, lambda: xenpv("migrate", "--ssh", f"{program} -p 22", NAME, "host"))
    assert ran.code == 0, ran.err
    assert move.there() is not None


def test_migrate_settle_after_a_lost_commit_gives_the_domain_to_the_receiver(
    move: Move, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpause(_domid: int) -> None:
        raise HostError("unpause: no", op="unpause")

    with monkeypatch.context() as patch:
        patch.setattr(move.target, "unpause", unpause)
        patch.setattr(move.target, "destroy", unpause)
        ran, _ = migrated(move, tmp_path)
    assert ran.code == 1
    domid = move.guest.domid
    assert f"{NAME}{AWAY}" in ran.err
    assert f"xenpv migrate --settle {domid} unix:" in ran.err
    # The domain has its own name on the target already, so it belongs there.
    address = f"unix:{tmp_path / 'link'}"
    with listening(address) as listener:

        def receive() -> object:
            with accept(listener, address, idle_timeout=20.0) as link:
                return receive_domain(move.target, link)

        ran, _ = run_beside(receive, lambda: xenpv("migrate", "--settle", domid, address))
    assert (ran.code, ran.out) == (0, "")
    assert "its copy here is destroyed" in ran.err
    assert move.is_gone_here()


def test_migrate_take_back_resumes_the_domain(move: Move) -> None:
    move.guest.do("suspend")
    move.suspended = True
    move.source.rename(move.guest.domid, NAME + AWAY)
    ran = xenpv("migrate", "--json", "--take-back", move.guest.domid)
    assert (ran.code, ran.json) == (0, {"settled": f"dom{move.guest.domid} ({NAME}) runs on here"})
    assert move.runs_here()


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_receive_at_an_address_builds_the_domain(
    move: Move, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    monkeypatch.setattr("xenpv.host.xen.host.XenHost", lambda: nullcontext(move.target))
    path = tmp_path / "link"

    def send() -> object:
        while True:
            try:
                with connect(f"unix:{path}", idle_timeout=20.0) as link:
                    return send_domain(move.source, move.guest.domid, link, config=CONFIG)
            except (FileNotFoundError, ConnectionRefusedError):
                pass

    options = ["--json"] if as_json else []
    ran, given = run_beside(send, lambda: xenpv("receive", *options, "--listen", f"unix:{path}"))
    assert ran.code == 0
    assert not isinstance(given, BaseException), given
    assert move.there() is not None
    assert not path.exists()
    if as_json:
        names = [json.loads(line)["event"] for line in ran.out.splitlines()]
        assert names == ["listening", "offered", "whole", "running"]
    else:
        assert (ran.out, ran.err) == ("", f"dom1 ({NAME}) runs\n")


def test_receive_at_a_bad_address_fails() -> None:
    ran = xenpv("receive", "--listen", "web")
    assert ran.code == 1


@pytest.mark.parametrize(
    "args",
    [
        ["migrate"],
        ["migrate", "x"],
        ["migrate", "--take-back", "x", "y"],
        ["migrate", "--settle", "x"],
        ["migrate", "--patience", "0", "x", "y"],
    ],
)
def test_migrate_wrong_usage_exits_64(args: list[str]) -> None:
    assert xenpv(*args).code == 64


def test_migrate_refuses_impossible_options_before_it_connects(move: Move) -> None:
    assert "at least 1 iteration, not 0" in xenpv("migrate", "--max-iterations", 0, NAME, "x").err
    assert "-oProxyCommand=x" in xenpv("migrate", "--", NAME, "-oProxyCommand=x").err
    assert move.runs_here()
