"""A PV domain with pages beyond 512 GiB on the model of Xen: built, started, saved to a file and live-migrated.

Usage: python3 beyond.py FORM FILE    FORM: linear, rooted4, marked, tree3, tree4hidden, none
"""

import socket
import sys
import threading
from pathlib import Path

import xenpv
from xenpv.guest_model.kernel import Kernel
from xenpv.host.model.host import ModelHost
from xenpv.migrate.receiver import receive_domain
from xenpv.migrate.transport import Link

MEMORY = 64 << 20  # bytes of memory that the domain has
LAST = 640 << 30  # the end of its pseudo-physical addresses


def main(form: str, path: str) -> None:
    """Build, save and migrate a domain whose kernel shows its p2m in one form."""
    host, kernel = ModelHost(1 << 30), Kernel(form)
    domid = xenpv.build("kernel.elf", memory=MEMORY, name="far", host=host).domid
    print(f"built: {host.info(domid).pages} pages")

    # The kernel starts, publishes its p2m, and moves its free pages to 64 places below 640 GiB.
    host.unpause(domid)
    host.run(domid, kernel.boot)
    pfns = host.run(domid, lambda view: kernel.spread(view, LAST >> 12))
    host.run(domid, lambda view: kernel.write_pattern(view, pfns, 1))
    print(f"spread: {len(pfns)} pages, the last at pfn {int(pfns[-1]):#x} ({int(pfns[-1]) >> 18} GiB)")

    # While time passes, the guest dirties a few of its pages, and suspends when it is asked to.
    def work() -> None:
        host.run(domid, lambda view: kernel.write_pattern(view, pfns[:100], 2))
        host.run(domid, kernel.poll)

    host.set_time_slice(domid, work)
    saved = xenpv.save("far", path, keep=True, host=host).summary
    host.run(domid, kernel.resume)
    print(f"saved: {saved.pages} pages in {Path(path).stat().st_size >> 20} MiB")

    # A second host receives it over a socket.
    target = ModelHost(1 << 30, seed=1)
    here, there = socket.socketpair()
    receiver = threading.Thread(target=receive_domain, args=(target, Link.of_socket(there, "sender")))
    receiver.start()
    moved = xenpv.migrate("far", f"fd:{here.detach()}", host=host)
    receiver.join()
    target.run(moved.domid, kernel.resume)
    wrong = target.run(moved.domid, lambda view: kernel.check_pattern(view, pfns[100:], 1))
    print(f"migrated: {moved.summary.pages} pages in {moved.summary.iterations} iterations, {len(wrong)} pages wrong")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except xenpv.XenPVError as e:
        sys.exit(f"refused: {e}")
