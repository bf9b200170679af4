"""Time and peak memory of `xenpv build` beside `xl create -p`, for large domains, in the same boot.

    python -m benchmarks.build --lab 4.17 --memory 340      a paused litmus domain of 340 GiB by each program
    python -m benchmarks.build --lab 4.17 --memory 32       small enough for any machine
    python -m benchmarks.build --linux 600                  a Linux guest of 600 GiB, built, booted, checked

Ratios are to xl in the same boot. The machine is sparse: some 8 GiB of a host of 700 GiB become resident, some 20 GiB
for --linux 600. It is switched off at the end, because Xen would scrub every page of a destroyed domain.
"""

from __future__ import annotations

import argparse
import json
import time

import lab
from lab import guests

_REST = 20  # GiB of the host beside the guests: dom0's 6, and Xen's tables, 2 % of the host's memory

# Runs in dom0. Each command is a process of its own, for its peak memory; small domains first warm the caches.
_MEASURE = """
import json, os, sys, time

def measure(command):
    start = time.monotonic()
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{command}: {status}")
    return {"seconds": time.monotonic() - start, "MiB": usage.ru_maxrss / 1024}

print(json.dumps([measure(command) for command in json.loads(sys.argv[1])]))
"""


def measure(host: lab.Host, *commands: list[str], timeout: float = 1800) -> list[dict[str, float]]:
    """Run commands in dom0 one after another; return seconds and MiB of peak memory of each."""
    script = host.write("measure.py", _MEASURE)
    text = json.dumps(list(commands)).replace("'", "'\\''")
    figures: list[dict[str, float]] = json.loads(host.run(f"python3 {script} '{text}'", timeout=timeout).check().stdout)
    return figures


def _build(name: str, kernel: str, gib: float, *more: str) -> list[str]:
    return ["xenpv", "build", kernel, "--memory", f"{int(gib * 1024)}M", "--name", name, *more]


def beside_xl(xen: str, gib: int) -> None:
    """Build a paused litmus domain of so many GiB with each program, on a host that has room for both."""
    room = int((2 * gib + _REST) * 1.02)
    with lab.Host(xen, mem=f"{room}G", dom0_mem="2G" if gib < 100 else "6G") as host:
        commands = []
        for size, kind in ((1 / 32, "small"), (gib, "large")):
            config = guests.litmus_config(f"xl-{kind}", memory=int(size * 1024))
            commands += [
                ["xl", "create", "-p", host.write(f"{kind}.cfg", config)],
                _build(f"xenpv-{kind}", guests.LITMUS, size),
            ]
        *small, xl, xenpv = measure(host, *commands)
    print(f"a paused litmus domain of {gib} GiB on Xen {xen}, emulated, on a host of {room} GiB:")
    for name, figure in (("xl create -p", xl), ("xenpv build", xenpv)):
        print(f"  {name:12}  {figure['seconds']:6.1f} s  {figure['MiB']:6.0f} MiB at most", end="")
        print(f"   {figure['seconds'] / xl['seconds']:.2f} of the time, {figure['MiB'] / xl['MiB']:.2f} of the memory")
    print(
        "  one of 32 MiB took "
        + ", ".join(f"{figure['seconds']:.1f} s and {figure['MiB']:.0f} MiB" for figure in small)
    )


def linux(xen: str, gib: int) -> None:
    """Build and start a Linux guest of so many GiB, wait until it is up, and cross-check its p2m and the m2p."""
    options = "console=hvc0 xen_512gb_limit=0 nowatchdog"
    with lab.Host(xen, mem=f"{int((gib + _REST) * 1.1)}G", dom0_mem="6G" if gib >= 100 else "2G") as host:
        command = _build("large", guests.VMLINUX, gib, "--ramdisk", guests.INITRAMFS, "--cmdline", options, "--start")
        [built] = measure(host, command)
        print(f"a Linux guest of {gib} GiB on Xen {xen}, emulated:")
        print(f"  built in {built['seconds']:.0f} s, {built['MiB']:.0f} MiB at most", flush=True)
        start = time.monotonic()
        host.wait_for_guest("large", guests.UP, timeout=3600)
        print(f"  its init is up after another {time.monotonic() - start:.0f} s", flush=True)
        [checked] = measure(host, ["xenpv", "check", "--quick", "large"])
        print(f"  its p2m agrees with the m2p: checked (quick) in {checked['seconds']:.0f} s, {checked['MiB']:.0f} MiB")


def main() -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lab", metavar="XEN", default=lab.DEFAULT, help="Xen version in the lab (default: %(default)s)"
    )
    parser.add_argument(
        "--memory", type=int, metavar="GIB", default=32, help="memory of each domain (default: %(default)s)"
    )
    parser.add_argument("--linux", type=int, metavar="GIB", help="build a Linux guest of this size instead")
    args = parser.parse_args()
    if args.linux:
        linux(args.lab, args.linux)
    else:
        beside_xl(args.lab, args.memory)


if __name__ == "__main__":
    main()
