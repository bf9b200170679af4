"""Saves a domain to a file; then the domain is destroyed, or runs on as before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xenpv.errors import HostError, XenPVError
from xenpv.frames import PAGE_SIZE, DomId
from xenpv.host.protocol import Mover
from xenpv.io.atomic_output import Output
from xenpv.io.file_kind import FileKind
from xenpv.io.progress import ProgressCallback
from xenpv.io.signals import uninterruptible
from xenpv.save.save import Summary, inspect_p2m, save
from xenpv.save.source_domain import DepartingDomain, Rollback, SourceState
from xenpv.source.config import libxl_config
from xenpv.stream.seal import Sealer

_OTHER_RECORDS = 16 << 10  # bytes of a file that are neither pages nor vcpus, about
_VCPU_RECORDS = 8 << 10  # bytes per vcpu, about


@dataclass(frozen=True)
class Preflight:
    """What a save would write.

    Attributes:
        name: The domain, for people: "dom5 (web)".
        form: The forms of its p2m, in words.
        entries: Entries of the p2m up to its last page.
        pages: Pages with a frame.
        foreign: Entries that the guest marked as frames of other domains.
        identity: Entries that the guest marked as identity-mapped.
        bytes: The approximate size of the file.
    """

    name: str
    form: str
    entries: int
    pages: int
    foreign: int
    identity: int
    bytes: int


@dataclass(frozen=True)
class SavedFile:
    """A finished save: bytes and pages, downtime in seconds, the domain's state."""

    summary: Summary
    downtime: float
    state: SourceState


def preflight(host: Mover, domid: DomId, *, libxc_compatible: bool = True) -> Preflight:
    """Check that a domain can be saved, as far as a running one shows it.

    Raises as save().
    """
    DepartingDomain(host, domid).check()
    tracker = inspect_p2m(host, domid, libxc_compatible=libxc_compatible)
    info, p2m, counts = host.info(domid), tracker.p2m, tracker.counts
    size = (
        counts.populated * (8 + PAGE_SIZE) + p2m.leaf_count * 8 + (info.max_vcpu + 1) * _VCPU_RECORDS + _OTHER_RECORDS
    )
    return Preflight(
        name=tracker.live.name,
        form=tracker.live.anchors.form_names,
        entries=p2m.entries,
        pages=counts.populated,
        foreign=counts.foreign,
        identity=counts.identity,
        bytes=size,
    )


def configuration(host: Mover, domid: DomId) -> bytes:
    """Return the domain's configuration as libxl's JSON.

    It is xl's own, otherwise one made from what Xen knows.
    """
    info = host.info(domid)
    stored = host.configuration(domid)
    if stored is not None:
        return stored
    vcpus = info.max_vcpu + 1
    name, uuid = info.name or f"domain-{domid}", info.uuid or "00000000-0000-0000-0000-000000000000"
    return libxl_config(name, uuid, pages=info.pages, vcpus=vcpus)


def save_file(
    host: Mover,
    domid: DomId,
    path: str,
    *,
    suspend_timeout: float = 60.0,
    keep: bool = False,
    paused: bool = False,
    force: bool = False,
    libxc_compatible: bool = True,
    seal: Sealer | None = None,
    on_rollback: Callable[[Rollback], None] = lambda _: None,
    progress: ProgressCallback | None = None,
) -> SavedFile:
    """Suspend a domain, save it to a file and destroy it.

    If the save fails, the domain is rolled back, ``on_rollback`` learns how that went, and there is no file.

    Args:
        host: The host that has the domain.
        domid: The domain.
        path: The file; "-" is standard output.
        suspend_timeout: Seconds that the guest has to suspend.
        keep: Let the domain run on after the save instead of destroying it.
        paused: With ``keep``, leave it paused.
        force: Replace an existing file even if it is no saved domain.
        libxc_compatible: As save() has it.
        seal: Seals the file.
        on_rollback: Receives the result of a rollback.
        progress: Receives the progress.

    Raises:
        XenPVError: As save() and suspend(). With a complete file: the domain could not be destroyed or, with ``keep``,
            not be resumed or paused.
        OSError: The file could not be written.
        RollbackError: The save failed, and the domain could not be rolled back.
    """
    domain = DepartingDomain(host, domid, suspend_timeout=suspend_timeout)
    domain.check()
    config = configuration(host, domid)
    out = Output.open(path, replaces={FileKind.SAVED_DOMAIN}, force=force)
    try:
        summary = save(
            host,
            domid,
            out,
            config=config,
            suspend=None if domain.was_suspended else domain.suspend,
            libxc_compatible=libxc_compatible,
            seal=seal,
            progress=progress,
        )
        with uninterruptible():
            out.finish()
    except BaseException as e:
        with uninterruptible():
            out.abandon()
            domain.rollback_after(e, on_rollback)
        raise
    with uninterruptible():
        state = _let_run(domain, path, paused=paused) if keep else _destroy(domain, path)
    return SavedFile(summary, domain.downtime, state)


def _let_run(domain: DepartingDomain, path: str, *, paused: bool) -> SourceState:
    """Resume a saved domain, paused or not."""
    try:
        try:
            if paused:
                domain.host.pause(domain.domid)
        finally:
            state = domain.rollback()
    except XenPVError as e:
        problem = f"{path} is complete, but {domain.label} could not be resumed{' paused' if paused else ''}: {e}"
        raise HostError(problem, op="resume", domid=domain.domid, errno=getattr(e, "errno", None)) from e
    return state


def _destroy(domain: DepartingDomain, path: str) -> SourceState:
    try:
        domain.host.destroy(domain.domid)
    except HostError as e:
        problem = f"{path} is complete, but {domain.label} could not be destroyed: {e}"
        hint = f"destroy it before you restore it: xl destroy {domain.domid}"
        raise HostError(f"{problem}; {hint}", op="destroy", domid=domain.domid, errno=e.errno) from e
    return SourceState.DESTROYED
