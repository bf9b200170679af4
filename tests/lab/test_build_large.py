"""A domain of more than 512 GiB, built and run on real Xen.

The host is sparse: of its memory Xen's own tables become resident, 1 % of all, the domain's p2m, and what is written.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lab
from lab import guests
from tests.lab.conftest import Hosts

GIB = 600
REST = 25  # GiB of the host for dom0 and for Xen's tables
PATIENCE = 900


@pytest.mark.deep
def test_a_domain_of_600_gib_is_built_and_runs(hosts: Hosts) -> None:
    """litmus finds all its pages, and every entry of its p2m agrees with the m2p.

    It is switched off with its host: of a domain that is destroyed Xen would write every page, and QEMU have them all.
    """
    hosts.close()
    with lab.Host(lab.DEFAULT, mem=f"{GIB + REST}G", dom0_mem="2G") as host:
        command = f"xenpv build {guests.LITMUS} --memory {GIB}G --cmdline 'p2m=linear use=64M' --name large --start"
        built = host.run(command, timeout=PATIENCE).check()
        host.wait_for_guest("large", f"litmus: up pages={GIB << 18} vcpus=1 form=linear pattern=")
        assert "not understood" not in host.guest_console("large")
        checked = host.run("xenpv check --quick --json large", timeout=PATIENCE).check()
        found = json.loads(checked.stdout)
        assert (found["form"], found["last_pfn"]) == ("linear virtual list", (GIB << 18) - 1)
        assert (found["findings"], found["left_out"]) == ([], {})
        resident = next(line for line in Path(f"/proc/{host.pid}/status").read_text().splitlines() if "VmHWM" in line)
        print(f"boot {host.boot_seconds:.0f} s, build {built.seconds:.0f} s, check {checked.seconds:.0f} s, {resident}")
        assert int(resident.split()[1]) < 10 << 20  # KiB
