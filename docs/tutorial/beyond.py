"""A PV domain with pages beyond 512 GiB on the model of Xen: built, started, saved to a file and live-migrated.

Usage: python beyond.py FORM FILE    FORM: linear, rooted4, marked, tree3, tree4hidden, none
"""

import socket
import sys
import threading
from pathlib import Path
from uuid import UUID

from xenpv.build.build import build
from xenpv.errors import XenPVError
from xenpv.guest_model.kernel import Kernel
from xenpv.host.model.host import ModelHost
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import plan
from xenpv.image.request import Request
from xenpv.migrate.receiver import receive_domain
from xenpv.migrate.sender import send_domain
from xenpv.migrate.transport import Link
from xenpv.save.file import configuration, save_file
from xenpv.save.precopy import PrecopyPolicy
from xenpv.source.config import as_libxl

MEMORY = 64 << 20  # what the domain has
STRETCH = 640 << 30  # where its last page lies


def main(form: str, path: str) -> None:
    """Tell the story for one form of p2m."""
    image = KernelImage.parse(Path("kernel.elf").read_bytes())
    layout = plan(image, Request(MEMORY))
    host, kernel = ModelHost(MEMORY + (1 << 30)), Kernel(form)
    uuid = str(UUID(int=0x5EED))
    config = as_libxl("far", uuid, pages=layout.nr_pages, vcpus=layout.vcpus)
    domid = build(host, image, layout, name="far", uuid=uuid, config=config).domid
    print(f"built: {layout.nr_pages} pages, p2m of {layout.p2m_entries} entries")

    # The kernel starts, publishes its p2m, and moves its free pages to 64 places below 640 GiB.
    host.unpause(domid)
    host.run(domid, kernel.boot)
    pfns = host.run(domid, lambda view: kernel.spread(view, STRETCH >> 12))
    host.run(domid, lambda view: kernel.write_pattern(view, pfns, 1))
    print(f"spread: {len(pfns)} pages, the last at pfn {int(pfns[-1]):#x} ({int(pfns[-1]) >> 18} GiB)")

    # While time passes, the guest dirties a few of its pages, and suspends when it is asked to.
    def work() -> None:
        host.run(domid, lambda view: kernel.write_pattern(view, pfns[:100], 2))
        host.run(domid, kernel.poll)

    host.set_time_slice(domid, work)
    saved = save_file(host, domid, path, keep=True).summary
    host.run(domid, kernel.resume)
    print(f"saved: {saved.pages} pages in {Path(path).stat().st_size >> 20} MiB")

    # A second host takes it over a socket.
    target = ModelHost(MEMORY + (1 << 30), seed=1)
    one, other = socket.socketpair()
    with Link.of_socket(one, "there") as here, Link.of_socket(other, "here") as there:
        receiver = threading.Thread(target=receive_domain, args=(target, there))
        receiver.start()
        moved = send_domain(host, domid, here, config=configuration(host, domid), live=PrecopyPolicy())
        receiver.join()
    target.run(moved.domid, kernel.resume)
    wrong = target.run(moved.domid, lambda view: kernel.check_pattern(view, pfns[100:], 1))
    print(f"migrated: {moved.summary.pages} pages in {moved.summary.iterations} iterations, {len(wrong)} pages wrong")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except XenPVError as e:
        sys.exit(f"refused: {e}")
