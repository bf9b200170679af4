"""``xenpv-save-helper``: a drop-in for libxl-save-helper.

It moves the memory in xl save, restore and migrate.

    LIBXL_SAVE_HELPER=/path/to/xenpv-save-helper xl save|restore|migrate …

libxl runs it with the stream's descriptor and talks to it over standard input and output (protocol.py). Errors go to
libxl, which prints them. docs/howto/xl.md is for users.

NumPy, and what needs it, is imported by the function that uses it.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from xenpv.errors import GuestError, HostError, RequestError, StreamError, XenPVError, iter_notes
from xenpv.io.process import use_one_blas_thread
from xenpv.save_helper import protocol
from xenpv.save_helper.protocol import Level, Message, Restore, Save

if TYPE_CHECKING:
    from xenpv.host.protocol import Mover
    from xenpv.io.progress import Progress, ProgressCallback
    from xenpv.save.precopy import PrecopyPolicy

EXIT_REFUSED = 1
EXIT_GONE = 2  # libxl has gone
EXIT_USAGE = 64

_PRECOPY = "XENPV_PRECOPY"  # in the environment: xl has no options for it
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_received_signals: list[signal.Signals] = []  # stop signals, in the order of their arrival


class LibxlGone(HostError):
    """libxl has closed its end of the pipes."""

    def __init__(self) -> None:
        super().__init__("libxl has gone", op="save helper", errno=errno.EPIPE)


class Libxl:
    """The connection to the libxl that runs this program.

    Args:
        read_fd: The pipe from libxl.
        write_fd: The pipe to libxl.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        self._reported: tuple[str, int] | None = None

    @classmethod
    def at_standard_descriptors(cls) -> Libxl:
        """Connect by standard input and output.

        What is printed from now on goes to standard error.
        """
        libxl = cls(os.dup(0), os.dup(1))
        os.dup2(2, 1)
        return libxl

    def send(self, message: bytes) -> None:
        """Send a message. LibxlGone if libxl has closed the pipe."""
        try:
            while message:
                message = message[os.write(self._write_fd, message) :]
        except OSError as e:
            raise LibxlGone from e

    def call(self, message: bytes) -> int:
        """Send a message and return libxl's answer, without a timeout.

        LibxlGone if none comes.
        """
        self.send(message)
        answer = b""
        while len(answer) < protocol.REPLY_SIZE:
            try:
                more = os.read(self._read_fd, protocol.REPLY_SIZE - len(answer))
            except OSError as e:
                raise LibxlGone from e
            if not more:
                raise LibxlGone
            answer += more
        return protocol.decode_reply(answer)

    def log(self, level: Level, text: str) -> None:
        """Send a text, a LOG message per line."""
        for line in text.splitlines():
            self.send(protocol.encode_log(level, line))

    def progress(self, context: str, done: int, total: int | None) -> None:
        """Send a PROGRESS message whenever the percentage has changed.

        Nothing if the total is unknown.
        """
        percent = done * 100 // total if total else 0
        if total and self._reported != (context, percent):
            self._reported = context, percent
            self.send(protocol.encode(Message.PROGRESS, "xenpv", context, done, total))


# --- save ------------------------------------------------------------------------------------------------------------


def save(request: Save, libxl: Libxl, host: Mover) -> None:
    """Carry out a save. Raises XenPVError and OSError; libxl then resumes the domain."""
    from xenpv.frames import DomId  # noqa: PLC0415
    from xenpv.io.atomic_output import Output  # noqa: PLC0415
    from xenpv.save.save import save as save_domain  # noqa: PLC0415
    from xenpv.stream.envelope import Kind  # noqa: PLC0415

    def suspend() -> None:
        if libxl.call(protocol.encode(Message.SUSPEND)) != 1:
            raise GuestError(f"dom{request.domid} was not suspended: see libxl's message above")

    policy: PrecopyPolicy | None = None
    if request.live:
        policy = parse_precopy(os.environ.get(_PRECOPY, ""))
        if policy is None:
            libxl.log(Level.WARN, f"{_PRECOPY}=no: the domain is suspended before its memory is sent")
    try:
        summary = save_domain(
            host,
            DomId(request.domid),
            Output(request.fd, "the stream"),
            envelope=Kind.LIBXC,
            suspend=suspend,
            live=policy,
            progress=_progress_to(libxl, live=policy is not None),
            verify=request.debug,
        )
    except HostError as e:
        if policy is not None and e.errno == errno.EOPNOTSUPP:
            libxl.log(Level.ERROR, f"set {_PRECOPY}=no to suspend the domain before its memory is sent")
        raise
    libxl.log(Level.INFO, f"{summary.name}: {summary.pages} pages, {summary.bytes} bytes written")


def parse_precopy(text: str) -> PrecopyPolicy | None:
    """Return the policy that XENPV_PRECOPY describes; None for "no".

    For example "max-downtime=0.3,bandwidth=50000000". Raises RequestError for other texts.
    """
    from dataclasses import fields  # noqa: PLC0415

    from xenpv.save.precopy import PrecopyPolicy  # noqa: PLC0415

    if text == "no":
        return None
    names = [field.name for field in fields(PrecopyPolicy)]
    values: dict[str, Any] = {}
    for part in text.split(",") if text else []:
        name, _, value = part.partition("=")
        name = name.strip().replace("-", "_")
        try:
            if name not in names:
                raise ValueError
            values[name] = float(value) if name == "max_downtime" else int(value)
        except ValueError:
            known = ", ".join(name.replace("_", "-") for name in names)
            raise RequestError(
                f"{_PRECOPY}: {part!r} is not valid: use `no`, or NAME=NUMBER with NAME one of {known}"
            ) from None
    return PrecopyPolicy(**values)


def _progress_to(libxl: Libxl, *, live: bool) -> ProgressCallback:
    """Return a callback that reports progress to libxl.

    It sends pages, and a LOG line per iteration of a live save, as xl migrate hides the pages.
    """
    from xenpv.io.progress import Phase  # noqa: PLC0415

    when = {
        Phase.COPYING: "while it runs",
        Phase.FINISHING: "while it is suspended",
        Phase.VERIFYING: "again, to be compared",
    }
    logged: tuple[int, Phase] | None = None

    def report(progress: Progress) -> None:
        nonlocal logged
        assert progress.transfer is not None
        iteration, phase = progress.transfer.iteration, progress.transfer.phase
        if live and (iteration, phase) != logged and phase in when:
            logged = iteration, phase
            libxl.log(Level.INFO, f"iteration {iteration}: {progress.total} pages to be sent {when[phase]}")
        libxl.progress(f"Pages, iteration {iteration}" if live else "Pages", progress.done, progress.total)

    return report


def _resume_without_libxl(host: Mover, domid: int) -> None:
    """Resume the domain of a failed save because libxl, which would do so, has gone.

    HostError if that fails.

    libxl finishes the stream and answers once it has received COMPLETE. Until then nobody can restore the stream.
    """
    from xenpv.frames import DomId  # noqa: PLC0415
    from xenpv.save.suspend import has_suspended, resume  # noqa: PLC0415

    try:
        if has_suspended(host.info(DomId(domid))):
            resume(host, DomId(domid))
    except XenPVError as e:
        raise HostError(f"libxl has gone, and dom{domid} could not be resumed: {e}", op="resume", domid=domid) from e


# --- restore ---------------------------------------------------------------------------------------------------------


def restore(request: Restore, libxl: Libxl, host: Mover) -> tuple[int, int]:
    """Carry out a restore.

    Return the mfns of the xenstore and console rings. Raises XenPVError and OSError.
    """
    from xenpv.frames import DomId  # noqa: PLC0415
    from xenpv.io.stream_input import Input  # noqa: PLC0415
    from xenpv.restore.restore import restore as restore_domain  # noqa: PLC0415
    from xenpv.stream.envelope import Kind  # noqa: PLC0415

    daemons = host.daemons()
    if (daemons.console, daemons.xenstore) != (request.console_domid, request.store_domid):
        problem = f"xenstore and console in dom{request.store_domid} and dom{request.console_domid}"
        raise RequestError(f"libxl asks for {problem}: xenstore says dom{daemons.xenstore} and dom{daemons.console}")

    def static_data_done(missing_cpuid: bool, missing_msr: bool) -> None:
        missing = protocol.MISSING_CPUID * missing_cpuid | protocol.MISSING_MSR * missing_msr
        if libxl.call(protocol.encode(Message.STATIC_DATA_DONE, missing)):
            raise HostError(f"libxl could not give dom{request.domid} its CPU policy", op="static_data_done")

    restored = restore_domain(
        host,
        DomId(request.domid),
        Input(request.fd, "the stream", exact=True),
        console_port=request.console_port,
        xenstore_port=request.store_port,
        envelope=Kind.LIBXC,
        static_data_done=static_data_done,
        progress=lambda progress: libxl.progress("Bytes", progress.done, progress.total),
    )
    if len(restored.differing):
        which = f"{len(restored.differing)} pages, the first is pfn {int(restored.differing[0]):#x},"
        problem = f"{which} were not as they were sent before when the sender looked again"
        libxl.log(Level.WARN, f"dom{request.domid}: {problem}")
    libxl.log(Level.INFO, f"dom{request.domid}: {restored.pages} pages, {restored.bytes} bytes read")
    return restored.xenstore.mfn, restored.console.mfn


# --- the program -----------------------------------------------------------------------------------------------------


def serve(request: Save | Restore, libxl: Libxl, open_host: Callable[[], Mover]) -> None:
    """Carry out libxl's request and report the result.

    Raises:
        LibxlGone: libxl has gone. A suspended domain of a save was resumed.
        HostError: libxl has gone, and the domain could not be resumed.
    """
    host: Mover | None = None
    failure: int | None = None  # an errno
    rings = 0, 0
    try:
        try:
            host = open_host()
            _check_version(host)
            if isinstance(request, Save):
                save(request, libxl, host)
            else:
                rings = restore(request, libxl, host)
        except LibxlGone:
            raise
        except (XenPVError, OSError, MemoryError) as e:
            failure = _errno(e)
            libxl.log(Level.ERROR, "; ".join([_describe(e), *iter_notes(e)]))
        except Exception:  # a bug of xenpv's; libxl goes on as after any error
            import traceback  # noqa: PLC0415

            failure = errno.EIO
            libxl.log(Level.ERROR, f"{traceback.format_exc()}this is a bug of xenpv's; please report it")
        if isinstance(request, Restore):
            libxl.send(protocol.encode(Message.RESTORE_RESULTS, *rings))
        libxl.call(protocol.encode_complete(failure))
    except LibxlGone:
        if host is not None and isinstance(request, Save):
            _resume_without_libxl(host, request.domid)
        raise


def _check_version(host: Mover) -> None:
    version = host.version()
    if (version.major, version.minor) < protocol.OLDEST_XEN:
        raise RequestError(f"this is Xen {version.major}.{version.minor}; 4.14 and newer are supported")


def _stop_by_signals(fd: int) -> None:
    """Make the next write to the stream fail after a stop signal.

    libxl-save-helper does the same.

    The save then ends as after any failed write. An exception could come at any moment, also within a message.
    """
    unwritable = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def stop(number: int, _: FrameType | None) -> None:
        _received_signals.append(signal.Signals(number))
        os.dup2(unwritable, fd)

    for number in _STOP_SIGNALS:
        signal.signal(number, stop)


def _errno(e: Exception) -> int:
    """Return the errno for COMPLETE, which libxl prints after its own words."""
    number = getattr(e, "errno", None)
    if number:
        return int(number)
    if isinstance(e, StreamError):
        return errno.EBADMSG
    return errno.ENOMEM if isinstance(e, MemoryError) else errno.EINVAL


def _describe(e: Exception) -> str:
    if isinstance(e, OSError):
        reason = f"stopped by {_received_signals[0].name}" if _received_signals else e.strerror
        return f"{e.filename or 'the stream'}: {reason}"
    return str(e) or type(e).__name__


def open_host() -> Mover:
    """Open the Xen host that this program runs on. HostError if there is none."""
    from xenpv.host.xen.host import XenHost  # noqa: PLC0415

    return XenHost()


def main(argv: list[str], open_host: Callable[[], Mover] = open_host) -> int:
    """Run the program with libxl's arguments, and return the exit status.

    The arguments do not include the program's name.
    """
    if argv[:1] not in (["--save-domain"], ["--restore-domain"]):
        print("xenpv-save-helper is run by libxl: LIBXL_SAVE_HELPER=/path/to/xenpv-save-helper xl save|restore|migrate",
              file=sys.stderr)  # fmt: skip
        return EXIT_USAGE
    use_one_blas_thread()
    libxl = Libxl.at_standard_descriptors()
    try:
        try:
            request = protocol.parse_arguments(argv)
        except RequestError as e:
            # An unknown libxl may number COMPLETE differently; LOG has always been the first.
            libxl.log(Level.ERROR, str(e))
            return EXIT_REFUSED
        if isinstance(request, Save):
            _stop_by_signals(request.fd)
        else:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # libxl removes the new domain
        serve(request, libxl, open_host)
    except HostError as e:  # libxl has gone
        print(f"xenpv-save-helper: {e}", file=sys.stderr)
        return EXIT_GONE
    return 0


def run() -> NoReturn:
    """Run the console script.

    It ends at once, as libxl waits for that while a migrated guest is suspended.
    """
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
