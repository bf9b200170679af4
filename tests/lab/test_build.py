"""Builds domains on real Xen: they equal xl's page for page, and boot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from uuid import UUID

import pytest

import lab
from lab import guests
from tests.lab.conftest import Hosts
from tests.support.command import xenpv
from tests.support.images import asking_for_symbols
from tests.support.lab.guest import ONE_VERSION

ROOT = Path(__file__).parents[2]
LITMUS = guests.LITMUS
SYMBOLS = "litmus-symbols.elf"  # in /share
NO_P2M = LITMUS.replace("litmus.elf", "litmus-nop2m.elf")
# name: kernel, ramdisk, MiB, command line
SMALL = {
    "outside": (LITMUS, "", 32, "p2m=both"),
    "inside": (NO_P2M, "", 32, "p2m=tree"),
    "symbols": (f"/share/{SYMBOLS}", "", 32, ""),
    "debian": (guests.VMLINUZ, guests.INITRAMFS, 160, "console=hvc0 quiet"),
}
LARGE = {
    "gib": (LITMUS, guests.INITRAMFS, 1024, ""),
    "gib-inside": (NO_P2M, "", 1024, ""),
    "8-gib": (guests.VMLINUX, guests.INITRAMFS, 8192, "console=hvc0"),
    "8-gib-inside": (NO_P2M, guests.INITRAMFS, 8192, ""),
}


def assert_equal_to_xl(host: lab.Host, cases: dict[str, tuple[str, str, int, str]]) -> None:
    """Assert that `xl create -p` and xenpv build the same, except for ports and machine frames."""
    command = f"python3 -m tests.support.lab.equal_domains {host.write('cases.json', json.dumps(cases))}"
    results = json.loads(host.run(command, timeout=600).check().stdout)
    for name, result in results.items():
        print(host.xen, name, result)
        assert result["differing"] == 0, result["differ"]
        assert sum(result["equal"].values()) == result["used"]
        assert result["vcpu"] == []
        assert result["start_info"].keys() <= {"shared_info", "store_mfn", "store_evtchn", "console"}
        assert result["shared_info"] == []
    assert results.keys() == cases.keys()


@pytest.mark.deep_elsewhere
def test_build_equals_xl_page_for_page(host: lab.Host) -> None:
    (host.share / SYMBOLS).write_bytes(asking_for_symbols((ROOT / "guests/litmus/build/litmus.elf").read_bytes()))
    assert_equal_to_xl(host, SMALL)


@pytest.mark.deep
def test_build_large_domains_equals_xl_page_for_page(hosts: Hosts) -> None:
    hosts.close()
    with lab.Host(lab.DEFAULT, mem="20G", dom0_mem="2G") as host:
        assert_equal_to_xl(host, LARGE)


@pytest.mark.deep_elsewhere
def test_build_boots_debian_and_litmus(host: lab.Host) -> None:
    """Debian boots to init and litmus to its pattern; xl lists and destroys them; xenconsoled serves them."""
    free = host.run("xl info free_memory").check().text
    start = {name: len(host.guest_console(name)) for name in ("debian-built", "litmus-built")}
    linux = f"xenpv build {guests.VMLINUZ} --ramdisk {guests.INITRAMFS} --memory 128M --cmdline console=hvc0"
    host.run(f"{linux} --name debian-built --start", timeout=300).check()
    host.run(f"xenpv build {LITMUS} --memory 32M --cmdline p2m=linear --name litmus-built --start", timeout=300).check()
    host.wait_for_guest("debian-built", guests.UP, after=start["debian-built"])
    host.wait_for_guest("litmus-built", "litmus: up", after=start["litmus-built"])
    listed = host.run("xl list").check().text
    assert re.search(r"^debian-built +\d+ +128 +1 ", listed, re.MULTILINE), listed
    checked = host.run("xenpv check debian-built; xenpv check litmus-built", timeout=120)
    print(checked.text)
    assert checked.status == 0
    # xenpv sets SIF_VIRT_P2M_4TOOLS, so Linux makes no three-level tree, as it does under xl.
    assert "p2m and m2p agree, by linear virtual list, up to" in checked.text
    host.run("xl destroy debian-built && xl destroy litmus-built").check()
    assert host.run("xl info free_memory").check().text == free
    assert not re.findall("debian-built|litmus-built", host.run("xenstore-ls -f; xl list").check().text)


@pytest.mark.deep_elsewhere
def test_build_xl_manages_domain_as_its_own(host: lab.Host) -> None:
    """libxl finds its configuration: xl lists it in full, saves, restores and reboots it."""
    host.run(f"xenpv build {LITMUS} --memory 32M --vcpus 2 --cmdline p2m=both --name kept --start").check()
    start = host.wait_for_guest("kept", "litmus: up")
    [listed] = json.loads(host.run("xl list -l kept").check().stdout)
    info = listed["config"]["b_info"]
    assert (info["kernel"], info["cmdline"], info["max_memkb"], info["max_vcpus"]) == (LITMUS, "p2m=both", 32 << 10, 2)
    host.run("xl save kept /tmp/kept.save && xl restore /tmp/kept.save && rm /tmp/kept.save").check()
    resumed = host.wait_for_guest("kept", "litmus: pattern ok", after=start)
    host.run("xl reboot kept").check()
    host.wait_for_guest("kept", "litmus: up", after=resumed)
    host.run("xl destroy kept").check()
    host.run(f"xenpv build {LITMUS} --memory 32M --name kept && xl destroy kept").check()
    kept = host.run("cd /var/lib/xen && ls -d userdata-*").check().text.split()
    assert kept == [f"userdata-d.0.{UUID(int=0)}.libxl-json"]  # dom0's own


def test_build_file_is_started_by_stock_xl(host: lab.Host) -> None:
    """The file is built without Xen; `xl restore` starts it at its kernel's entry."""
    files = guests.folder()
    kernels: dict[str, tuple[Path, list[object], str]] = {
        "file-litmus": (
            ROOT / "guests/litmus/build/litmus.elf",
            ["--memory", "32M", "--cmdline", "p2m=both"],
            "litmus: up",
        ),
        "file-debian": (
            files / "vmlinuz",
            ["--memory", "128M", "--ramdisk", files / "initramfs", "--cmdline", "console=hvc0"],
            guests.UP,
        ),
    }
    start = {name: len(host.guest_console(name)) for name in kernels}
    for name, (kernel, options, _) in kernels.items():
        ran = xenpv("build", kernel, *options, "--name", name, "-o", host.share / f"{name}.save")
        assert ran.code == 0, ran.err
        host.run(f"xl restore /share/{name}.save", timeout=120).check()
    for name, (_, _, up) in kernels.items():
        host.wait_for_guest(name, up, after=start[name])
        host.run(f"xl destroy {name}").check()
        (host.share / f"{name}.save").unlink()


@ONE_VERSION
def test_build_beyond_limit_is_refused_before_creating(host: lab.Host) -> None:
    ran = host.run(
        f"xl list > before; xenpv build {NO_P2M} --memory 2T --name large; echo $? > status; xl list > after"
    )
    assert (ran.outputs / "status").read_text().strip() == "1"
    assert (ran.outputs / "before").read_text().split()[:8] == (ran.outputs / "after").read_text().split()[:8]
    assert "0x20000000 pages" in ran.stderr.decode()
