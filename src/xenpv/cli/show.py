"""``xenpv show``: the domain in a save file or a core."""

from __future__ import annotations

from typing import Any

import click

from xenpv.abi.x86 import VGCF_IN_KERNEL
from xenpv.abi.xen import START_INFO, START_INFO_MAGIC
from xenpv.cli.target import INDEX, open_file
from xenpv.cli.terminal import FILE, JSON, print_json, print_table
from xenpv.errors import Fault, GuestError
from xenpv.frames import HAS_DATA, PAGE_SIZE, PageType
from xenpv.source.config import config_of
from xenpv.source.core import CoreDomain
from xenpv.source.domain import Domain
from xenpv.source.saved import SavedDomain
from xenpv.stream.order import Guest
from xenpv.text import printable, size

_TSC_MODES = ("default", "always emulated", "never emulated", "PVRDTSCP")


@click.command()
@FILE
@INDEX
@click.option("-v", "--verbose", is_flag=True, help="List all records with their offsets, and the configuration.")
@JSON
def show(file: str, verbose: bool, as_json: bool) -> None:
    """What this file is, a save file or a core: which domain, from which Xen, its memory, p2m and vcpus.

    Reads the records and passes over page content, so a file of any size takes a moment. Nothing is verified beyond
    what reading needs: see xenpv verify.
    """
    with open_file(file) as domain:
        if domain.origin == "dumped":
            description = describe_core(domain)
            print_json(description) if as_json else print_core(description)
        else:
            description = describe(domain, records=verbose or as_json)
            print_json(description) if as_json else print_description(domain, description, verbose=verbose)


def describe(saved: SavedDomain, *, records: bool = False) -> dict[str, Any]:
    """Everything that show says, as plain values; frame numbers and addresses are numbers, sizes in bytes."""
    contents = saved.contents
    assert contents.domain is not None
    assert contents.image is not None
    config = config_of(contents)
    counts = contents.index.count()
    pages = sum(n for kind, n in counts.items() if HAS_DATA[kind])
    out: dict[str, Any] = {
        "file": saved.name,
        "size": saved.source.size,
        "envelope": str(contents.envelope.kind)
        if contents.envelope
        else ("libxl" if contents.libxl_header else "libxc"),
        "stream_version": contents.image.version,
        "byte_order": "big" if contents.image.big_endian else "little",
        "domain_type": contents.domain.guest.name,
        "xen": f"{contents.domain.xen_major}.{contents.domain.xen_minor}",
        "complete": contents.complete,
        "trailing_bytes": saved.source.trailing,
        "config": None if config is None else _config(config),
        "pages": {PageType(kind).name if kind in set(PageType) else hex(kind): n for kind, n in counts.items()},
        "memory_in_stream": pages * PAGE_SIZE,
        "entries_sent": contents.index.sent,
        "entries_repeated": contents.index.repeated,
        "last_pfn": contents.index.last_pfn,
        "checkpoints": contents.checkpoints,
    }
    if contents.domain.guest is Guest.PV:
        out |= _pv(saved)
    else:
        out["hvm"] = {
            "params": None if contents.hvm_params is None else contents.hvm_params.params,
            "context_bytes": contents.hvm_context.length if contents.hvm_context else 0,
            "vcpus": describe_vcpus(saved),
        }
    tsc = contents.tsc
    out["tsc"] = tsc and {"mode": tsc.mode, "khz": tsc.khz, "nsec": tsc.nsec, "incarnation": tsc.incarnation}
    out["cpu_policy"] = {
        "cpuid_leaves": contents.cpuid_policy.length // contents.cpuid_policy.ENTRY if contents.cpuid_policy else 0,
        "msrs": contents.msr_policy.length // contents.msr_policy.ENTRY if contents.msr_policy else 0,
    }
    if records:
        out["records"] = [
            {"offset": r.offset, "name": r.name, "length": r.length, "count": r.count, "pages": r.pages}
            for r in contents.record_groups
        ]
    return out


def _config(config: Any) -> dict[str, Any]:
    fields = ("format", "name", "uuid", "type", "max_memkb", "target_memkb", "max_vcpus")
    return {field: getattr(config, field) for field in fields}


def _pv(saved: SavedDomain) -> dict[str, Any]:
    contents = saved.contents
    anchors = saved.anchors
    p2m: dict[str, Any] = {"end_pfn": contents.end_pfn, "frames": saved.p2m.places}
    if anchors is not None:
        p2m |= {
            "form": anchors.names,
            "max_pfn": anchors.max_pfn,
            "frame_list_list": anchors.frame_list_list,
            "p2m_cr3": anchors.p2m_cr3,
            "p2m_vaddr": anchors.p2m_vaddr,
            "p2m_generation": anchors.p2m_generation,
        }
    info = contents.pv_info
    return {
        "width": info.guest_width if info else None,
        "levels": info.pt_levels if info else None,
        "p2m": p2m,
        "start_info": _start_info(saved),
        "vcpus": [_vcpu(saved, vcpu) for vcpu in sorted(contents.vcpus)],
    }


def _start_info(saved: SavedDomain) -> dict[str, Any] | None:
    pfn = saved.start_info_pfn
    if pfn is None:
        return None
    width = saved.contents.width
    try:
        info = START_INFO.read(saved.memory.page(pfn), width)
    except Fault as e:
        return {"pfn": int(pfn), "error": str(e)}
    if not bytes(info["magic"]).startswith(START_INFO_MAGIC[width]):
        return {"pfn": int(pfn), "error": "not a start info page"}
    return {
        "pfn": int(pfn),
        "nr_pages": int(info["nr_pages"]),
        "store_pfn": int(info["store_mfn"]),
        "console_pfn": int(info["console"]["domU"]["mfn"]),
        "cmd_line": bytes(info["cmd_line"]).decode("utf-8", "replace"),
    }


def _vcpu(saved: SavedDomain, vcpu: int) -> dict[str, Any]:
    context = saved.vcpu_context(vcpu)
    records = saved.contents.vcpus[vcpu]
    out: dict[str, Any] = {
        "vcpu": vcpu,
        "records": [kind for kind in ("basic", "extended", "xsave", "msrs") if getattr(records, kind) is not None],
    }
    if context is None:
        return out
    regs, wide = context["user_regs"], saved.contents.width == 8
    user = saved.cr3(vcpu, user=True)
    return out | {
        "ip": int(regs["rip" if wide else "eip"]),
        "sp": int(regs["rsp" if wide else "esp"]),
        "cs": int(regs["cs"]),
        "flags": int(regs["rflags" if wide else "eflags"]),
        "mode": "kernel" if int(context["flags"]) & VGCF_IN_KERNEL else "user",
        "cr3_pfn": saved.cr3(vcpu),
        "user_cr3_pfn": user,
        "gdt_entries": int(context["gdt_ents"]),
        "vm_assist": int(context["vm_assist"]),
    }


def print_description(saved: SavedDomain, d: dict[str, Any], *, verbose: bool) -> None:
    """What describe() found, for people."""
    config = d["config"] or {}
    name = f' "{printable(config["name"])}"' if config.get("name") else ""
    bits = f", {d['width'] * 8}-bit with {d['levels']} levels of page tables" if d.get("width") else ""
    source = "converted from a legacy stream" if d["xen"].startswith("0.") else f"saved by Xen {d['xen']}"
    end = "complete" if d["complete"] else click.style("cut off", fg="red")
    click.echo(click.style(f"{d['domain_type']} domain{name}", bold=True) + f"{bits}, {source}, {end}")
    _line("envelope", f"{d['envelope']}, libxc stream version {d['stream_version']}, {size(d['size'])}")
    if config.get("uuid"):
        _line("uuid", printable(config["uuid"]))
    limits = [f"{what} {size(kib * 1024)}" for what, kib in _memory_limits(config) if kib]
    _line("memory", ", ".join([f"{size(d['memory_in_stream'])} in the stream", *limits]))
    _line("pages", ", ".join(f"{n} {kind}" for kind, n in d["pages"].items()))
    if d["entries_repeated"]:
        _line("", f"{d['entries_sent']} sent, {d['entries_repeated']} of them again later")
    if d["checkpoints"]:
        _line("checkpoints", str(d["checkpoints"]))
    if d["domain_type"] == "PV":
        _print_pv(d)
    else:
        _line("hvm", f"{len(d['hvm']['params'] or {})} parameters, {d['hvm']['context_bytes']} bytes of context")
    if d["tsc"]:
        mode = dict(enumerate(_TSC_MODES)).get(d["tsc"]["mode"], str(d["tsc"]["mode"]))
        _line(
            "tsc",
            f"{mode}, {d['tsc']['khz']} kHz, {d['tsc']['nsec'] / 1e9:.3f} s, incarnation {d['tsc']['incarnation']}",
        )
    policy = d["cpu_policy"]
    _line("cpu policy", f"{policy['cpuid_leaves']} CPUID leaves, {policy['msrs']} MSRs")
    if d["trailing_bytes"] > 0:
        _line("", click.style(f"{d['trailing_bytes']} bytes follow the end of the stream", fg="yellow"))
    if d.get("vcpus"):
        _print_vcpus(d["vcpus"])
    if d.get("hvm") and d["hvm"]["vcpus"]:
        print_vcpus(d["hvm"]["vcpus"])
    if verbose:
        rows = [
            [f"{r['offset']:#x}", r["name"], str(r["count"]), str(r["length"]), str(r["pages"] or "")]
            for r in d["records"]
        ]
        print_table("Records", ["offset#", "record", "count#", "bytes#", "pages#"], rows)
        full = config_of(saved.contents)
        if full is not None:
            click.echo(click.style("Configuration", bold=True) + f"\n{printable(full.text)}")


def _memory_limits(config: dict[str, Any]) -> list[tuple[str, int | None]]:
    return [("target", config.get("target_memkb")), ("maximum", config.get("max_memkb"))]


def _print_pv(d: dict[str, Any]) -> None:
    p2m, start = d["p2m"], d["start_info"]
    _line(
        "p2m",
        f"pfns 0 to {p2m['end_pfn']:#x} in {p2m['frames']} frames" + (f"; {p2m['form']}" if "form" in p2m else ""),
    )
    if "form" in p2m:
        anchors = [f"max_pfn {p2m['max_pfn']:#x}", f"frame list list mfn {p2m['frame_list_list']:#x}"]
        if p2m["p2m_cr3"]:
            anchors += [f"list at {p2m['p2m_vaddr']:#x}", f"generation {p2m['p2m_generation']}"]
        _line("", ", ".join(anchors))
    if start and "error" in start:
        _line("start info", click.style(f"pfn {start['pfn']:#x}: {start['error']}", fg="red"))
    elif start:
        frames = f"xenstore pfn {start['store_pfn']:#x}, console pfn {start['console_pfn']:#x}"
        _line("start info", f"pfn {start['pfn']:#x}, {frames}")
        if start["cmd_line"]:
            _line("command line", printable(start["cmd_line"]))


def _line(label: str, text: str) -> None:
    click.echo(f"  {label:<13}{text}")


def _print_vcpus(vcpus: list[dict[str, Any]]) -> None:
    rows = []
    for v in vcpus:
        if "ip" not in v:
            rows.append([str(v["vcpu"]), "", "", "", "", "", ", ".join(v["records"])])
            continue
        user = "" if v["user_cr3_pfn"] is None else f"{v['user_cr3_pfn']:#x}"
        place = [f"{v['ip']:#x}", f"{v['sp']:#x}", v["mode"], f"{v['cr3_pfn']:#x}", user]
        rows.append([str(v["vcpu"]), *place, ", ".join(v["records"])])
    print_table("", ["vcpu#", "ip", "sp", "mode", "cr3 pfn", "user cr3 pfn", "records"], rows)


# --- cores, and the vcpus of HVM domains -----------------------------------------------------------------------------


def describe_core(core: CoreDomain) -> dict[str, Any]:
    """Everything that show says of a core, as plain values; frame numbers and addresses are numbers, sizes in bytes."""
    layout, anchors = core.layout, None if core.hvm else core.anchors
    runs = core.page_list.runs
    pages = runs.total
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
        "runs": len(runs),
        "last_pfn": runs.stop - 1,
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


def describe_vcpus(domain: Domain) -> list[dict[str, Any]]:
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
