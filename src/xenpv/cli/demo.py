"""``xenpv demo``: a domain's whole life on a model of Xen, and a saved domain.

Both come with the package.
"""

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
from xenpv.cli.terminal import NUMBER, print_field, progress_bar
from xenpv.cli.verify import summary as verdict_of
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
from xenpv.memory.p2m_survey import survey
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
_OTHER_MEMORY = 8 << 30  # bytes of the host that are not the domain's
_WORKING_SET = 10_000  # pages that the guest writes to
_MAP_CELLS = 64 * 8


@click.command()
@click.option("--p2m", "form", default="linear", show_default=True, type=click.Choice(list(FORMS)), metavar="FORM",
              help=f"Form in which the kernel exposes its p2m: {', '.join(FORMS)}.")  # fmt: skip
@click.option("--memory", type=NUMBER, default="600G", show_default=True, metavar="SIZE", help="Memory of the domain.")
@click.option("-o", "output", type=click.Path(), metavar="FILE",
              help="Keep the save file of the domain (2.4 GiB for 600G).")  # fmt: skip
def demo(form: str, memory: int, output: str | None) -> int:
    """Build, save, verify and migrate a 600 GiB PV domain on a model of Xen.

    Then verify a real saved domain.

    Needs no hypervisor. The save file takes 2.4 GiB of disk.

    \b
    Examples:
      xenpv demo
      xenpv demo --p2m rooted4           the tree of any depth that was proposed in 2014
      xenpv demo --p2m tree3             refused: three levels reach 512 GiB
      xenpv demo --p2m tree4hidden       refused: the kernel exposes fewer levels than it uses
      xenpv demo --memory 1G -o demo.save
    """
    with tempfile.TemporaryDirectory(prefix="xenpv-demo-") as folder:
        ok = _show_large_domain(form, memory, output or f"{folder}/demo.save") and _show_real_domain()
    click.echo("\nNext, with your own files:  xenpv verify FILE    xenpv image KERNEL    xenpv layout KERNEL")
    click.echo("and in dom0:  xenpv list    xenpv check DOM    xenpv build KERNEL --start    xenpv migrate DOM HOST")
    return 0 if ok else 1


def _show_large_domain(form: str, memory: int, path: str) -> bool:
    """Build, start, save, verify and migrate a domain; return whether all went well."""
    image = KernelImage.parse(_packaged_file(KERNEL))
    layout = plan(image, Request(memory, cmdline=f"p2m={form}"))
    _print_title(f"The layout of a PV domain of {size(memory)}")
    _print_layout(layout)
    host = ModelHost(memory + _OTHER_MEMORY, sparse=True)
    with progress_bar() as bar:
        uuid = str(UUID(int=0x5EED))
        config = libxl_config("demo", uuid, pages=layout.nr_pages, vcpus=layout.vcpus)
        domid = build(host, image, layout, name="demo", uuid=uuid, config=config, progress=bar).domid
    host.unpause(domid)
    _print_title("Built and started on a model of Xen's memory rules")
    guest = _Guest(host, domid, Kernel(parse_form(form)), layout.nr_pages)
    try:
        guest.start()
        domain = guest.domain
        content = survey(domain.p2m, _MAP_CELLS)
        print_p2m(describe(domain, domain.p2m, content), content)
        _print_title("Suspended, saved to a file, verified, and resumed")
        return guest.save(path) and guest.migrate(ModelHost(memory + _OTHER_MEMORY, seed=1, sparse=True))
    except (GuestError, RequestError) as e:
        _print(f"refused: {e}")
        return False


@dataclass
class _Guest:
    """A running guest that writes to some of its pages as time passes.

    Each time slice writes to a different fifth of its working set.
    """

    host: ModelHost
    domid: DomId
    kernel: Kernel
    nr_pages: int
    counter: int = 0
    migrating: bool = False
    digest_before: Digest | None = None  # of its data pages, when it suspended for the migration

    def __post_init__(self) -> None:
        half = self.nr_pages // 2
        self.pages = np.arange(half, self.nr_pages, max(half // _WORKING_SET, 1), dtype=np.uint64)

    @property
    def domain(self) -> LiveDomain:
        """The domain as xenpv opens a running one."""
        return LiveDomain(self.host, self.host.info(self.domid))

    def start(self) -> None:
        """Boot the kernel, which writes a pattern to its working set."""
        self.host.run(self.domid, self.kernel.boot)
        self.host.run(self.domid, lambda view: self.kernel.write_pattern(view, self.pages, 0))
        self.host.set_time_slice(self.domid, self.work)

    def work(self) -> None:
        """Write to a fifth of the working set, and suspend if the toolstack asks for it."""
        self.counter += 1
        pfns = self.pages[self.counter % 5 :: 5]

        def run_vcpu(view: GuestView) -> None:
            self.kernel.write_pattern(view, pfns, self.counter)
            self.kernel.poll(view)

        self.host.run(self.domid, run_vcpu)
        if self.migrating and self.domain.info.shutdown:
            self.digest_before = self.digest()

    def digest(self) -> Digest:
        """Return the digest of all pages after the kernel's own.

        The kernel's own page tables hold mfns, which differ between hosts.
        """
        domain = self.domain
        return digest(domain.frames, domain.iter_types(self.kernel.pages.end), self.pages[:0])

    def save(self, path: str) -> bool:
        """Save the domain, resume it, and verify the file."""
        with progress_bar() as bar:
            summary = save_file(
                self.host, self.domid, path, keep=True, on_rollback=_print_rollback, progress=bar
            ).summary
        self.host.run(self.domid, self.kernel.resume)
        pages = f"{summary.pages} pages with content, {summary.page_tables} of them page tables"
        _print(f"{pages}, and {summary.without_content} without: {size(summary.bytes)}")
        return _verify(path, Path(path).name)

    def migrate(self, target: ModelHost) -> bool:
        """Migrate the domain while it writes, and check it on the other host.

        Its memory must be equal, and its p2m sound.
        """
        _print_title("Live-migrated to another model host while the guest writes to its memory")
        self.migrating = True
        source_end, target_end = socket.socketpair()
        config = configuration(self.host, self.domid)
        with (
            Link.of_socket(source_end, "the target") as to_target,
            Link.of_socket(target_end, "the source") as to_source,
            progress_bar() as bar,
        ):
            receiver = threading.Thread(target=receive_domain, args=(target, to_source))
            receiver.start()
            sent = send_domain(self.host, self.domid, to_target, config=config, live=PrecopyPolicy(), progress=bar)
            receiver.join()
        summary = sent.summary
        _print(f"{summary.iterations} iterations, {summary.pages} pages with content in all, {size(summary.bytes)}")
        assert sent.domid is not None
        self.host, self.domid = target, sent.domid
        target.run(self.domid, self.kernel.resume)
        same = self.digest_before is not None and self.digest() == self.digest_before
        pages = self.digest_before.pages if self.digest_before else 0
        _print(f"{pages} pages are {'the same' if same else 'NOT the same'} on both hosts (by digest)")
        return same and self._check_p2m()

    def _check_p2m(self) -> bool:
        """Cross-check the p2m and the M2P; return whether they agree."""
        findings = Findings(3)
        with progress_bar("checking the p2m") as bar:
            # The digest has shown already that each frame is the domain's.
            PhysmapCheck(self.domain, findings, owner=False, progress=bar).run()
        _print_findings(findings)
        if not findings.errors:
            _print("p2m and m2p agree in every entry, and every frame of the domain has a pfn")
        return not findings.errors


def _print_layout(layout: Layout) -> None:
    p2m = layout.segment(Part.P2M)
    assert p2m is not None
    page_tables = sum(span.count for span in layout.tables)
    mapped = layout.mapping_end - layout.virt_base
    place = "outside" if layout.p2m_outside else "inside"
    print_field("mapping", f"{layout.virt_base:#x} to {layout.mapping_end:#x} ({size(mapped)})")
    print_field("p2m list", f"{size(p2m.size)} at {p2m.vaddr:#x}, {place} the initial mapping")
    print_field("page tables", f"{page_tables}")


def _packaged_file(name: str) -> bytes:
    return lzma.decompress(files("xenpv.cli").joinpath(name).read_bytes())


def _show_real_domain() -> bool:
    """Verify a domain that xl saved; return whether it would restore."""
    _print_title("A domain that xl saved on real Xen, verified")
    with tempfile.NamedTemporaryFile(prefix="xenpv-demo-", suffix=".save") as file:
        file.write(_packaged_file(SAVED))
        file.flush()
        return _verify(file.name, "demo.save")


def _verify(path: str, name: str) -> bool:
    """Verify a file, print the result, and return whether it would restore."""
    with progress_bar("verifying") as bar:
        report = verify(path, progress=bar)
    report.name = name
    _print_findings(report.findings)
    _print(verdict_of(report))
    return report.ok


def _print(text: str) -> None:
    click.echo(f"  {text}")


def _print_rollback(rollback: Rollback) -> None:
    _print(describe_rollback(rollback))


def _print_findings(findings: Iterable[Finding]) -> None:
    for finding in findings:
        _print(f"{finding.severity}: {finding}")


def _print_title(title: str) -> None:
    click.echo(click.style(f"\n{title}", bold=True))
