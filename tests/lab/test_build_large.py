"""Builds and runs a domain of more than 512 GiB on real Xen.

The host's memory is sparse. Resident are Xen's own tables, 1 % of all memory, the domain's p2m, and written pages.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lab
from lab import guests
from tests.lab.conftest import Hosts

GIB = 600
HOST_GIB = 25  # GiB of the host for dom0 and for Xen's tables
TIMEOUT = 900


@pytest.mark.deep
def test_build_domain_of_600_gib_runs_with_sound_physmap(hosts: Hosts) -> None:
    """litmus finds all its pages, and every entry of its p2m agrees with the m2p.

    The host is switched off without destroying the domain: Xen would scrub every page, and make all of them resident.
    """
    hosts.close()
    with lab.Host(lab.DEFAULT, mem=f"{GIB + HOST_GIB}G", dom0_mem="2G") as host:
        command = f"xenpv build {guests.LITMUS} --memory {GIB}G --cmdline 'p2m=linear use=64M' --name large --start"
        built = host.run(command, timeout=TIMEOUT).check()
        host.wait_for_guest("large", f"litmus: up pages={GIB << 18} vcpus=1 form=linear pattern=")
        assert "not understood" not in host.guest_console("large")
        checked = host.run("xenpv check --quick --json large", timeout=TIMEOUT).check()
        result = json.loads(checked.stdout)
        assert (result["form"], result["last_pfn"]) == ("linear virtual list", (GIB << 18) - 1)
        assert (result["findings"], result["left_out"]) == ([], {})
        resident = next(line for line in Path(f"/proc/{host.pid}/status").read_text().splitlines() if "VmHWM" in line)
        print(f"boot {host.boot_seconds:.0f} s, build {built.seconds:.0f} s, check {checked.seconds:.0f} s, {resident}")
        assert int(resident.split()[1]) < 10 << 20  # KiB
