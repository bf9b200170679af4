"""``xenpv show``: the domain in a save file or a core."""

from __future__ import annotations

from typing import Any

import click

from xenpv.abi.xen import START_INFO, START_INFO_MAGIC
from xenpv.cli.target import INDEX, open_file
from xenpv.cli.terminal import FILE, JSON, print_field, print_json, print_table
from xenpv.errors import Fault, GuestError
from xenpv.frames import HAS_DATA, PAGE_SIZE, PageType
from xenpv.memory.p2m_anchors import Anchors
from xenpv.source.config import Config
from xenpv.source.core import CoreDomain
from xenpv.source.domain import Domain
from xenpv.source.saved import SavedDomain
from xenpv.stream.record_order import Guest
from xenpv.text import printable, size

_LINES = "\n\t"  # of a configuration
_TSC_MODES = ("default", "always emulated", "never emulated", "PVRDTSCP")
_VCPU_RECORDS = ("basic", "extended", "xsave", "msrs")


@click.command()
@FILE
@click.option("-v", "--verbose", is_flag=True, help="List every record with its offset, and the configuration.")
@INDEX
@JSON
def show(file: str, verbose: bool, as_json: bool) -> None:
    """Show what a save file or core contains: domain, Xen, memory, p2m, vcpus.

    Only the records are read, not the pages, so even a large file takes a moment. `xenpv verify` checks the file.

    \b
    Examples:
      xenpv show dom.save
      xenpv show -v dom.save                  every record with its offset, and the configuration
      xenpv show --json dom.save | jq .config
      xenpv show dom.core                     a core of xl dump-core
    """
    with open_file(file) as domain:
        if domain.origin == "dumped":
            description = describe_core(domain)
            print_json(description) if as_json else print_core(description)
        else:
            description = describe(domain, records=verbose or as_json)
            print_json(description) if as_json else print_description(domain, description, verbose=verbose)


def describe(saved: SavedDomain, *, records: bool = False) -> dict[str, Any]:
    """Return the description of a saved domain that --json prints. Sizes are in bytes."""
    contents = saved.contents
    assert contents.domain is not None
    image = contents.image  # a legacy stream has none
    config = saved.config
    counts = contents.index.count()
    pages = sum(n for kind, n in counts.items() if HAS_DATA[kind])
    out: dict[str, Any] = {
        "file": saved.name,
        "size": saved.source.size,
        "envelope": str(contents.envelope.kind)
        if contents.envelope
        else ("libxl" if contents.libxl_header else "libxc"),
        "stream_version": 1 if image is None else image.version,
        "byte_order": "big" if image is not None and image.big_endian else "little",
        "domain_type": contents.domain.guest.name,
        "xen": f"{contents.domain.xen_major}.{contents.domain.xen_minor}",
        "complete": contents.complete,
        "trailing_bytes": saved.source.trailing,
        "config": None if config is None else _describe_config(config),
        "pages": {PageType(kind).name if kind in set(PageType) else hex(kind): n for kind, n in counts.items()},
        "memory_in_stream": pages * PAGE_SIZE,
        "entries_sent": contents.index.sent,
        "entries_repeated": contents.index.repeated,
        "last_pfn": contents.index.last_pfn,
        "checkpoints": contents.checkpoints,
    }
    if contents.domain.guest is Guest.PV:
        out |= _describe_pv(saved)
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


def _describe_config(config: Config) -> dict[str, Any]:
    fields = ("format", "name", "uuid", "type", "max_memkb", "target_memkb", "max_vcpus")
    return {field: getattr(config, field) for field in fields}


def _describe_pv(saved: SavedDomain) -> dict[str, Any]:
    """Describe what only PV domains have."""
    contents = saved.contents
    p2m: dict[str, Any] = {"end_pfn": contents.end_pfn, "frames": saved.p2m.leaf_count}
    if saved.anchors is not None:
        p2m |= _describe_anchors(saved.anchors, "frame_list_list")
    info = contents.pv_info
    return {
        "width": info.guest_width if info else None,
        "levels": info.pt_levels if info else None,
        "p2m": p2m,
        "start_info": _describe_start_info(saved),
        "vcpus": [_describe_pv_vcpu(saved, vcpu) for vcpu in sorted(contents.vcpus)],
    }


def _describe_anchors(anchors: Anchors, frame_list_list: str) -> dict[str, Any]:
    """Describe a p2m's anchors.

    ``frame_list_list`` is the key of that mfn; it differs between save files and cores.
    """
    return {
        "form": anchors.form_names,
        "max_pfn": anchors.max_pfn,
        frame_list_list: anchors.frame_list_list,
        "p2m_cr3": anchors.p2m_cr3,
        "p2m_vaddr": anchors.p2m_vaddr,
        "p2m_generation": anchors.p2m_generation,
    }


def _describe_start_info(saved: SavedDomain) -> dict[str, Any] | None:
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


def _describe_pv_vcpu(saved: SavedDomain, vcpu: int) -> dict[str, Any]:
    """Describe a vcpu: its records, and its registers if its context is in the stream."""
    records = saved.contents.vcpus[vcpu]
    out: dict[str, Any] = {
        "vcpu": vcpu,
        "records": [kind for kind in _VCPU_RECORDS if getattr(records, kind) is not None],
    }
    context = saved.vcpu_context(vcpu)
    if context is None:
        return out
    out |= _describe_registers(saved, vcpu) or {}
    return out | {"gdt_entries": int(context["gdt_ents"]), "vm_assist": int(context["vm_assist"])}


def _describe_registers(domain: Domain, vcpu: int) -> dict[str, Any] | None:
    """Describe a vcpu's registers; None if they are not known.

    A cr3 that names no page of the domain is None, and "cr3_error" tells why.
    """
    registers = domain.registers(vcpu)
    if registers is None:
        return None
    errors: list[str] = []
    cr3, user_cr3 = (_cr3_pfn(domain, vcpu, errors, user=user) for user in (False, True))
    out: dict[str, Any] = {
        "ip": registers.ip,
        "sp": registers.sp,
        "cs": registers.segments["cs"],
        "flags": registers.flags,
        "mode": "kernel" if registers.in_kernel else "user",
        "cr3_pfn": cr3,
        "user_cr3_pfn": user_cr3,
    }
    if errors:
        out["cr3_error"] = "; ".join(errors)
    return out | ({"width": registers.width, "paging": registers.paging.name} if domain.hvm else {})


def _cr3_pfn(domain: Domain, vcpu: int, errors: list[str], *, user: bool) -> int | None:
    """Return the pfn of a vcpu's top page table; None if it is not known.

    If it is invalid, the reason is added to ``errors``.
    """
    try:
        return domain.cr3(vcpu, user=user)
    except GuestError as e:
        errors.append(str(e))
        return None


def describe_vcpus(domain: Domain) -> list[dict[str, Any]]:
    """Return the description of every vcpu whose registers are known."""
    described = ((vcpu, _describe_registers(domain, vcpu)) for vcpu in domain.vcpus)
    return [{"vcpu": vcpu} | registers for vcpu, registers in described if registers is not None]


def describe_core(core: CoreDomain) -> dict[str, Any]:
    """Return the description of a core that --json prints. Sizes are in bytes."""
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
        out["p2m"] = _describe_anchors(anchors, "frame_list_list_mfn")
    return out | {"vcpus": describe_vcpus(core)}


# --- text ------------------------------------------------------------------------------------------------------------


def print_description(saved: SavedDomain, facts: dict[str, Any], *, verbose: bool) -> None:
    """Print what describe() returned.

    ``verbose`` adds the records and the configuration.
    """
    config = facts["config"] or {}
    name = f' "{printable(config["name"])}"' if config.get("name") else ""
    bits = f", {facts['width'] * 8}-bit with {facts['levels']} levels of page tables" if facts.get("width") else ""
    source = f"saved by Xen {facts['xen']}"
    if facts["xen"].startswith("0."):
        source = "saved by a Xen before 4.6" if facts["stream_version"] == 1 else "converted from a legacy stream"
    completeness = "complete" if facts["complete"] else click.style("cut off", fg="red")
    click.echo(click.style(f"{facts['domain_type']} domain{name}", bold=True) + f"{bits}, {source}, {completeness}")
    print_field(
        "envelope", f"{facts['envelope']}, libxc stream version {facts['stream_version']}, {size(facts['size'])}"
    )
    if config.get("uuid"):
        print_field("uuid", printable(config["uuid"]))
    limits = [("target", config.get("target_memkb")), ("maximum", config.get("max_memkb"))]
    sizes = [f"{size(facts['memory_in_stream'])} in the stream"]
    sizes += [f"{limit} {size(kib * 1024)}" for limit, kib in limits if kib]
    print_field("memory", ", ".join(sizes))
    print_field("pages", ", ".join(f"{count} {page_type}" for page_type, count in facts["pages"].items()))
    if facts["entries_repeated"]:
        print_field("", f"{facts['entries_sent']} sent, {facts['entries_repeated']} of them repeated later")
    if facts["checkpoints"]:
        print_field("checkpoints", str(facts["checkpoints"]))
    if facts["domain_type"] == "PV":
        _print_pv(facts)
    else:
        print_field(
            "hvm", f"{len(facts['hvm']['params'] or {})} parameters, {facts['hvm']['context_bytes']} bytes of context"
        )
    if tsc := facts["tsc"]:
        mode = dict(enumerate(_TSC_MODES)).get(tsc["mode"], str(tsc["mode"]))
        print_field("tsc", f"{mode}, {tsc['khz']} kHz, {tsc['nsec'] / 1e9:.3f} s, incarnation {tsc['incarnation']}")
    policy = facts["cpu_policy"]
    print_field("cpu policy", f"{policy['cpuid_leaves']} CPUID leaves, {policy['msrs']} MSRs")
    if facts["trailing_bytes"] > 0:
        print_field("", click.style(f"{facts['trailing_bytes']} bytes follow the end of the stream", fg="yellow"))
    if vcpus := facts["hvm"]["vcpus"] if "hvm" in facts else facts["vcpus"]:
        print_vcpus(vcpus)
    if verbose:
        rows = [
            [
                f"{record['offset']:#x}",
                record["name"],
                str(record["count"]),
                str(record["length"]),
                str(record["pages"] or ""),
            ]
            for record in facts["records"]
        ]
        print_table("Records", ["offset#", "record", "count#", "bytes#", "pages#"], rows)
        if saved.config is not None:
            click.echo(click.style("Configuration", bold=True) + f"\n{printable(saved.config.text, keep=_LINES)}")


def _print_pv(facts: dict[str, Any]) -> None:
    p2m, start = facts["p2m"], facts["start_info"]
    print_field(
        "p2m",
        f"pfns 0 to {p2m['end_pfn']:#x} in {p2m['frames']} frames" + (f"; {p2m['form']}" if "form" in p2m else ""),
    )
    if "form" in p2m:
        anchors = [f"max_pfn {p2m['max_pfn']:#x}", f"frame list list mfn {p2m['frame_list_list']:#x}"]
        if p2m["p2m_cr3"]:
            anchors += [f"list at {p2m['p2m_vaddr']:#x}", f"generation {p2m['p2m_generation']}"]
        print_field("", ", ".join(anchors))
    if start and "error" in start:
        print_field("start info", click.style(f"pfn {start['pfn']:#x}: {start['error']}", fg="red"))
    elif start:
        frames = f"xenstore pfn {start['store_pfn']:#x}, console pfn {start['console_pfn']:#x}"
        print_field("start info", f"pfn {start['pfn']:#x}, {frames}")
        if start["cmd_line"]:
            print_field("command line", printable(start["cmd_line"]))


def print_core(facts: dict[str, Any]) -> None:
    """Print what describe_core() returned."""
    xen = f" on Xen {printable(facts['xen'])}" if facts["xen"] else ""
    heading = click.style(f"{facts['domain_type']} domain", bold=True)
    click.echo(f"{heading}, {facts['width'] * 8}-bit, a core of {facts['format']}{xen}, {size(facts['size'])}")
    missing = facts["pages_announced"] - facts["pages"]
    warning = click.style(f"; {missing} announced pages are missing", fg="yellow") if missing else ""
    print_field(
        "pages", f"{facts['pages']} ({size(facts['memory'])}), pfns up to {max(facts['last_pfn'], 0):#x}{warning}"
    )
    if p2m := facts.get("p2m"):
        print_field("p2m", f"{p2m['form']}, max_pfn {p2m['max_pfn']:#x}")
    print_vcpus(facts["vcpus"])


def print_vcpus(vcpus: list[dict[str, Any]]) -> None:
    """Print a table of vcpus.

    Those of an HVM domain have a paging mode, those of a PV stream have records.
    """
    hvm, stream = any("paging" in vcpu for vcpu in vcpus), any("records" in vcpu for vcpu in vcpus)
    rows = []
    for vcpu in vcpus:
        row = [str(vcpu["vcpu"])]
        if "ip" in vcpu:
            row += [f"{vcpu['ip']:#x}", f"{vcpu['sp']:#x}", vcpu["mode"], _format_pfn(vcpu["cr3_pfn"])]
            row += [vcpu["paging"] if hvm else _format_pfn(vcpu["user_cr3_pfn"])]
        else:
            row += [""] * 5
        rows.append(row + ([", ".join(vcpu["records"])] if stream else []))
    columns = ["vcpu#", "ip", "sp", "mode", "cr3 pfn", "paging" if hvm else "user cr3 pfn"]
    print_table("", columns + (["records"] if stream else []), rows)
    for vcpu in vcpus:
        if "cr3_error" in vcpu:
            click.echo(click.style(printable(f"vcpu {vcpu['vcpu']}: {vcpu['cr3_error']}"), fg="red"))


def _format_pfn(pfn: int | None) -> str:
    return "" if pfn is None else f"{pfn:#x}"
