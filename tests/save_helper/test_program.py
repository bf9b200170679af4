"""xenpv-save-helper on a model host, with libxl played by a thread; tests/lab has the real ones."""

from __future__ import annotations

import errno
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.support.kernel_guest import Guest
from tests.support.libxl import Answer, FakeLibxl
from tests.support.saving import PatchedHost
from xenpv.errors import HostError, RequestError
from xenpv.frames import PAGE_SIZE, DomId
from xenpv.host.model.host import ModelHost
from xenpv.host.protocol import XenVersion
from xenpv.save.precopy import PrecopyPolicy
from xenpv.save_helper import program
from xenpv.save_helper.program import EXIT_GONE, EXIT_REFUSED, EXIT_USAGE, Libxl, LibxlGone, parse_precopy, serve
from xenpv.save_helper.protocol import Level, Message, Restore, Save
from xenpv.stream.envelope import Kind
from xenpv.verify.stream import verify


@pytest.fixture
def guest() -> Guest:
    return Guest.boot("both", pages=2048)


@pytest.fixture
def stream() -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as file:
        yield file


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in program._STOP_SIGNALS}
    yield
    program._received_signals.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


def suspends(guest: Guest) -> Callable[[], int]:
    def answer() -> int:
        guest.do("suspend")
        return 1

    return answer


def save(
    guest: Guest, fd: int, host: Any = None, answers: dict[Message, Answer] | None = None, **how: bool
) -> FakeLibxl:
    """Save as libxl would have it; what libxl was told."""
    request = Save(fd, guest.domid, how.get("live", False), how.get("debug", False))
    with FakeLibxl({Message.SUSPEND: suspends(guest), **(answers or {})}) as libxl:
        serve(request, Libxl(libxl.helper_hears, libxl.helper_says), lambda: host or guest.host)
    return libxl


def restore(host: Any, fd: int, answers: dict[Message, Answer] | None = None, **fields: int) -> tuple[FakeLibxl, DomId]:
    """Restore into a new domain, as libxl makes it; what libxl was told, and the domain."""
    domid: DomId = host.create(8, vcpus=1, max_pages=4096)
    ports = {"store_port": host.alloc_event_channel(domid), "console_port": host.alloc_event_channel(domid)}
    request = Restore(fd, domid, **{"store_domid": 0, "console_domid": 0, **ports, **fields})
    with FakeLibxl(answers) as libxl:
        serve(request, Libxl(libxl.helper_hears, libxl.helper_says), lambda: host)
    return libxl, domid


def test_serve_save_writes_a_valid_stream(guest: Guest, stream: BinaryIO) -> None:
    stream.write(b"libxl's own, before")
    stream.flush()
    libxl = save(guest, stream.fileno())
    assert libxl.kinds == [Message.SUSPEND, Message.COMPLETE]
    assert libxl.completed == (0, 0)
    assert libxl.errors == []
    (percents,) = [[done * 100 // whole for _, what, done, whole in libxl.values(Message.PROGRESS) if what == "Pages"]]
    assert percents == sorted(set(percents))
    assert percents[-1] == 100
    data = Path(f"/proc/self/fd/{stream.fileno()}").read_bytes()
    assert data.startswith(b"libxl's own, before")
    assert verify_bytes(data[19:]) == []
    (said,) = [text for level, _, _, text in libxl.values(Message.LOG) if level == Level.INFO]
    assert said == f"dom{guest.domid} (litmus): 2048 pages, {len(data) - 19} bytes written"


def verify_bytes(data: bytes) -> list[str]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        report = verify(file.name, envelope=Kind.LIBXC)
        return [str(finding) for finding in report.findings]


def test_serve_restore_gives_the_saved_domain(guest: Guest, stream: BinaryIO) -> None:
    guest.do("write_pattern", guest.do("free_pfns"), 7)
    save(guest, stream.fileno())
    stream.write(b"libxl's own, behind")
    stream.seek(0)
    host = ModelHost(1 << 30)
    libxl, domid = restore(host, stream.fileno())
    assert libxl.errors == []
    assert libxl.kinds == [Message.STATIC_DATA_DONE, Message.RESTORE_RESULTS, Message.COMPLETE]
    assert libxl.completed == (0, 0)
    ((store, console),) = libxl.values(Message.RESTORE_RESULTS)
    assert 0 < store != console > 0
    assert {host.frames.owned(domid + 1).tolist().count(mfn) for mfn in (store, console)} == {1}
    assert stream.read() == b"libxl's own, behind"
    assert host.info(domid).pages == guest.host.info(guest.domid).pages
    assert host.info(domid).paused


def test_serve_save_refused_suspend_completes_with_einval(guest: Guest, stream: BinaryIO) -> None:
    libxl = save(guest, stream.fileno(), answers={Message.SUSPEND: 0})
    assert libxl.kinds == [Message.SUSPEND, Message.COMPLETE]
    assert libxl.completed == (-1, errno.EINVAL)
    assert libxl.errors == [f"dom{guest.domid} was not suspended: see libxl's message above"]
    assert not guest.host.info(guest.domid).shutdown


def test_serve_save_full_disk_completes_with_enospc(guest: Guest) -> None:
    with open("/dev/full", "wb") as full:
        libxl = save(guest, full.fileno())
    assert libxl.completed == (-1, errno.ENOSPC)
    assert libxl.errors == ["the stream: No space left on device"]


def test_serve_save_closed_pipe_completes_with_epipe(guest: Guest) -> None:
    read, write = os.pipe()
    os.close(read)
    libxl = save(guest, write)
    os.close(write)
    assert libxl.completed == (-1, errno.EPIPE)
    assert libxl.errors == ["the stream: Broken pipe"]


def test_serve_save_guest_without_p2m_is_not_suspended(stream: BinaryIO) -> None:
    guest = Guest.boot("none")
    libxl = save(guest, stream.fileno())
    assert libxl.kinds == [Message.COMPLETE]
    assert libxl.completed[0] == -1
    assert "exposes no p2m" in libxl.errors[0]
    assert stream.read() == b""


def test_serve_save_stop_signal_fails_the_next_write(guest: Guest) -> None:
    read, write = os.pipe()
    program._stop_by_signals(write)

    def answer() -> int:
        guest.do("suspend")
        os.kill(os.getpid(), signal.SIGTERM)
        return 1

    libxl = save(guest, write, answers={Message.SUSPEND: answer})
    os.close(read)
    os.close(write)
    assert libxl.completed == (-1, errno.EBADF)
    assert libxl.errors == ["the stream: stopped by SIGTERM"]


@pytest.mark.parametrize("last", [Message.SUSPEND, Message.PROGRESS, Message.COMPLETE])
def test_serve_save_libxl_gone_resumes_the_guest(guest: Guest, stream: BinaryIO, last: Message) -> None:
    def dies() -> None:
        if not guest.host.info(guest.domid).shutdown:
            guest.do("suspend")

    with pytest.raises(LibxlGone):
        save(guest, stream.fileno(), answers={last: dies})
    assert not guest.host.info(guest.domid).shutdown


def test_serve_libxl_gone_and_resume_fails_raises_host_error(guest: Guest, stream: BinaryIO) -> None:
    def dies() -> None:
        guest.do("suspend")

    def resume(domid: DomId) -> None:
        raise HostError("resume: no", op="resume", domid=domid)

    with pytest.raises(HostError, match="resume: no") as e:
        save(guest, stream.fileno(), PatchedHost(guest, resume=resume), answers={Message.SUSPEND: dies})
    assert (e.value.op, e.value.domid) == ("resume", guest.domid)
    assert not isinstance(e.value, LibxlGone)


def test_serve_save_libxl_and_reader_gone_resumes_the_guest(guest: Guest) -> None:
    """The save fails of the stream, and then there is nobody to tell."""
    with open("/dev/full", "wb") as full, pytest.raises(LibxlGone):
        save(guest, full.fileno(), answers={Message.LOG: None})
    assert not guest.host.info(guest.domid).shutdown


def test_serve_restore_truncated_stream_completes_with_ebadmsg(guest: Guest, stream: BinaryIO) -> None:
    save(guest, stream.fileno())
    stream.truncate(stream.seek(0, os.SEEK_END) // 2)
    stream.seek(0)
    libxl, _ = restore(ModelHost(1 << 30), stream.fileno())
    assert libxl.kinds[-2:] == [Message.RESTORE_RESULTS, Message.COMPLETE]
    assert libxl.values(Message.RESTORE_RESULTS) == [(0, 0)]
    assert libxl.completed == (-1, errno.EBADMSG)
    assert len(libxl.errors) == 1
    assert "PAGE_DATA" in libxl.errors[0]


def test_serve_restore_other_daemons_than_libxl_says_is_refused(guest: Guest, stream: BinaryIO) -> None:
    libxl, _ = restore(guest.host, stream.fileno(), store_domid=3)
    assert libxl.errors == ["libxl asks for xenstore and console in dom3 and dom0: xenstore says dom0 and dom0"]
    assert libxl.completed == (-1, errno.EINVAL)


def test_serve_restore_failed_static_data_done_is_an_error(guest: Guest, stream: BinaryIO) -> None:
    save(guest, stream.fileno())
    stream.seek(0)
    libxl, domid = restore(ModelHost(1 << 30), stream.fileno(), {Message.STATIC_DATA_DONE: -3})
    assert libxl.errors == [f"libxl could not give dom{domid} its CPU policy"]
    assert libxl.completed[0] == -1


def test_serve_old_xen_or_bug_completes_with_an_error(guest: Guest, stream: BinaryIO) -> None:
    old = PatchedHost(guest, version=lambda: XenVersion(4, 13, ".1"))
    assert save(guest, stream.fileno(), old).errors == ["this is Xen 4.13; 4.14 and newer are supported"]

    def breaks() -> XenVersion:
        raise ZeroDivisionError("of all things")

    libxl = save(guest, stream.fileno(), PatchedHost(guest, version=breaks))
    assert libxl.completed == (-1, errno.EIO)
    assert libxl.errors[0] == "Traceback (most recent call last):"
    assert libxl.errors[-2:] == ["ZeroDivisionError: of all things", "this is a bug of xenpv's; please report it"]


def test_serve_host_error_completes_with_its_errno(guest: Guest, stream: BinaryIO) -> None:
    def info(domid: DomId) -> None:
        raise HostError("there is no dom9", op="getdomaininfo", domid=9, errno=errno.ESRCH)

    libxl = save(guest, stream.fileno(), PatchedHost(guest, info=info))
    assert (libxl.completed, libxl.errors) == ((-1, errno.ESRCH), ["there is no dom9"])


def test_serve_save_hvm_domain_is_refused(guest: Guest, stream: BinaryIO) -> None:
    other = replace(guest.host.info(guest.domid), hvm=True)
    libxl = save(guest, stream.fileno(), PatchedHost(guest, info=lambda _: other))
    assert libxl.kinds == [Message.COMPLETE]
    assert "is an HVM domain; PV domains are saved" in libxl.errors[0]


@pytest.mark.parametrize("live", [False, True])
def test_serve_save_debug_sends_pages_twice_for_comparison(guest: Guest, stream: BinaryIO, live: bool) -> None:
    libxl = save(guest, stream.fileno(), live=live, debug=True)
    assert libxl.completed == (0, 0)
    data = bytearray(Path(f"/proc/self/fd/{stream.fileno()}").read_bytes())
    assert verify_bytes(bytes(data)) == []
    again = data.index(struct.pack("<II", 0x0D, 0))  # the VERIFY record
    assert len(data) - again > 2048 * PAGE_SIZE
    for changed in (False, True):
        if changed:
            data[again + 8 + 8 + 8 + 8 * 1024 + 5] ^= 1  # a record of 1024 pages begins there
        os.pwrite(stream.fileno(), data, 0)
        os.lseek(stream.fileno(), 0, os.SEEK_SET)
        libxl, _ = restore(ModelHost(1 << 30, seed=2), stream.fileno())
        assert libxl.completed == (0, 0)
        warned = [text for level, _, _, text in libxl.values(Message.LOG) if level == Level.WARN]
        assert [re.search(r"1 pages, the first is pfn 0x0, were not as", text) is not None for text in warned] == (
            [True] * changed
        )


def test_serve_live_save_logs_each_iteration(guest: Guest, stream: BinaryIO) -> None:
    guest.do("write_pattern", guest.do("free_pfns"), 7)
    libxl = save(guest, stream.fileno(), live=True)
    assert libxl.kinds == [Message.SUSPEND, Message.COMPLETE]
    said = [text for level, _, _, text in libxl.values(Message.LOG) if level == Level.INFO]
    assert said[0] == "iteration 0: 2048 pages to be sent while it runs"
    assert re.fullmatch(r"iteration 1: \d+ pages to be sent while it is suspended", said[-2])
    data = Path(f"/proc/self/fd/{stream.fileno()}").read_bytes()
    assert verify_bytes(data) == []


def test_serve_live_save_without_log_dirty_hints_at_no_precopy(
    guest: Guest, stream: BinaryIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_dirty(domid: DomId, *, on: bool) -> None:
        raise HostError("it cannot", op="shadow_op", domid=domid, errno=errno.EOPNOTSUPP)

    host = PatchedHost(guest, log_dirty=log_dirty)
    libxl = save(guest, stream.fileno(), host, live=True)
    assert libxl.errors == ["set XENPV_PRECOPY=no to suspend the domain before its memory is sent", "it cannot"]
    assert libxl.completed == (-1, errno.EOPNOTSUPP)
    assert not guest.host.info(guest.domid).shutdown
    monkeypatch.setenv("XENPV_PRECOPY", "no")
    libxl = save(guest, stream.fileno(), host, live=True)
    assert (libxl.errors, libxl.completed) == ([], (0, 0))


def test_parse_precopy_reads_options_and_refuses_others() -> None:
    assert parse_precopy("") == PrecopyPolicy()
    assert parse_precopy("max-downtime=.25, target_dirty=10") == PrecopyPolicy(max_downtime=0.25, target_dirty=10)
    for wrong in ("yes", "bandwidth", "bandwidth=fast", "downtime=3", "max-iterations=0", ","):
        with pytest.raises(RequestError):
            parse_precopy(wrong)


# --- the program itself ----------------------------------------------------------------------------------------------


def run_program(*argv: str, answers: dict[Message, Answer] | None = None) -> tuple[int, str, FakeLibxl]:
    with FakeLibxl(answers) as libxl:
        ran = subprocess.run(
            [sys.executable, "-m", "xenpv.save_helper.program", *argv],
            stdin=libxl.helper_hears,
            stdout=libxl.helper_says,
            stderr=subprocess.PIPE,
            check=False,
        )
    return ran.returncode, ran.stderr.decode(), libxl


def test_program_without_xen_completes_with_an_error() -> None:
    for argv in (["--save-domain", "2", "-1", "1", "0", "136", "0"],
                 ["--restore-domain", "0", "-1", "1", "1", "0", "2", "0", "768", "0"]):  # fmt: skip
        code, err, libxl = run_program(*argv)
        assert (code, err) == (0, "")
        assert libxl.completed[0] == -1
        assert len(libxl.errors) == 1


def test_program_unsupported_request_exits_with_1() -> None:
    code, err, libxl = run_program("--save-domain", "2", "-1", "1", "0", "136", "1")
    assert (code, err) == (EXIT_REFUSED, "")
    assert libxl.errors == ["Remus is not supported, only a save, restore or migration once; unset LIBXL_SAVE_HELPER"]
    assert libxl.kinds == []


def test_program_run_by_hand_prints_usage() -> None:
    code, err, libxl = run_program("--help")
    assert code == EXIT_USAGE
    assert "LIBXL_SAVE_HELPER=" in err
    assert libxl.told == []


def test_program_without_libxl_exits_with_2() -> None:
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-m", "xenpv.save_helper.program", "--save-domain", "2", "-1", "1", "0", "136", "0"],
        stdin=subprocess.DEVNULL,
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)
    assert (ran.returncode, ran.stderr) == (EXIT_GONE, b"xenpv-save-helper: libxl has gone\n")


def test_program_imports_only_what_it_needs() -> None:
    """The modules of other verbs, and those of the command line that people use, take longer than all of its own."""
    code = "import sys, xenpv.save_helper.program as h; print(*(m for m in sys.modules if '.' not in m))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    loaded = set(ran.stdout.decode().split())
    assert loaded & {"click", "rich", "zstandard", "lz4", "numpy.testing", "asyncio", "subprocess", "email"} == set()
