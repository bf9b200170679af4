"""``xenpv demo``: the main job, on a model of Xen and on a real saved domain that both come with the package."""

from __future__ import annotations

import lzma
import socket
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from uuid import UUID

import click
import numpy as np

from xenpv.build.build import build
from xenpv.cli.outcomes import describe_rollback
from xenpv.cli.p2m import describe, print_p2m
from xenpv.cli.terminal import NUMBER, progress_bar
from xenpv.cli.verify import summary
from xenpv.errors import GuestError, RequestError
from xenpv.findings import Finding, Findings
from xenpv.frames import DomId
from xenpv.guest_model.kernel import Kernel
from xenpv.guest_model.p2m_forms import FORMS, parse_form
from xenpv.host.model.guest_view import GuestView
from xenpv.host.model.host import ModelHost
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import Layout, Part, plan
from xenpv.image.request import Request
from xenpv.memory.digest import Digest, digest
from xenpv.memory.survey import survey
from xenpv.migrate.receiver import receive_domain
from xenpv.migrate.sender import send_domain
from xenpv.migrate.transport import Link
from xenpv.save.file import configuration, save_file
from xenpv.save.precopy import PrecopyPolicy
from xenpv.save.source_domain import Rollback
from xenpv.source.config import libxl_config
from xenpv.source.live import LiveDomain
from xenpv.text import size
from xenpv.verify.physmap import PhysmapCheck
from xenpv.verify.stream import verify

SAVED = "demo.save.xz"  # tests/vectors/README.md has the command that made it
KERNEL = "demo.elf.xz"  # guests/litmus/build/litmus.elf
_OTHERS = 8 << 30  # bytes of the host that are not the domain's
_BUSY = 10_000  # pages that its guest works on


@click.command()
@click.option("--p2m", "form", default="linear", show_default=True, type=click.Choice(list(FORMS)), metavar="FORM",
              help=f"How its kernel shows its p2m: {', '.join(FORMS)}.")  # fmt: skip
@click.option(
    "--memory", type=NUMBER, default=600 << 30, metavar="SIZE", help="Memory of the domain; 600G unless said."
)
@click.option("-o", "output", type=click.Path(), metavar="FILE",
              help="Keep the file that the domain is saved to: 2.4 GiB for 600.")  # fmt: skip
def demo(form: str, memory: int, output: str | None) -> int:
    """A PV domain of 600 GiB built, saved, verified and live-migrated without a hypervisor; and a real one verified.

    \b
    xenpv demo --p2m rooted4           the tree of any depth that was proposed in 2014
    xenpv demo --p2m tree3             a tree of three levels ends at 512 GiB, and says so
    xenpv demo --p2m tree4hidden       a kernel that shows less than it has is refused, in words
    """
    with tempfile.TemporaryDirectory(prefix="xenpv-demo-") as folder:
        ok = _large(form, memory, output or f"{folder}/demo.save") and _saved()
    click.echo("\nNext, with files of your own:  xenpv verify FILE    xenpv image KERNEL    xenpv layout KERNEL")
    click.echo("and in dom0:  xenpv list    xenpv check DOM    xenpv build KERNEL --start    xenpv migrate DOM HOST")
    return 0 if ok else 1


def _large(form: str, memory: int, path: str) -> bool:
    image = KernelImage.parse(lzma.decompress(files("xenpv.cli").joinpath(KERNEL).read_bytes()))
    layout = plan(image, Request(memory, cmdline=f"p2m={form}"))
    _title(f"A PV domain of {size(memory)}, laid out")
    _say_layout(layout)
    host = ModelHost(memory + _OTHERS, sparse=True)
    with progress_bar() as bar:
        uuid = str(UUID(int=0x5EED))
        config = libxl_config("demo", uuid, pages=layout.nr_pages, vcpus=layout.vcpus)
        domid = build(host, image, layout, name="demo", uuid=uuid, config=config, progress=bar).domid
    host.unpause(domid)
    _title("Built on a model of Xen's memory rules, and started")
    guest = _Guest(host, domid, Kernel(parse_form(form)), layout.nr_pages)
    try:
        guest.start()
    except RequestError as e:
        _say(f"its kernel cannot show its p2m that way: {e}")
        return False
    try:
        live = guest.live
        found = survey(live.p2m, 64 * 8)
        print_p2m(describe(live, live.p2m, found), found)
        _title("Suspended, saved to a file, and verified; then it goes on")
        return guest.kept(path) and guest.moved(ModelHost(memory + _OTHERS, seed=1, sparse=True))
    except (GuestError, RequestError) as e:
        _say(f"that cannot be done: {e}")
        return False


@dataclass
class _Guest:
    """A guest that works: it writes to some of its pages, always others, whenever time passes."""

    host: ModelHost
    domid: DomId
    kernel: Kernel
    nr_pages: int
    counter: int = 0
    leaving: bool = False
    last: Digest | None = None  # of its own pages, when it suspended in order to leave

    def __post_init__(self) -> None:
        half = self.nr_pages // 2
        self.pages = np.arange(half, self.nr_pages, max(half // _BUSY, 1), dtype=np.uint64)

    @property
    def live(self) -> LiveDomain:
        return LiveDomain(self.host, self.host.info(self.domid))

    def start(self) -> None:
        self.host.run(self.domid, self.kernel.boot)
        self.host.run(self.domid, lambda view: self.kernel.write_pattern(view, self.pages, 0))
        self.host.set_time_slice(self.domid, self.work)

    def work(self) -> None:
        """Write to a fifth of the pages, and suspend if it is asked to."""
        self.counter += 1
        some = self.pages[self.counter % 5 :: 5]

        def do(view: GuestView) -> None:
            self.kernel.write_pattern(view, some, self.counter)
            self.kernel.poll(view)

        self.host.run(self.domid, do)
        if self.leaving and self.live.info.shutdown:
            self.last = self.digest()

    def digest(self) -> Digest:
        """Of all pages that are not its kernel's own, whose tables hold mfns."""
        live = self.live
        return digest(live.frames, live.iter_types(self.kernel.pages.end), self.pages[:0])

    def kept(self, path: str) -> bool:
        with progress_bar() as bar:
            done = save_file(self.host, self.domid, path, keep=True, on_rollback=_say_rollback, progress=bar).summary
        self.host.run(self.domid, self.kernel.resume)
        pages = f"{done.pages} pages with content, {done.page_tables} of them page tables"
        _say(f"{pages}, and {done.without_content} without: {size(done.bytes)}")
        return _verified(path, Path(path).name)

    def moved(self, target: ModelHost) -> bool:
        _title("Live-migrated to another model host while it writes to its memory")
        self.leaving = True
        one, other = socket.socketpair()
        config = configuration(self.host, self.domid)
        with Link.of_socket(one, "there") as here, Link.of_socket(other, "here") as there, progress_bar() as bar:
            receiver = threading.Thread(target=receive_domain, args=(target, there))
            receiver.start()
            sent = send_domain(self.host, self.domid, here, config=config, live=PrecopyPolicy(), progress=bar)
            receiver.join()
        done = sent.summary
        _say(f"{done.iterations} iterations, {done.pages} pages with content in all, {size(done.bytes)}")
        assert sent.domid is not None
        self.host, self.domid = target, sent.domid
        target.run(self.domid, self.kernel.resume)
        same = self.last is not None and self.digest() == self.last
        how = "the same" if same else "NOT the same"
        _say(f"{self.last.pages if self.last else 0} pages are {how} here as they were there (by digest)")
        return same and self._right()

    def _right(self) -> bool:
        """Whether its p2m is right."""
        live, findings = self.live, Findings(3)
        with progress_bar("checking its p2m") as bar:
            PhysmapCheck(live, findings, owner=False, progress=bar).run()  # the digest is of what Xen says is its own
        _say_findings(findings)
        if not findings.errors:
            _say("every entry of its p2m agrees with the m2p, and every frame of the domain is in it")
        return not findings.errors


def _say_layout(layout: Layout) -> None:
    p2m = layout.segment(Part.P2M)
    assert p2m is not None
    tables = sum(span.count for span in layout.tables)
    mapped = layout.mapping_end - layout.virt_base
    where = "outside" if layout.p2m_outside else "inside"
    _say(f"initial mapping  {layout.virt_base:#x} to {layout.mapping_end:#x} ({size(mapped)})")
    _say(f"p2m list         {size(p2m.size)} at {p2m.vaddr:#x}, {where} the initial mapping")
    _say(f"page tables      {tables}")


def _saved() -> bool:
    _title("A domain that stock xl saved on real Xen, verified")
    with tempfile.NamedTemporaryFile(prefix="xenpv-demo-", suffix=".save") as file:
        file.write(lzma.decompress(files("xenpv.cli").joinpath(SAVED).read_bytes()))
        file.flush()
        return _verified(file.name, "demo.save")


def _verified(path: str, name: str) -> bool:
    with progress_bar("verifying") as bar:
        report = verify(path, progress=bar)
    report.name = name
    _say_findings(report.findings)
    _say(summary(report))
    return report.ok


def _say(text: str) -> None:
    click.echo(f"  {text}")


def _say_rollback(rollback: Rollback) -> None:
    _say(describe_rollback(rollback))


def _say_findings(findings: Iterable[Finding]) -> None:
    for finding in findings:
        _say(f"{finding.severity}: {finding}")


def _title(text: str) -> None:
    click.echo(click.style(f"\n{text}", bold=True))
