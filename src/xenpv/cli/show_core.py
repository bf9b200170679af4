"""What ``xenpv show`` says of a core; and of the vcpus of any domain that is not a PV save file."""

from __future__ import annotations

from typing import Any

import click

from xenpv.cli.terminal import print_table
from xenpv.errors import GuestError
from xenpv.frames import PAGE_SIZE
from xenpv.source.core import CoreDomain
from xenpv.source.saved import SavedDomain
from xenpv.text import printable, size


def describe_core(core: CoreDomain) -> dict[str, Any]:
    """Everything that show says of a core, as plain values; frame numbers and addresses are numbers, sizes in bytes."""
    layout, anchors = core.layout, None if core.hvm else core.anchors
    first, count = core.pages.extents
    pages = int(count.sum())
    out: dict[str, Any] = {
        "file": core.name,
        "size": core.source.size,
        "format": "xl dump-core",
        "domain_type": "HVM" if core.hvm else "PV",
        "xen": layout.xen,
        "width": core.width,
        "pages": pages,
        "memory": pages * PAGE_SIZE,
        "pages_announced": layout.announced,
        "runs": len(first),
        "last_pfn": int(first[-1]) + int(count[-1]) - 1 if len(first) else -1,
        "shared_info": core.shared_info() is not None,
    }
    if anchors is not None:
        out["p2m"] = {
            "form": anchors.names,
            "max_pfn": anchors.max_pfn,
            "frame_list_list_mfn": anchors.frame_list_list,
            "p2m_cr3": anchors.p2m_cr3,
            "p2m_vaddr": anchors.p2m_vaddr,
            "p2m_generation": anchors.p2m_generation,
        }
    return out | {"vcpus": describe_vcpus(core)}


def describe_vcpus(domain: CoreDomain | SavedDomain) -> list[dict[str, Any]]:
    """Where each vcpu was. A top table that is no page of the domain is None."""
    out = []
    for vcpu in domain.vcpus:
        registers = domain.registers(vcpu)
        if registers is None:
            continue
        try:
            tops = [domain.cr3(vcpu), domain.cr3(vcpu, user=True)]
        except GuestError:
            tops = [None, None]
        one = {
            "vcpu": vcpu,
            "ip": registers.ip,
            "sp": registers.sp,
            "cs": registers.segments["cs"],
            "flags": registers.flags,
            "mode": "kernel" if registers.in_kernel else "user",
            "cr3_pfn": tops[0],
            "user_cr3_pfn": tops[1],
        }
        out.append(one | ({"width": registers.width, "paging": registers.paging.name} if domain.hvm else {}))
    return out


def print_core(d: dict[str, Any]) -> None:
    """What describe_core() found, for people."""
    xen = f" on Xen {printable(d['xen'])}" if d["xen"] else ""
    what = f"{d['domain_type']} domain"
    click.echo(
        click.style(what, bold=True) + f", {d['width'] * 8}-bit, a core of {d['format']}{xen}, {size(d['size'])}"
    )
    lost = d["pages_announced"] - d["pages"]
    lacks = click.style(f"; {lost} more were announced", fg="yellow") if lost else ""
    click.echo(f"  {'pages':<13}{d['pages']} ({size(d['memory'])}), pfns up to {max(d['last_pfn'], 0):#x}{lacks}")
    if p2m := d.get("p2m"):
        click.echo(f"  {'p2m':<13}{p2m['form']}, max_pfn {p2m['max_pfn']:#x}")
    print_vcpus(d["vcpus"])


def print_vcpus(vcpus: list[dict[str, Any]]) -> None:
    """A table of what describe_vcpus() found."""
    hvm = any("paging" in v for v in vcpus)
    rows = []
    for v in vcpus:
        frames = ["" if v[top] is None else f"{v[top]:#x}" for top in ("cr3_pfn", "user_cr3_pfn")]
        own = [frames[0], v["paging"]] if hvm else frames
        rows.append([str(v["vcpu"]), f"{v['ip']:#x}", f"{v['sp']:#x}", v["mode"], *own])
    print_table("", ["vcpu#", "ip", "sp", "mode", "cr3 pfn", "paging" if hvm else "user cr3 pfn"], rows)
