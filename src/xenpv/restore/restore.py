"""A stream made a domain again: into one that is there already, or into a new one.

Nothing is known of a stream until it has come, so it is taken as it comes, and whatever is wrong ends it: then
the domain is to be destroyed, which ``restore_domain`` does and who calls ``restore`` must. xen.git:tools/libs/guest/
xg_sr_restore.c.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

from xenpv.abi.declare import Width
from xenpv.errors import RequestError, Unsupported
from xenpv.findings import Rule, Severity
from xenpv.frames import IS_POPULATED, U64, DomId
from xenpv.host.protocol import CpuPolicy, DomainInfo, Mover, Ring
from xenpv.host.xenstore_nodes import SLACK
from xenpv.io.checkpoint_buffer import Checkpoints
from xenpv.io.progress import ProgressCallback
from xenpv.io.stream_input import Input
from xenpv.restore.finish import Ports, RestoreEnd
from xenpv.restore.pages import Later, PagesIn
from xenpv.source.config import Config, config_of
from xenpv.stream import rules
from xenpv.stream.contents import Contents
from xenpv.stream.envelope import Kind
from xenpv.stream.events import DomainHeader, Event, ImageHeader
from xenpv.stream.framing import Record
from xenpv.stream.libxl import LibxlRecord
from xenpv.stream.order import Guest
from xenpv.stream.pagedata import PageData, ReadInto
from xenpv.stream.reader import Reader
from xenpv.stream.records import Checkpoint, End, StaticDataEnd, Verify, X86PVInfo, X86PVP2MFrames

StaticDataDone = Callable[[bool, bool], None]
"""static_data_done(no CPUID policy came, no MSR policy came): called once, before any page."""


_NEVER_KEPT = (Checkpoint, End, LibxlRecord)


class Restored(NamedTuple):
    """A domain as a restore leaves it, and what the stream had.

    ``entries`` are those of its p2m, ``pages`` what it was given; ``tables`` of them are page tables, ``pinned`` of
    these are pinned. ``checkpoints``: how many there were; what came behind the last one is not in the domain, whose
    state that checkpoint is. ``differing``: pfns of pages that came again behind a VERIFY record, and were others.
    ``config`` is what the envelope says of it, None where it says nothing; ``bytes`` is the length of the stream.
    """

    domid: DomId
    console: Ring
    xenstore: Ring
    name: str | None
    uuid: str | None
    config: Config | None
    entries: int
    pages: int
    tables: int
    pinned: int
    checkpoints: int
    differing: U64
    bytes: int


def restore(
    host: Mover,
    domid: DomId,
    source: Input,
    *,
    console_port: int,
    xenstore_port: int,
    envelope: Kind | None = None,
    static_data_done: StaticDataDone | None = None,
    progress: ProgressCallback | None = None,
) -> Restored:
    """Fill a domain that is empty and paused, and leave it ready to be unpaused; nothing else is done to it.

    ``envelope``: what the stream is wrapped in, told by looking if None. Raises StreamError for a stream that is not
    right, GuestError for a guest that cannot be made of it, RequestError for a domain that it does not fit, HostError
    when Xen says no, OSError when the source cannot be read. The domain is not to be started then.
    """

    def given(_contents: Contents, width: Width) -> tuple[DomainInfo, Ports]:
        _check_target(host.info(domid))
        host.set_width(domid, width)  # libxl leaves that to whoever reads the stream
        return host.info(domid), Ports(console_port, xenstore_port)

    return _Restore(host, source, given, static_data_done).run(envelope, progress)


def restore_domain(
    host: Mover,
    source: Input,
    *,
    name: str | None = None,
    paused: bool = False,
    progress: ProgressCallback | None = None,
) -> Restored:
    """A new domain out of a stream, introduced to its daemons, and running unless ``paused``.

    It is what the configuration in the envelope says, ``name`` aside; where there is none, what the stream itself has,
    which takes a file. Raises as ``restore``: there is no new domain then, and nothing of it.
    """
    made: list[DomId] = []

    def new(contents: Contents, width: Width) -> tuple[DomainInfo, Ports]:
        config = config_of(contents)
        vcpus, pages = _size(config, source)
        called = name or (config.name if config else None)
        for other in host.domains():
            if called is not None and other.name == called:
                raise RequestError(f"a domain called {called!r} is there already, dom{other.domid}: say another name")
        uuid = config.uuid if config else None
        domid = host.create(width, vcpus=vcpus, max_pages=pages + SLACK, name=called, uuid=uuid)
        made.append(domid)
        host.set_memory_map(domid, pages)
        daemons = host.daemons()
        xenstore = host.alloc_event_channel(domid, daemons.xenstore)
        return host.info(domid), Ports(host.alloc_event_channel(domid, daemons.console), xenstore)

    try:
        restored = _Restore(host, source, new, None).run(None, progress)
        host.introduce(restored.domid, console=restored.console, xenstore=restored.xenstore)
        if restored.config is not None and restored.config.format == "json":
            host.set_configuration(restored.domid, restored.config.text.encode())
        if not paused:
            host.unpause(restored.domid)
    except BaseException:
        for domid in made:
            host.destroy(domid)
        raise
    return restored


def _check_target(info: DomainInfo) -> None:
    who = f"dom{info.domid}"
    if info.hvm:
        raise RequestError(f"{who} is an HVM domain, and the stream has a PV one")
    if not info.paused:
        raise RequestError(f"{who} is running: a stream is restored into a domain that is paused")
    if info.pages:
        raise RequestError(f"{who} has {info.pages:#x} pages already: a stream is restored into an empty domain")


def _size(config: Config | None, source: Input) -> tuple[int, int]:
    """How many vcpus and pages the domain may have."""
    vcpus, kib = (config.max_vcpus, config.max_memkb) if config else (None, None)
    if vcpus is None or kib is None:
        if not source.seekable:
            what = f"{source.name} has no configuration that says how many vcpus and how much memory the domain has"
            raise RequestError(f"{what}, and what the stream has is known only at its end: restore it from a file")
        shown = Contents()
        for event in source.events(Reader(on_breach=_pass)):
            shown.add(event)
        kinds = shown.index.count()
        vcpus = max(shown.vcpus, default=0) + 1 if vcpus is None else vcpus
        kib = 4 * sum(n for kind, n in kinds.items() if IS_POPULATED[kind]) if kib is None else kib
    return vcpus, -(-kib // 4)


def _pass(rule: Rule, message: str, offset: int, record: str | None) -> None:
    """A breach of a rule ends the stream, but for a checkpoint: those are taken here."""
    if rule.severity is Severity.ERROR and rule is not rules.CHECKPOINT:
        raise rules.breach(rule, message, offset=offset, record=record)


class _Restore:
    """One restore. ``target(contents, width)`` says which domain to fill, as soon as the guest's width is known."""

    def __init__(
        self,
        host: Mover,
        source: Input,
        target: Callable[[Contents, Width], tuple[DomainInfo, Ports]],
        static_data_done: StaticDataDone | None,
    ) -> None:
        self.host = host
        self.source = source
        self.target = target
        self.static_data_done = static_data_done
        self.contents = Contents()
        self._into: tuple[DomainInfo, Ports, PagesIn] | None = None
        self._open = ExitStack()
        self._checkpoints: Checkpoints | None = None  # what came behind the last checkpoint
        self._static = True  # data that comes before all pages still comes

    def run(self, kind: Kind | None, progress: ProgressCallback | None) -> Restored:
        reader = Reader(on_breach=_pass, kind=kind)
        with self._open:
            for event in self.source.events(reader, progress, taking=True):
                self._sort(event)
            self._pages.settle()
        assert self._into is not None
        info, ports, pages = self._into
        end = RestoreEnd(self.host, info, self.contents, pages, ports)
        console, xenstore = end.run()
        config = config_of(self.contents)
        return Restored(
            domid=info.domid,
            console=console,
            xenstore=xenstore,
            name=config.name if config else None,
            uuid=config.uuid if config else None,
            config=config,
            entries=self.contents.end_pfn + 1,
            pages=pages.physmap.pages,
            tables=end.tables,
            pinned=end.pinned,
            checkpoints=self.contents.checkpoints,
            differing=pages.differing,
            bytes=reader.offset,
        )

    def _sort(self, event: Event) -> None:
        """What comes before the first checkpoint counts at once, what comes behind it if another checkpoint follows."""
        if isinstance(event, Checkpoint):
            if self.source.exact:
                what = "a checkpoint, behind which the stream is the toolstack's: Remus and COLO are not received"
                raise Unsupported(what, offset=event.offset, record=event.name)
            if self._checkpoints is None:
                self._checkpoints = Checkpoints()
                self._open.callback(self._checkpoints.close)
            else:
                for kept, take in self._checkpoints.release():
                    self._see(kept, take)
        if self._checkpoints is None or not isinstance(event, Record) or isinstance(event, _NEVER_KEPT):
            # Of a file the content is read while the next record is looked at; a read of a pipe may never come back.
            self._see(event, self.source.take, self.source.later if self.source.seekable else None)
        else:
            self._checkpoints.keep(event, self.source.take)

    def _see(self, event: Event, take: ReadInto, later: Later | None = None) -> None:
        if isinstance(event, PageData):
            self._pages.put(event, take, later)
            return
        if isinstance(event, ImageHeader) and self.contents.image is not None:
            raise rules.breach(rules.REPEATED, "a second libxc stream", offset=event.offset, record=event.name)
        self.contents.add(event)
        match event:
            case DomainHeader() if event.guest is not Guest.PV:
                raise Unsupported("a saved HVM domain; PV domains are restored", offset=event.offset)
            case X86PVInfo():
                info, ports = self.target(self.contents, event.guest_width)
                self._into = info, ports, self._open.enter_context(PagesIn(self.host, info.domid))
            case StaticDataEnd():
                if self._into is None:
                    what = "STATIC_DATA_END before X86_PV_INFO"
                    raise rules.breach(rules.ORDER, what, offset=event.offset, record=event.name)
                self._end_of_static_data()
            case X86PVP2MFrames():
                self._end_of_static_data()  # which a stream of version 2 does not say
            case Verify():
                self._pages.compare = True

    @property
    def _pages(self) -> PagesIn:
        assert self._into is not None, "order.py lets no page come before X86_PV_INFO"
        return self._into[2]

    def _end_of_static_data(self) -> None:
        if not self._static:
            return
        self._static = False
        cpuid, msrs = self.contents.cpuid_policy, self.contents.msr_policy
        if cpuid is not None or msrs is not None:
            policy = CpuPolicy(cpuid.data if cpuid else b"", msrs.data if msrs else b"")
            self.host.set_cpu_policy(self._pages.domid, policy)
        if self.static_data_done is not None:
            self.static_data_done(cpuid is None, msrs is None)
