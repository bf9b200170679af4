"""Restores a domain from a stream: into an empty domain, or into a new one.

Records are carried out as they are read. Any error ends the restore, and the domain must then be destroyed:
restore_domain() does it, and the caller of restore() must.

Source: xen.git:tools/libs/guest/xg_sr_restore.c
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

from xenpv.abi.declare import Width
from xenpv.cpu.records import iter_refused_policies, raise_if_refused
from xenpv.errors import RequestError, SealBroken, Unsupported
from xenpv.frames import U64, DomId
from xenpv.host.protocol import CpuPolicy, DomainInfo, Mover, Ring, destroy_unfinished
from xenpv.io.checkpoint_buffer import CheckpointBuffer
from xenpv.io.progress import ProgressCallback
from xenpv.io.signals import uninterruptible
from xenpv.io.stream_input import Input
from xenpv.restore.finish import Ports, StreamComplete
from xenpv.restore.new_domain import OfferedDomain, plan_domain, raise_breach
from xenpv.restore.pages import DeferRead, MemoryLoader
from xenpv.source.config import Config
from xenpv.stream import rules
from xenpv.stream.contents import Contents
from xenpv.stream.envelope import Kind
from xenpv.stream.events import DomainHeader, Event, ImageHeader
from xenpv.stream.framing import Record
from xenpv.stream.libxl import LibxlRecord
from xenpv.stream.page_data import PageData, ReadInto
from xenpv.stream.reader import Reader
from xenpv.stream.record_order import Guest
from xenpv.stream.records import Checkpoint, End, StaticDataEnd, Verify, X86PVInfo, X86PVP2MFrames

StaticDataDone = Callable[[bool, bool], None]
"""static_data_done(cpuid_missing, msrs_missing): called once, before any page is read."""

# Records that are handled at once, even after a checkpoint.
_NEVER_BUFFERED = (Checkpoint, End, LibxlRecord)


class Restored(NamedTuple):
    """A restored domain, and figures of its stream.

    Attributes:
        console: Its console ring.
        xenstore: Its xenstore ring.
        config: Its configuration in the envelope, or None.
        entries: Number of entries of its p2m.
        pages: Pages that it holds.
        tables: How many of them are page tables.
        pinned: How many of these are pinned.
        checkpoints: Checkpoints of the stream. The domain has the state of the last one; later records are dropped.
        differing: pfns of pages that a VERIFY pass sent with other content, uint64.
        bytes: Length of the stream.
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
    """Restore a stream into an empty, paused domain, which stays paused.

    Args:
        host: The host of the domain.
        domid: The domain. Its width becomes that of the stream.
        source: The stream.
        console_port: The domain's event channel to xenconsoled.
        xenstore_port: The domain's event channel to xenstored.
        envelope: What wraps the stream (default: detected).
        static_data_done: Called after the static data. The domain has the stream's width by then, whatever it raises.
        progress: Called while the stream is read.

    Raises:
        StreamError: The stream breaks a rule.
        GuestError: The guest's memory or state contradicts itself.
        RequestError: The domain does not fit the stream.
        HostError: Xen refuses something.
        OSError: The source cannot be read.
    """

    def prepare_domain(_contents: Contents, width: Width) -> tuple[DomainInfo, Ports]:
        _check_empty_and_paused(host.info(domid))
        host.set_width(domid, width)  # libxl creates 64-bit domains only
        return host.info(domid), Ports(console_port, xenstore_port)

    return _Restore(host, source, prepare_domain, static_data_done).run(envelope, progress)


def restore_domain(
    host: Mover,
    source: Input,
    *,
    name: str | None = None,
    new_uuid: bool = False,
    offered: OfferedDomain | None = None,
    paused: bool = False,
    seal_key: bytes | None = None,
    progress: ProgressCallback | None = None,
) -> Restored:
    """Create a domain from a stream, introduce it to its daemons, and unpause it.

    Vcpus and memory are those of the configuration in the envelope. Without one, the stream itself is read twice, so it
    must be a file. After an error nothing of the domain is left.

    Args:
        host: The host on which the domain is created.
        source: The stream.
        name: Name of the domain (default: the configuration's).
        new_uuid: Give it a new uuid, so that it can run beside the domain that was saved.
        offered: What a sender has said of the domain, which the stream must keep to. None for a file.
        paused: Leave it paused.
        seal_key: Demand a seal that was made with this key, and covers the whole stream.
        progress: Called while the stream is read.

    Raises:
        RequestError: Another domain has the name or uuid, no domain can have them, or a pipe has no configuration;
            and as restore().
        StreamError, GuestError, HostError, OSError: As restore().
    """
    created: list[DomId] = []

    def create_domain(contents: Contents, width: Width) -> tuple[DomainInfo, Ports]:
        plan = plan_domain(host, contents, source, name=name, new_uuid=new_uuid, offered=offered)
        domid = host.create(width, vcpus=plan.vcpus, max_pages=plan.max_pages, name=plan.name, uuid=plan.uuid)
        created.append(domid)
        host.set_memory_map(domid, plan.pages)
        daemons = host.daemons()
        xenstore = host.alloc_event_channel(domid, daemons.xenstore)
        return host.info(domid), Ports(host.alloc_event_channel(domid, daemons.console), xenstore)

    try:
        restored = _Restore(host, source, create_domain, None).run(None, progress, seal_key)
        host.introduce(restored.domid, console=restored.console, xenstore=restored.xenstore)
        if restored.config is not None and restored.config.format == "json":
            host.set_configuration(restored.domid, restored.config.text.encode())
        if not paused:
            host.unpause(restored.domid)
    except BaseException as failure:
        with uninterruptible():
            for domid in created:
                destroy_unfinished(host, domid, failure)
        raise
    return restored


def _check_empty_and_paused(info: DomainInfo) -> None:
    """Raise RequestError for a domain that a stream cannot be restored into."""
    domain = f"dom{info.domid}"
    if info.hvm:
        raise RequestError(f"{domain} is an HVM domain, and the stream holds a PV domain")
    if not info.paused:
        raise RequestError(f"{domain} is running: pause the domain that a stream is restored into")
    if info.pages:
        problem = f"{domain} has {info.pages:#x} pages already: restore into an empty domain"
        raise RequestError(problem, needed=0, available=info.pages)


class _Restore:
    """One restore.

    ``prepare_domain(contents, width)`` gives the domain once the guest's width is known.
    """

    def __init__(
        self,
        host: Mover,
        source: Input,
        prepare_domain: Callable[[Contents, Width], tuple[DomainInfo, Ports]],
        static_data_done: StaticDataDone | None,
    ) -> None:
        self.host = host
        self.source = source
        self.prepare_domain = prepare_domain
        self.static_data_done = static_data_done
        self.contents = Contents()
        self._target: tuple[DomainInfo, Ports, MemoryLoader] | None = None
        self._resources = ExitStack()
        self._checkpoint_buffer: CheckpointBuffer | None = None  # events since the last checkpoint
        self._in_static_data = True

    def run(self, envelope: Kind | None, progress: ProgressCallback | None, seal_key: bytes | None = None) -> Restored:
        reader = Reader(on_breach=raise_breach, kind=envelope, seal_key=seal_key)
        with self._resources:
            for event in self.source.events(reader, progress, reads_pages=True):
                if isinstance(event, DomainHeader) and reader.is_legacy:
                    raise Unsupported("a legacy stream: `xenpv convert` makes a file of it", offset=event.offset)
                self._apply_or_buffer(event)
            self._memory.flush()
        if seal_key is not None and (gaps := reader.seal.gaps(keyed=True)):
            raise SealBroken("; ".join(gaps), offset=reader.offset, rule=rules.SEAL_COVERAGE.name)
        assert self._target is not None
        info, ports, memory = self._target
        completed = StreamComplete(self.host, info, self.contents, memory, ports).run()
        config = Config.from_contents(self.contents)
        return Restored(
            domid=info.domid,
            console=completed.console,
            xenstore=completed.xenstore,
            name=config.name if config else None,
            uuid=config.uuid if config else None,
            config=config,
            entries=self.contents.end_pfn + 1,
            pages=memory.physmap.populated,
            tables=completed.page_tables,
            pinned=completed.pinned,
            checkpoints=self.contents.checkpoints,
            differing=memory.differing,
            bytes=reader.offset,
        )

    def _apply_or_buffer(self, event: Event) -> None:
        """Apply an event at once.

        After the first checkpoint, buffer it until the next one.
        """
        if isinstance(event, Checkpoint):
            self._apply_checkpoint(event)
        if self._checkpoint_buffer is None or not isinstance(event, Record) or isinstance(event, _NEVER_BUFFERED):
            # Content of a file is read in the background. Not so of a pipe, where a read may never return.
            self._apply(event, self.source.read_into, self.source.defer_read if self.source.seekable else None)
        else:
            self._checkpoint_buffer.add(event, self.source.read_into)

    def _apply_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Apply what was buffered since the last checkpoint."""
        if self.source.exact:
            problem = "a checkpoint of Remus or COLO, which are not supported; `xenpv convert` keeps the last one"
            raise Unsupported(problem, offset=checkpoint.offset, record=checkpoint.name)
        if self._checkpoint_buffer is None:
            self._checkpoint_buffer = CheckpointBuffer()
            self._resources.callback(self._checkpoint_buffer.close)
        else:
            for event, read_into in self._checkpoint_buffer.events():
                self._apply(event, read_into)
            self._checkpoint_buffer.clear()

    def _apply(self, event: Event, read_into: ReadInto, defer_read: DeferRead | None = None) -> None:
        """Carry one event out."""
        if isinstance(event, PageData):
            self._memory.load(event, read_into, defer_read)
            return
        if isinstance(event, ImageHeader) and self.contents.image is not None:
            raise rules.breach(rules.REPEATED, "a second libxc stream", offset=event.offset, record=event.name)
        self.contents.add(event)
        match event:
            case DomainHeader() if event.guest is not Guest.PV:
                raise Unsupported("an HVM domain; only PV domains can be restored", offset=event.offset)
            case X86PVInfo():
                info, ports = self.prepare_domain(self.contents, event.guest_width)
                self._target = info, ports, self._resources.enter_context(MemoryLoader(self.host, info, self.contents))
            case StaticDataEnd():
                if self._target is None:
                    problem = "STATIC_DATA_END before X86_PV_INFO"
                    raise rules.breach(rules.ORDER, problem, offset=event.offset, record=event.name)
                self._end_static_data()
            case X86PVP2MFrames():
                self._end_static_data()  # streams of version 2 have no STATIC_DATA_END
            case Verify():
                self._memory.verify()

    @property
    def _memory(self) -> MemoryLoader:
        assert self._target is not None, "record_order.py lets no page come before X86_PV_INFO"
        return self._target[2]

    def _end_static_data(self) -> None:
        """Set the CPU policy, and report what is missing; only once."""
        if not self._in_static_data:
            return
        self._in_static_data = False
        raise_if_refused(iter_refused_policies(self.contents))
        cpuid, msrs = self.contents.cpuid_policy, self.contents.msr_policy
        if cpuid is not None or msrs is not None:
            policy = CpuPolicy(cpuid.data if cpuid else b"", msrs.data if msrs else b"")
            self.host.set_cpu_policy(self._memory.domid, policy)
        if self.static_data_done is not None:
            self.static_data_done(cpuid is None, msrs is None)
