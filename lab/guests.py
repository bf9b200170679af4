"""The Debian guest: a stock kernel and an initramfs of a few files, and texts for xl.

dom0 sees them under /guests. The kernel is there twice: as Debian ships it, and as the ELF file that is packed inside,
which xl starts several seconds sooner under emulation because libxc need not unpack it.
"""

from __future__ import annotations

import hashlib
import lzma
import os
from pathlib import Path

from . import cache, trees, versions
from .errors import LabError
from .initramfs import Archive

FOLDER = "/guests"
VMLINUZ = f"{FOLDER}/vmlinuz"
VMLINUX = f"{FOLDER}/vmlinux"
SYSTEM_MAP = f"{FOLDER}/System.map"
INITRAMFS = f"{FOLDER}/initramfs"
LITMUS = "/xenpv/guests/litmus/build/litmus.elf"
SMALLEST = 96  # MiB in which the kernel and this initramfs run
BUSY = "xenpv.busy"  # a word of the kernel's command line: each of four processes always computes
UP = "xenpv-guest: up"
BEAT = "xenpv-guest: beat"
MARKER = "xenpv-marker"
SYMBOLS = "_text|_etext|__start_rodata|__end_rodata|linux_banner|init_task|init_top_pgt"  # told on the console

# comm of a script is the script's own name, so the marker is found in the guest's memory by that.
_MARKER = b"#!/bin/sh\nwhile :; do sleep 3600; done\n"
_INIT = rf"""#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
echo 0 > /proc/sys/kernel/kptr_restrict
exec < /dev/hvc0 > /dev/hvc0 2>&1
busy() {{
    while :; do
        sha256sum /bin/busybox
        awk 'BEGIN {{ x = 0.5; for (i = 0; i < 3000; i++) x = x * 1.0001 + 1 / x; print x }}'
    done > /dev/null
}}
/bin/{MARKER} &
grep -E ' ({SYMBOLS})$' /proc/kallsyms | while read -r address type name; do
    echo "xenpv-guest: symbol $address $name"
done
echo "xenpv-guest: marker $!"
echo "xenpv-guest: version $(cat /proc/version)"
case " $(cat /proc/cmdline) " in
    *" {BUSY} "*) for _ in 1 2 3 4; do busy & done ;;
esac
echo "{UP}"
beat=0
while :; do
    echo "{BEAT} $beat"
    beat=$((beat + 1))
    sleep 1
done
"""


def config(name: str, memory: int = SMALLEST, vcpus: int = 1, extra: str = "", kernel_options: str = "") -> str:
    """An xl config for the Debian guest; `extra` is more lines of that file."""
    return _config(
        name,
        memory,
        vcpus,
        {"kernel": VMLINUX, "ramdisk": INITRAMFS, "cmdline": f"console=hvc0 {kernel_options}".strip()},
        extra,
    )


def litmus_config(name: str, memory: int = 32, vcpus: int = 1, extra: str = "", options: str = "") -> str:
    """An xl config for guests/litmus, as built in the checkout."""
    return _config(name, memory, vcpus, {"kernel": LITMUS, "cmdline": options}, extra)


def pvh_config(name: str, memory: int = 128, extra: str = "") -> str:
    """An xl config for the same kernel as a PVH guest. With another tsc_mode it loops after a restore."""
    boot = {"kernel": VMLINUX, "ramdisk": INITRAMFS, "cmdline": "console=hvc0", "tsc_mode": "native"}
    return _config(name, memory, 1, boot, extra, kind="pvh")


def _config(name: str, memory: int, vcpus: int, boot: dict[str, str], extra: str, *, kind: str = "pv") -> str:
    lines = [
        f'type = "{kind}"',
        f'name = "{name}"',
        f"memory = {memory}",
        f"vcpus = {vcpus}",
        # A guest that ends is gone; one that crashes stays to be looked at.
        *('on_poweroff = "destroy"', 'on_reboot = "destroy"', 'on_crash = "preserve"'),
    ]
    lines += [f'{key} = "{value}"' for key, value in boot.items() if value]
    return "\n".join(lines) + "\n" + extra


def trees_needed() -> tuple[trees.Tree, trees.Tree]:
    """Where the kernel and busybox come from."""
    return trees.kernel(versions.GUEST_KERNEL), trees.root(versions.KERNEL_SUITES[versions.GUEST_KERNEL])


def folder() -> Path:
    """The guest's files in the cache, made when they are not there; its trees must have been fetched."""
    kernel, root = trees_needed()
    recipe = (_INIT, config("debian"), _MARKER, kernel.folder_name, root.folder_name)
    name = f"guests-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]}"
    if not (cache.trees() / name).exists():
        with cache.locked():
            cache.add_tree(name, lambda into: _fill(into, kernel.path / "boot", root.path))
    return cache.trees() / name


def _fill(into: Path, boot: Path, root: Path) -> None:
    [vmlinuz], [system_map] = boot.glob("vmlinuz-*"), boot.glob("System.map-*")
    os.link(vmlinuz, into / "vmlinuz")
    os.link(system_map, into / "System.map")
    (into / "vmlinux").write_bytes(unpacked_kernel(vmlinuz.read_bytes()))
    (into / "debian.cfg").write_text(config("debian"))
    (into / "initramfs").write_bytes(initramfs((root / "usr/bin/busybox").read_bytes()))


def initramfs(busybox: bytes) -> bytes:
    archive = Archive()
    for name in ("proc", "sys", "dev"):
        archive.folder(name)
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", busybox, 0o755)
    archive.link("bin/sh", "busybox")
    archive.file(f"bin/{MARKER}", _MARKER, 0o755)
    archive.file("init", _INIT.encode(), 0o755)
    return archive.packed()


def unpacked_kernel(image: bytes) -> bytes:
    """The ELF file inside a bzImage (its header's fields are in Documentation/x86/boot.rst)."""
    if image[0x202:0x206] != b"HdrS":
        raise LabError("the guest's kernel is not a bzImage")
    code = (image[0x1F1] + 1) * 512
    offset, length = (int.from_bytes(image[at : at + 4], "little") for at in (0x248, 0x24C))
    payload = image[code + offset : code + offset + length]
    try:
        return lzma.LZMADecompressor().decompress(payload)  # stops before the size that the kernel's build appends
    except lzma.LZMAError as error:
        raise LabError(f"the guest's kernel is not packed by xz: {error}") from error
