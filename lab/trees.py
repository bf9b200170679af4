"""The folders that Debian packages are unpacked into, and what is in each.

dom0's root is three of them, one over the other: Xen's own packages, the kernel's modules, and the programs of a
suite. So bookworm's programs are fetched once for two versions of Xen. Nothing of a package is run (no maintainer
scripts, no chroot), so no root is needed; `_finish_*` does the little that those scripts would have done and we need.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import cache, programs, versions
from .apt import Deb, Suite, command
from .errors import LabError

RECIPE = 2  # raise it when what is done with the packages changes
PROGRAMS = (
    *("bash", "coreutils", "util-linux", "mount", "findutils", "grep", "sed", "procps", "busybox-static"),
    *("gzip", "xz-utils", "zstd", "kmod", "iproute2", "libc-bin"),
    *("python3", "python3-numpy", "python3-click", "python3-rich", "python3-jinja2"),
    *("python3-pyelftools", "python3-zstandard", "python3-lz4", "python3-pytest"),
)
# Pulled in by dependencies that matter only to an installed system.
NOT_NEEDED = re.compile(
    r"perl.*|libperl.*|lib.*-perl|debconf|dpkg|tar|ucf|sensible-utils|adduser|passwd|login.*|libpam.*|libsemanage.*|"
    r"libsepol.*|tzdata|udev|systemd.*|libsystemd-shared|lsb-base|sysvinit-utils|libdb5.*|gcc-\d+-base|mailcap|"
    r"media-types|dmsetup|libdevmapper.*|python3-setuptools|python3-pkg-resources"
)
NOT_UNPACKED = (
    *(f"usr/share/{part}/*" for part in ("doc", "doc-base", "man", "info", "locale", "lintian", "bug", "i18n", "zsh")),
    *("usr/lib/debug/*", "boot/*.efi", "usr/lib/python3/dist-packages/*/tests/*"),
)
KERNEL_PARTS = (
    *("boot/vmlinuz-*", "boot/System.map-*", "lib/modules/*/modules.*"),
    *(f"lib/modules/*/kernel/{part}/*" for part in ("fs/9p", "net/9p", "fs/overlayfs", "fs/netfs", "fs/fscache")),
    *(f"lib/modules/*/kernel/drivers/{part}" for part in ("xen/*", "virtio/*", "char/virtio_console.ko")),
    *(f"lib/modules/*/kernel/drivers/block/{part}" for part in ("loop.ko", "virtio_blk.ko", "xen-*")),
    *(f"lib/modules/*/kernel/drivers/net/{part}" for part in ("virtio_net.ko", "*net_failover.ko", "xen-*")),
    *(f"lib/modules/*/kernel/net/{part}" for part in ("core/failover.ko", "802/*", "llc/*", "bridge/bridge.ko")),
)


@dataclass(frozen=True, slots=True)
class Tree:
    """Packages of one suite, unpacked together."""

    name: str
    suite: str
    packages: tuple[str, ...]
    beyond: Tree | None = None  # what this tree will lie on: its packages are not wanted again
    only: str = ".*"  # of the packages found, those with such a name
    parts: tuple[str, ...] = ()  # of the packages' files, only these

    @property
    def folder_name(self) -> str:
        recipe = (RECIPE, NOT_NEEDED.pattern, NOT_UNPACKED, self)
        return f"{self.name}-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]}"

    @property
    def path(self) -> Path:
        return cache.trees() / self.folder_name


def root(suite: str) -> Tree:
    return Tree(f"root-{suite}", suite, PROGRAMS)


def of_xen(xen: str) -> Tree:
    version = versions.find(xen)
    # xen-utils-4.14 wants exactly bullseye's Python, for programs in Python that the lab does not use.
    packages = (f"xen-hypervisor-{xen}-amd64", f"xen-utils-{xen}", "xenstore-utils")
    return Tree(f"xen-{xen}", version.suite, packages, root(version.root), only=r"(?!(lib)?python3).*")


def kernel(kernel: str) -> Tree:
    suite = versions.KERNEL_SUITES[kernel]
    return Tree(f"kernel-{kernel}", suite, ("linux-image-amd64",), only=r"linux-image-\d.*", parts=KERNEL_PARTS)


def headers(xen: str) -> Tree:
    return Tree(f"headers-{xen}", versions.find(xen).suite, ("libxen-dev",), only="libxen-dev")


def of_version(xen: str) -> list[Tree]:
    """The layers of a dom0's root, uppermost first."""
    version = versions.find(xen)
    return [of_xen(xen), kernel(version.kernel), root(version.root)]


def fetch(needed: Iterable[Tree]) -> None:
    """Bring the trees into the cache; those that are there cost nothing."""
    missing = [tree for tree in dict.fromkeys(needed) if not tree.path.exists()]
    if not missing:
        return
    with cache.locked():
        suites: dict[str, Suite] = {}
        try:
            for tree in missing:
                # What another process has fetched while we waited for the lock is left as it is.
                cache.add_tree(tree.folder_name, functools.partial(_fill, tree, suites))
        finally:
            shutil.rmtree(cache.folder() / "apt", ignore_errors=True)  # 100 MB a suite, and soon out of date


def _suite(name: str, suites: dict[str, Suite]) -> Suite:
    if name not in suites:
        suites[name] = Suite(name, cache.folder() / "apt")
        cache.say(f"reading the package index of {name}")
        suites[name].update()
    return suites[name]


def _packages(tree: Tree, suites: dict[str, Suite]) -> list[Deb]:
    beyond = {deb.name for deb in _packages(tree.beyond, suites)} if tree.beyond else set()
    return [
        deb
        for deb in _suite(tree.suite, suites).resolve(tree.packages)
        if deb.name not in beyond and wanted(tree, deb.name)
    ]


def wanted(tree: Tree, package: str) -> bool:
    """Whether a package that was asked for, or pulled in, is to be unpacked."""
    return bool(re.fullmatch(tree.only, package)) and not NOT_NEEDED.fullmatch(package)


def _fill(tree: Tree, suites: dict[str, Suite], into: Path) -> None:
    started = time.monotonic()
    debs = _packages(tree, suites)
    cache.say(f"{tree.name}: downloading {len(debs)} packages, {sum(deb.size for deb in debs) / 1e6:.0f} MB")
    downloads = cache.folder() / "downloads"
    try:
        for path in _suite(tree.suite, suites).download(debs, downloads):
            _unpack(path, into, tree.parts)
    finally:
        shutil.rmtree(downloads, ignore_errors=True)
    if tree.name.startswith("root-"):
        _finish_root(into)
    if tree.name.startswith("kernel-"):
        _finish_kernel(into)
    record = {"suite": tree.suite, "packages": {deb.name: deb.version for deb in debs}}
    (into / ".packages.json").write_text(json.dumps(record, indent=1))
    cache.say(f"{tree.name}: ready after {time.monotonic() - started:.0f} s")


def _unpack(deb: Path, into: Path, parts: tuple[str, ...]) -> None:
    for top in ("bin", "sbin", "lib", "lib64"):  # packages of before the merge of /usr put files there
        (into / "usr" / top).mkdir(parents=True, exist_ok=True)
        if not (into / top).is_symlink():
            (into / top).symlink_to(f"usr/{top}")
    chosen = ["--wildcards", *(f"./{part}" for part in parts)] if parts else []
    left_out = [f"--exclude=./{part}" for part in NOT_UNPACKED]
    plain = ("--no-same-owner", "--no-same-permissions")  # no setuid programs in somebody's cache
    tar = ["tar", "-x", "-C", str(into), "--keep-directory-symlink", *plain, *left_out, *chosen]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as source:
        done = subprocess.run(tar, stdin=source.stdout, capture_output=True, text=True, check=False)
    # A list of parts names some that this kernel does not have; tar reports that after unpacking the others.
    failed = [line for line in done.stderr.splitlines() if "Not found in archive" not in line and "Exiting" not in line]
    if source.returncode or (done.returncode and failed):
        raise LabError(f"unpacking {deb.name} failed: {done.stderr.strip()}")


def _finish_root(root: Path) -> None:
    libraries = root / "usr/lib/x86_64-linux-gnu"
    for name in ("blas/libblas.so.3", "lapack/liblapack.so.3"):  # chosen by update-alternatives on a real system
        (libraries / Path(name).name).symlink_to(name)
    for name, target in (("run", "/run"), ("lock", "/run/lock")):
        (root / "var" / name).rmdir()
        (root / "var" / name).symlink_to(target)
    etc = root / "etc"
    (etc / "passwd").write_text("root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/bin/false\n")
    (etc / "group").write_text("root:x:0:\ntty:x:5:\nnogroup:x:65534:\n")
    (etc / "hosts").write_text("127.0.0.1 localhost\n")
    busybox = root / "usr/bin/busybox"
    for applet in command(str(busybox), "--list").split():
        # Programs that nobody would miss until a job needs one: awk, vi, ping, less …
        if not any((root / "usr" / folder / applet).exists() for folder in ("bin", "sbin")):
            (root / "usr/bin" / applet).symlink_to("busybox")
    _compile_python(root)


def _compile_python(root: Path) -> None:
    """Byte code for the packages, by the tree's own Python: under emulation it would take many seconds at each boot."""
    [python] = (path for path in (root / "usr/bin").glob("python3.*") if path.suffix[1:].isdigit())
    script = (
        "import compileall, sys; root, *folders = sys.argv[1:];"
        "[compileall.compile_dir(folder, quiet=2, stripdir=root, prependdir='/') for folder in folders]"
    )
    # The tree's dynamic loader, named, so that neither its C library nor this machine's is mixed into the other.
    loader: list[str | Path] = [
        root / "usr/lib64/ld-linux-x86-64.so.2",
        "--library-path",
        root / "usr/lib/x86_64-linux-gnu",
    ]
    words = [*loader, python, "-S", "-c", script, root, root / "usr/lib" / python.name, root / "usr/lib/python3"]
    env = {"PYTHONHOME": str(root / "usr")}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"compiling the Python packages of {root.name} failed: {done.stderr.strip()[-500:]}")


def _finish_kernel(root: Path) -> None:
    release = next((root / "usr/lib/modules").iterdir()).name
    command(programs.find("depmod") or "depmod", "-b", str(root), release)
