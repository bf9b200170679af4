"""``xenpv-save-helper``: a drop-in for libxl-save-helper, which moves the memory in xl save, restore and migrate.

    LIBXL_SAVE_HELPER=/path/to/xenpv-save-helper xl save|restore|migrate …

libxl runs it with the stream's descriptor, and talks to it over standard input and output (protocol.py); what
goes wrong is said to libxl, which prints it. docs/howto/xl.md is for who uses it.

NumPy, and all that stands on it, is imported when it is known what for.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from xenpv.errors import GuestError, HostError, RequestError, StreamError, XenPVError
from xenpv.io.process import use_one_blas_thread
from xenpv.save_helper import protocol
from xenpv.save_helper.protocol import Level, Message, Restore, Save

if TYPE_CHECKING:
    from xenpv.host.protocol import Mover
    from xenpv.io.progress import Progress, ProgressCallback
    from xenpv.save.precopy import PrecopyPolicy

EXIT_REFUSED = 1
EXIT_GONE = 2  # nobody is left to talk to
EXIT_USAGE = 64

_PRECOPY = "XENPV_PRECOPY"  # in the environment: xl has no options for it
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_stopped: list[signal.Signals] = []  # by which signals a save is to end


class LibxlGone(HostError):
    """libxl does not answer any more."""

    def __init__(self) -> None:
        super().__init__("libxl has gone", op="save helper", errno=errno.EPIPE)


class Libxl:
    """The other end: told, asked, and shown how far it is."""

    def __init__(self, heard: int, said: int) -> None:
        self._heard, self._said = heard, said
        self._reported: tuple[str, int] | None = None

    @classmethod
    def at_standard_descriptors(cls) -> Libxl:
        """Whoever started us; what anything else prints goes to standard error from now on."""
        libxl = cls(os.dup(0), os.dup(1))
        os.dup2(2, 1)
        return libxl

    def tell(self, message: bytes) -> None:
        """Send a message. LibxlGone when nobody reads it."""
        try:
            while message:
                message = message[os.write(self._said, message) :]
        except OSError as e:
            raise LibxlGone from e

    def ask(self, message: bytes) -> int:
        """Send a message, and wait for the answer, however long that takes. LibxlGone when none comes."""
        self.tell(message)
        answer = b""
        while len(answer) < protocol.REPLY:
            try:
                more = os.read(self._heard, protocol.REPLY - len(answer))
            except OSError as e:
                raise LibxlGone from e
            if not more:
                raise LibxlGone
            answer += more
        return protocol.reply(answer)

    def log(self, level: Level, text: str) -> None:
        """Say something, a message for each line."""
        for line in text.splitlines():
            self.tell(protocol.log(level, line))

    def progress(self, context: str, done: int, total: int | None) -> None:
        """Send a PROGRESS message whenever the percentage has changed; nothing if the total is unknown."""
        percent = done * 100 // total if total else 0
        if total and self._reported != (context, percent):
            self._reported = context, percent
            self.tell(protocol.message(Message.PROGRESS, "xenpv", context, done, total))


# --- save ------------------------------------------------------------------------------------------------------------


def save(request: Save, libxl: Libxl, host: Mover) -> None:
    """Carry out a save. Raises what went wrong; the domain is left to libxl, which lets it run on."""
    from xenpv.frames import DomId  # noqa: PLC0415
    from xenpv.io.atomic_output import Output  # noqa: PLC0415
    from xenpv.save.save import save as save_domain  # noqa: PLC0415
    from xenpv.stream.envelope import Kind  # noqa: PLC0415

    def suspend() -> None:
        if libxl.ask(protocol.message(Message.SUSPEND)) != 1:
            raise GuestError(f"dom{request.domid} was not suspended: what libxl says of it stands above")

    policy: PrecopyPolicy | None = None
    if request.live:
        policy = precopy(os.environ.get(_PRECOPY, ""))
        if policy is None:
            libxl.log(Level.WARN, f"the domain stands still while it is sent, as {_PRECOPY}=no asks for")
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
            libxl.log(Level.ERROR, f"{_PRECOPY}=no sends a domain that stands still meanwhile")
        raise
    libxl.log(Level.INFO, f"{summary.name}: {summary.pages} pages, {summary.bytes} bytes written")


def precopy(text: str) -> PrecopyPolicy | None:
    """How a live save is made: "max-downtime=0.3,bandwidth=50000000"; "no": not live. RequestError for the rest."""
    from dataclasses import fields  # noqa: PLC0415

    from xenpv.save.precopy import PrecopyPolicy  # noqa: PLC0415

    if text == "no":
        return None
    names = [field.name for field in fields(PrecopyPolicy)]
    given: dict[str, Any] = {}
    for part in text.split(",") if text else []:
        name, _, value = part.partition("=")
        name = name.strip().replace("-", "_")
        try:
            if name not in names:
                raise ValueError
            given[name] = float(value) if name == "max_downtime" else int(value)
        except ValueError:
            known = ", ".join(name.replace("_", "-") for name in names)
            raise RequestError(f"{_PRECOPY}: {part!r} is none of {known} with a number, nor no") from None
    return PrecopyPolicy(**given)


def _progress_to(libxl: Libxl, *, live: bool) -> ProgressCallback:
    """Report progress to libxl: pages, and a LOG line per iteration of a live save, as xl migrate hides the pages."""
    from xenpv.io.progress import Phase  # noqa: PLC0415

    when = {
        Phase.COPYING: "while it runs",
        Phase.FINISHING: "while it stands still",
        Phase.VERIFYING: "again, to be compared",
    }
    logged: tuple[int, Phase] | None = None

    def report(progress: Progress) -> None:
        nonlocal logged
        assert progress.transfer is not None
        iteration, phase = progress.transfer.iteration, progress.transfer.phase
        if live and (iteration, phase) != logged and phase in when:
            logged = iteration, phase
            libxl.log(Level.INFO, f"round {iteration}: {progress.total} pages to be sent {when[phase]}")
        libxl.progress(f"Pages, round {iteration}" if live else "Pages", progress.done, progress.total)

    return report


def _let_run(host: Mover, domid: int) -> None:
    """Nobody is left who would let a domain run on that was suspended for a save which came to nothing: so it is us.

    libxl finishes the stream when it has heard COMPLETE, and answers as it hears it: until then nobody can restore it.
    """
    from xenpv.frames import DomId  # noqa: PLC0415
    from xenpv.save.suspend import has_suspended, resume  # noqa: PLC0415

    if has_suspended(host.info(DomId(domid))):
        resume(host, DomId(domid))


# --- restore ---------------------------------------------------------------------------------------------------------


def restore(request: Restore, libxl: Libxl, host: Mover) -> tuple[int, int]:
    """Carry out a restore. The mfns of the rings of xenstore and console. Raises what went wrong."""
    from xenpv.frames import DomId  # noqa: PLC0415
    from xenpv.io.stream_input import Input  # noqa: PLC0415
    from xenpv.restore.restore import restore as restore_domain  # noqa: PLC0415
    from xenpv.stream.envelope import Kind  # noqa: PLC0415

    daemons = host.daemons()
    if (daemons.console, daemons.xenstore) != (request.console_domid, request.store_domid):
        what = f"xenstore and console in dom{request.store_domid} and dom{request.console_domid}"
        raise RequestError(f"libxl asks for {what}: xenstore says dom{daemons.xenstore} and dom{daemons.console}")

    def static_data_done(missing_cpuid: bool, missing_msr: bool) -> None:
        missing = protocol.MISSING_CPUID * missing_cpuid | protocol.MISSING_MSR * missing_msr
        if libxl.ask(protocol.message(Message.STATIC_DATA_DONE, missing)):
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
        what = f"{which} were not as they were sent before when the sender looked again"
        libxl.log(Level.WARN, f"dom{request.domid}: {what}")
    libxl.log(Level.INFO, f"dom{request.domid}: {restored.pages} pages, {restored.bytes} bytes read")
    return restored.xenstore.mfn, restored.console.mfn


# --- the program -----------------------------------------------------------------------------------------------------


def serve(request: Save | Restore, libxl: Libxl, find_host: Callable[[], Mover]) -> None:
    """Do what libxl asks for and tell it how that went. LibxlGone if it could not be told."""
    found: list[Mover] = []

    def host() -> Mover:
        found.append(find_host())
        return found[0]

    try:
        rings, failed = _try(request, libxl, host)
        if isinstance(request, Restore):
            libxl.tell(protocol.message(Message.RESTORE_RESULTS, *rings))
        libxl.ask(protocol.complete(failed))
    except LibxlGone:
        if found and isinstance(request, Save):
            _let_run(found[0], request.domid)
        raise


def _try(request: Save | Restore, libxl: Libxl, find_host: Callable[[], Mover]) -> tuple[tuple[int, int], int | None]:
    """The mfns of a restored domain's rings, and an errno if it failed: then libxl has been told why."""
    rings = 0, 0
    try:
        host = find_host()
        _check_version(host)
        if isinstance(request, Save):
            save(request, libxl, host)
        else:
            rings = restore(request, libxl, host)
    except LibxlGone:
        raise
    except (XenPVError, OSError, MemoryError) as e:
        libxl.log(Level.ERROR, _words(e))
        return rings, _errno(e)
    except Exception:  # a bug of ours; libxl goes on as after any error
        import traceback  # noqa: PLC0415

        libxl.log(Level.ERROR, f"{traceback.format_exc()}this is a bug of xenpv's; please report it")
        return rings, errno.EIO
    return rings, None


def _check_version(host: Mover) -> None:
    version = host.version()
    if (version.major, version.minor) < protocol.OLDEST:
        raise RequestError(f"this is Xen {version.major}.{version.minor}; 4.14 and newer are supported")


def _stop_by_signals(fd: int) -> None:
    """From now on a signal makes the next write to the stream fail, as libxl-save-helper has it.

    So what was begun is ended in order, once. An exception could come between any two steps of that, or in the middle
    of a message.
    """
    nowhere = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def stop(number: int, _: FrameType | None) -> None:
        _stopped.append(signal.Signals(number))
        os.dup2(nowhere, fd)

    for number in _STOPS:
        signal.signal(number, stop)


def _errno(e: Exception) -> int:
    """What libxl shall print as the reason, behind words of its own."""
    given = getattr(e, "errno", None)
    if given:
        return int(given)
    if isinstance(e, StreamError):
        return errno.EBADMSG
    return errno.ENOMEM if isinstance(e, MemoryError) else errno.EINVAL


def _words(e: Exception) -> str:
    if isinstance(e, OSError):
        reason = f"stopped by {_stopped[0].name}" if _stopped else e.strerror
        return f"{e.filename or 'the stream'}: {reason}"
    return str(e) or type(e).__name__


def xen() -> Mover:
    """The Xen that we run on. HostError where there is none."""
    from xenpv.host.xen.host import XenHost  # noqa: PLC0415

    return XenHost()


def main(argv: list[str], find_host: Callable[[], Mover] = xen) -> int:
    """Run as libxl does, with the arguments behind the program's name; the exit status."""
    if argv[:1] not in (["--save-domain"], ["--restore-domain"]):
        print("xenpv-save-helper is run by libxl: LIBXL_SAVE_HELPER=/path/to/xenpv-save-helper xl save|restore|migrate",
              file=sys.stderr)  # fmt: skip
        return EXIT_USAGE
    use_one_blas_thread()
    libxl = Libxl.at_standard_descriptors()
    try:
        try:
            request = protocol.arguments(argv)
        except RequestError as e:
            # Who asks for what is not known may number COMPLETE otherwise; LOG was always the first.
            libxl.log(Level.ERROR, str(e))
            return EXIT_REFUSED
        if isinstance(request, Save):
            _stop_by_signals(request.fd)
        else:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is lost: the new domain is removed by libxl
        serve(request, libxl, find_host)
    except LibxlGone as e:
        print(f"xenpv-save-helper: {e}", file=sys.stderr)
        return EXIT_GONE
    return 0


def run() -> NoReturn:
    """The console script. libxl waits for its end, while a migrated guest stands still: nothing is tidied up."""
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
