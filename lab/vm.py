"""One QEMU process with Xen and dom0 in it: its command line, its console, its death."""

from __future__ import annotations

import contextlib
import gzip
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from . import cache, guests, trees, versions
from .errors import LostVM
from .initramfs import Archive, modules_in_order

QEMU = "qemu-system-x86_64"
DOM0_FILES = Path(__file__).parent / "dom0"
CHECKOUT = Path(__file__).parent.parent
MODULES = (
    *("virtio_pci", "virtio_console", "virtio_net", "9pnet_virtio", "9p", "overlay"),
    *("xen-privcmd", "xenfs", "xen-evtchn", "xen-gntdev", "xen-gntalloc"),
)
# `max` alone kills dom0 at its first page fault under TCG; without the five that follow AVX2 it works. Of AVX2 QEMU 7.2
# gets gathers wrong: argsort() of the NumPy in 4.20's dom0 gives nonsense, or dies.
CPU = "max,-avx2,-pku,-pks,-smap,-smep,-la57"
DEATH = re.compile(r"Panic on CPU \d|Hardware Dom0 (crashed|shutdown|halted)|Kernel panic - not syncing")


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the emulated machine has. Its memory is sparse: what Xen and the guests do not touch costs nothing."""

    mem: str = "3G"
    dom0_mem: str = "2G"
    cpus: int = 2
    dom0_vcpus: int = 1
    listen: tuple[int, ...] = ()  # TCP ports of dom0 that can be reached at the same port of 127.0.0.1
    network: bool = False  # implied by `listen`; dom0 sees this machine's loopback as 10.0.2.2
    xen_options: str = ""


@dataclass
class Machine:
    """A running QEMU. `work` is a folder for its temporary files, `share` the one that dom0 reads and writes."""

    xen: str
    hardware: Hardware
    work: Path
    share: Path
    terminal: tuple[int, int] | None = None  # rows and columns: a shell on dom0's console rather than the agent
    process: subprocess.Popen[bytes] = field(init=False)
    agent: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        self._write_boot_files()
        self.agent, theirs = socket.socketpair()
        with theirs, (self.work / "qemu.stderr").open("wb") as complaints:
            self.process = subprocess.Popen(
                # The kernel ends QEMU when this process dies, however it dies.
                ["setpriv", "--pdeathsig", "KILL", *self._command_line(theirs.fileno())],
                stdin=None if self.terminal else subprocess.DEVNULL,
                stderr=complaints,
                pass_fds=[theirs.fileno()],
            )

    def console(self) -> str:
        """All that Xen and dom0's kernel have printed, with QEMU's own complaints first."""
        texts = []
        for name in ("qemu.stderr", "console"):
            path = self.work / name
            texts.append(path.read_text(errors="replace").replace("\r", "") if path.exists() else "")
        # Xen ends lines that dom0's console has ended already.
        return "\n".join(line for line in "".join(texts).splitlines() if line) + "\n"

    def check(self) -> None:
        """Raise LostVM if there is no machine any more, or it says that it is about to end."""
        died = self.process.poll() is not None
        found = None if died else DEATH.search(self.console())
        if found:
            self._wait(1.0)  # for the rest of what it has to say
            self.kill()
        if died or found:
            why = found.group() if found else f"QEMU ended with {self.process.returncode}"
            raise LostVM(f"the VM with Xen {self.xen} is lost: {why}", self.console())

    def kill(self) -> None:
        """End QEMU at once: what dom0 has written to the share is there already, all else is temporary."""
        self.process.kill()
        self.process.wait()
        self.agent.close()

    def _wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def _write_boot_files(self) -> None:
        version = versions.find(self.xen)
        packed = trees.of_xen(self.xen).path / f"boot/xen-{self.xen}-amd64.gz"
        with gzip.open(packed) as source, (self.work / "xen").open("wb") as target:
            shutil.copyfileobj(source, target)  # QEMU's multiboot loader wants it unpacked
        archive = Archive()
        for name in ("proc", "sys", "dev"):
            archive.folder(name)
        archive.character_device("dev/console", 5, 1)
        archive.file("bin/busybox", (trees.root(version.root).path / "usr/bin/busybox").read_bytes(), 0o755)
        archive.file("init", (DOM0_FILES / "init.sh").read_bytes(), 0o755)
        for name in ("dom0.sh", "agent.py"):
            archive.file(f"lab/{name}", (DOM0_FILES / name).read_bytes())
        archive.file("lab/settings", self._settings().encode())
        archive.file("layers", "".join(f"{tree.folder_name}\n" for tree in trees.of_version(self.xen)).encode())
        archive.file("guests", guests.folder().name.encode())
        modules = modules_in_order(trees.kernel(version.kernel).path, MODULES)
        archive.file("modules/order", "".join(f"{module.name}\n" for module in modules).encode())
        for module in modules:
            archive.file(f"modules/{module.name}", module.read_bytes())
        (self.work / "initramfs").write_bytes(archive.packed())

    def _settings(self) -> str:
        mode = "shell" if self.terminal else "agent"
        rows, columns = self.terminal or (24, 80)
        return f"XEN={self.xen}\nMODE={mode}\nROWS={rows}\nCOLUMNS={columns}\n"

    def _command_line(self, agent: int) -> list[str]:
        has = self.hardware
        xen_options = (
            f"console=com1 com1=115200,8n1 dom0_mem={has.dom0_mem},max:{has.dom0_mem} dom0_max_vcpus={has.dom0_vcpus} "
            # Scrubbing would touch all of the sparse memory. A debug key in the middle of a job helps nobody.
            # Where Xen loads FPU registers lazily, QEMU's TCG loses them when dom0 and a busy guest share a CPU:
            # programs of dom0 crash or compute nonsense. tests/lab/test_emulation.py watches over it.
            f"spec-ctrl=eager-fpu dom0_vcpus_pin bootscrub=0 loglvl=all guest_loglvl=all conswitch=0 {has.xen_options}"
        ).strip()
        dom0_options = "console=hvc0 quiet loglevel=4 oops=panic panic=-1"
        kernel = guests.folder() / "vmlinux"
        words = [
            *(QEMU, "-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", str(has.cpus)),
            *("-machine", "q35,memory-backend=ram", "-m", has.mem),
            *("-object", f"memory-backend-ram,id=ram,size={has.mem},reserve=off"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-kernel", str(self.work / "xen"), "-append", xen_options),
            *("-initrd", f"{kernel} {dom0_options},{self.work / 'initramfs'}"),
            *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,fd={agent}"),
            *("-device", "virtserialport,chardev=agent,name=xenpv.lab"),
            *self._console_words(),
            *_shared_folder("trees", cache.trees(), readonly=True),
            *_shared_folder("checkout", CHECKOUT, readonly=True),
            *_shared_folder("share", self.share, readonly=False),
        ]
        if has.network or has.listen:
            forwards = "".join(f",hostfwd=tcp:127.0.0.1:{port}-:{port}" for port in has.listen)
            return [*words, "-netdev", f"user,id=net{forwards}", "-device", "virtio-net-pci,netdev=net,romfile="]
        return [*words, "-nic", "none"]

    def _console_words(self) -> list[str]:
        if self.terminal:
            return ["-chardev", "stdio,id=console,mux=on,signal=off", "-serial", "chardev:console"]
        return ["-chardev", f"file,id=console,path={self.work / 'console'}", "-serial", "chardev:console"]


def _shared_folder(tag: str, path: Path, *, readonly: bool) -> list[str]:
    options = f"local,path={path},mount_tag={tag},security_model=none,multidevs=remap"
    return ["-virtfs", options + (",readonly=on" if readonly else "")]
