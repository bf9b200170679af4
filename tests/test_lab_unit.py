"""The lab's parts that need neither QEMU nor the network."""

from __future__ import annotations

import importlib.util
import json
import lzma
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import pytest

from lab import apt, cache, guests, programs, trees, versions, workspace
from lab.__main__ import main
from lab.errors import LabError, LostVM, MissingPrograms
from lab.host import Host
from lab.initramfs import Archive, modules_in_order
from lab.result import JobFailed, Result
from lab.vm import Machine
from tests.support.requirements import cannot_run

AGENT = Path(cache.__file__).parent / "dom0/agent.py"


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XENPV_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program that runs in dom0, with a share that is here."""
    spec = importlib.util.spec_from_file_location("lab_dom0_agent", AGENT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHARE", tmp_path)
    monkeypatch.setattr(module, "GRACE", 0.3)
    (tmp_path / "job").mkdir()
    return module


def order(command: str, timeout: float = 30) -> dict[str, object]:
    return {"id": 5, "command": command, "folder": "job", "timeout": timeout, "env": {"GIVEN": "yes"}}


# --- the table


def test_every_version_has_its_trees() -> None:
    for version in versions.SUPPORTED:
        names = [tree.name for tree in trees.of_version(version.xen)]
        assert names == [f"xen-{version.xen}", f"kernel-{version.kernel}", f"root-{version.root}"]


def test_an_unknown_version_names_those_that_are() -> None:
    with pytest.raises(LabError, match=r"4\.2 is not in the lab; it has 4\.14, 4\.17, 4\.20"):
        versions.find("4.2")


def test_bullseye_python_is_left_out_of_a_bookworm_root() -> None:
    xen = trees.of_xen("4.14")
    assert xen.suite == "bullseye"
    assert not trees.wanted(xen, "python3.9")
    assert not trees.wanted(xen, "libpython3.9-stdlib")
    assert trees.wanted(xen, "libxenctrl4.14")
    assert not trees.wanted(trees.root("bookworm"), "perl-base")


def test_a_changed_recipe_is_another_folder() -> None:
    one = trees.Tree("xen", "bookworm", ("xen-utils",))
    assert one.folder_name == trees.Tree("xen", "bookworm", ("xen-utils",)).folder_name
    assert one.folder_name != trees.Tree("xen", "trixie", ("xen-utils",)).folder_name
    assert one.folder_name != trees.Tree("xen", "bookworm", ("xen-utils", "bash")).folder_name


# --- the cache


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XENPV_LAB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "xenpv/lab"
    monkeypatch.setenv("XENPV_LAB_CACHE", str(tmp_path / "mine"))
    assert cache.folder() == tmp_path / "mine"


def test_a_tree_is_there_whole_or_not_at_all(cache_folder: Path) -> None:
    def half(into: Path) -> None:
        (into / "file").touch()
        raise LabError("the network went away")

    with pytest.raises(LabError):
        cache.add_tree("tree", half)
    assert list((cache_folder / "trees").iterdir()) == []
    assert cache.add_tree("tree", lambda into: (into / "file").touch()) == cache_folder / "trees/tree"
    cache.add_tree("tree", half)  # is there already: not made again
    assert stat.S_IMODE((cache_folder / "trees/tree").stat().st_mode) == 0o755


def test_prune_removes_what_is_not_wanted_and_what_was_not_finished(cache_folder: Path) -> None:
    for name in ("old-1", "new-2", ".new-2.abc"):
        (cache_folder / "trees" / name).mkdir(parents=True)
    assert cache.prune({"new-2"}) == [".new-2.abc", "old-1"]


def test_only_one_process_fills_the_cache(cache_folder: Path) -> None:
    script = "from lab import cache\nwith cache.locked(): print('in', flush=True); input()"
    checkout = Path(cache.__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        waiting = subprocess.Popen(
            [sys.executable, "-c", "from lab import cache\nwith cache.locked(): pass"],
            cwd=checkout,
            stderr=subprocess.PIPE,
            text=True,
        )
        with waiting:
            assert waiting.stderr is not None
            assert waiting.stderr.readline().startswith("lab: waiting for another process")
            other.stdin.write("\n")
            other.stdin.flush()
            assert waiting.wait(10) == 0


# --- apt


def test_mirror_is_the_machines_own_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = (
        "Acme|Acme|http://acme.example/\nDebian|Debian-Security|http://sec.example/\nDebian|Debian|http://d.example/\n"
    )
    monkeypatch.setattr(apt, "command", lambda *_words: listing)
    for variable in ("XENPV_DEBIAN_MIRROR", "XENPV_DEBIAN_MIRROR_BULLSEYE"):
        monkeypatch.delenv(variable, raising=False)
    assert apt.mirror("bookworm") == "http://d.example/"
    monkeypatch.setenv("XENPV_DEBIAN_MIRROR", "http://mine.example/")
    assert apt.mirror("bookworm") == "http://mine.example/"
    monkeypatch.setenv("XENPV_DEBIAN_MIRROR_BULLSEYE", "http://old.example/")
    assert apt.mirror("bullseye") == "http://old.example/"
    monkeypatch.delenv("XENPV_DEBIAN_MIRROR")
    monkeypatch.setattr(apt, "command", lambda *_words: "")
    with pytest.raises(LabError, match="XENPV_DEBIAN_MIRROR=URL"):
        apt.mirror("bookworm")


def test_packages_are_read_from_what_apt_would_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = "'http://d.example/pool/p/passwd_4.13_amd64.deb' passwd_1%3a4.13_amd64.deb 972180 SHA256:00\n"
    monkeypatch.setattr(apt, "command", lambda *_words, **_more: line)
    assert apt.Suite("bookworm", tmp_path).resolve(("passwd",)) == [apt.Deb("passwd", "1:4.13", 972180)]


def test_a_failed_program_is_named_with_its_complaint() -> None:
    with pytest.raises(LabError, match=r"(?s)sh -c.*ended with 3.*no such luck"):
        apt.command("sh", "-c", "echo no such luck >&2; exit 3")


# --- initramfs


def test_archive_is_one_that_cpio_reads() -> None:
    if programs.missing({"cpio": "cpio"}):
        cannot_run("cpio is not installed; `make lab-deps` installs it")
    archive = Archive()
    archive.file("bin/tool", b"content", 0o755)
    archive.link("bin/alias", "tool")
    archive.character_device("dev/console", 5, 1)
    listing = subprocess.run(
        ["cpio", "-tv", "--quiet", "--numeric-uid-gid"], input=archive.packed(), capture_output=True, check=True
    ).stdout.decode()
    lines = [line.split() for line in listing.splitlines()]
    assert [(line[0], line[-1]) for line in lines] == [
        ("drwxr-xr-x", "bin"),
        ("-rwxr-xr-x", "bin/tool"),
        ("lrwxrwxrwx", "tool"),
        ("drwxr-xr-x", "dev"),
        ("crw-------", "dev/console"),
    ]


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/modules/6.1.0"
    folder.mkdir(parents=True)
    (folder / "modules.dep").write_text("a/9p.ko: b/9pnet.ko c/netfs.ko\nb/9pnet.ko:\nc/netfs.ko: b/9pnet.ko\n")
    order = [path.name for path in modules_in_order(tmp_path, ["9p", "9pnet", "not-there"])]
    assert order == ["netfs.ko", "9pnet.ko", "9p.ko"]


# --- guests


def test_guest_config_is_what_xl_wants() -> None:
    text = guests.config("g", memory=128, vcpus=2, kernel_options="debug", extra="seclabel = 'x'\n")
    assert 'name = "g"\n' in text
    assert "memory = 128\nvcpus = 2\n" in text
    assert f'kernel = "{guests.VMLINUX}"\nramdisk = "{guests.INITRAMFS}"\ncmdline = "console=hvc0 debug"\n' in text
    assert text.endswith("\nseclabel = 'x'\n")
    assert "ramdisk" not in guests.litmus_config("l")


def test_kernel_is_unpacked_from_its_image() -> None:
    payload = lzma.compress(b"\x7fELF kernel")
    image = bytearray(1024) + b"\0" * 16 + payload + b"\x0b\0\0\0"
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    image[0x248:0x24C] = (16).to_bytes(4, "little")
    image[0x24C:0x250] = (len(payload) + 4).to_bytes(4, "little")
    assert guests.unpacked_kernel(bytes(image)) == b"\x7fELF kernel"
    with pytest.raises(LabError, match="not a bzImage"):
        guests.unpacked_kernel(bytes(1024))
    image[1040:1046] = b"\x1f\x8bgzip"
    with pytest.raises(LabError, match="not packed by xz"):
        guests.unpacked_kernel(bytes(image))


# --- the workspace


def test_an_abandoned_workspace_is_removed_and_one_in_use_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(workspace, "YOUNG", -1.0)
    used = workspace.Workspace()
    abandoned = tmp_path / "xenpv-lab-abandoned"
    abandoned.mkdir()
    (abandoned / "lock").touch()
    (tmp_path / "xenpv-lab-not-ours").mkdir()
    other = workspace.Workspace()
    assert used.path.exists()
    assert not abandoned.exists()
    assert (tmp_path / "xenpv-lab-not-ours").exists()
    used.remove()
    other.remove()
    assert not used.path.exists()


# --- the agent


def test_agent_runs_a_job(agent: ModuleType, tmp_path: Path) -> None:
    answer = agent.run(order("echo $GIVEN; echo no >&2; touch here; exit 4"))
    assert (answer["id"], answer["status"], answer["timed_out"]) == (5, 4, False)
    assert (tmp_path / "job.stdout").read_text() == "yes\n"
    assert (tmp_path / "job.stderr").read_text() == "no\n"
    assert (tmp_path / "job/here").exists()


def test_agent_kills_a_job_with_its_children(agent: ModuleType) -> None:
    started = time.monotonic()
    answer = agent.run(order("trap '' TERM; sleep 60 & sleep 60; sleep 60", timeout=0.2))
    assert answer["timed_out"]
    assert answer["status"] == 128 + 9
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("unread", [b"", b"order"], ids=["end of file", "reset"])
def test_a_channel_that_closes_is_a_lost_vm(tmp_path: Path, unread: bytes) -> None:
    """A socket whose other end is closed with data unread gives an error rather than the end of the file."""
    (tmp_path / "console").write_text("(XEN) the last word\n")
    ours, theirs = socket.socketpair()
    machine = Machine.__new__(Machine)
    machine.xen, machine.work, machine.agent = "4.17", tmp_path, ours
    machine.process = subprocess.Popen(["sh", "-c", "exit 9"])
    host = Host("4.17")
    host._machine, host._workspace = machine, workspace.Workspace()
    try:
        ours.sendall(unread)
        theirs.close()
        with pytest.raises(LostVM, match=r"(?s)QEMU ended with 9.*the last word"):
            host._wait_for_answer(1, 10)
    finally:
        host.close()


# --- errors and programs


def test_a_lost_vm_shows_the_end_of_its_console() -> None:
    error = LostVM("QEMU ended with -9", "\n".join(f"line {number}" for number in range(100)))
    assert "line 99" in str(error)
    assert "line 50" not in str(error)
    assert str(LostVM("gone")) == "gone; its console is empty"


def test_a_failed_job_shows_the_end_of_its_output(tmp_path: Path) -> None:
    result = Result("xl create", 3, b"", b"first\nno such file\n", tmp_path, 1.25)
    with pytest.raises(JobFailed, match=r"(?s)'xl create' ended with 3 after 1\.2 s\nstderr:.*no such file"):
        result.check()
    assert Result("true", 0, b"ok", b"", tmp_path, 0.1).check().text == "ok"


def test_missing_programs_say_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(programs, "SEARCH", "/nowhere")
    with pytest.raises(MissingPrograms, match=r"qemu-system-x86_64 \(package qemu-system-x86\).*make lab-deps"):
        programs.require()
    assert main(["deps", "--check"]) == 1
    assert "missing: depmod (package kmod)" in capsys.readouterr().out
    with pytest.raises(LabError, match="no apt-get"):
        programs.install(programs.missing())


def test_install_without_root_or_sudo_gives_the_line_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(programs, "find", lambda program: None if program == "sudo" else f"/usr/bin/{program}")
    monkeypatch.setattr("subprocess.run", lambda words, **_options: ran.append(words))
    with pytest.raises(LabError, match=r"sudo apt-get update && sudo apt-get install --no-install-recommends -y kmod$"):
        programs.install({"depmod": "kmod"})
    assert ran == []


@pytest.mark.parametrize("root", [True, False], ids=["root", "sudo"])
def test_install_runs_apt_and_says_so(
    root: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def run(words: list[str], **_options: object) -> subprocess.CompletedProcess[str]:
        ran.append(words)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr("os.geteuid", lambda: 0 if root else 1000)
    monkeypatch.setattr(programs, "find", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr("subprocess.run", run)
    programs.install({"depmod": "kmod"})
    become = [] if root else ["sudo"]
    expected = [
        [*become, "apt-get", "update"],
        [*become, "apt-get", "install", "--no-install-recommends", "-y", "kmod"],
    ]
    assert [words for words in ran if words[-1] != "true"] == expected
    assert capsys.readouterr().out.count("running: ") == 2


def test_deps_never_installs_a_hypervisor_or_a_kernel() -> None:
    packages = {*programs.FETCH.values(), *programs.BOOT.values(), *programs.KEYRING.values()}
    assert not [package for package in packages if package.startswith(("xen", "linux-image"))]


def test_versions_says_what_is_in_the_cache(cache_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tree in trees.of_version("4.17"):
        tree.path.mkdir(parents=True)
    record = {"packages": {"xen-hypervisor-4.17-amd64": "4.17.5-1"}}
    (trees.of_xen("4.17").path / ".packages.json").write_text(json.dumps(record))
    assert main(["versions"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["4.17", "bookworm", "bookworm", "6.1", "4.17.5-1"]
    assert lines[1].endswith("no")


def test_run_without_programs_says_so_with_its_own_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(programs, "SEARCH", "/nowhere")
    assert main(["run", "--", "true"]) == 125
    assert "make lab-deps" in capsys.readouterr().err
