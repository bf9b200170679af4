"""``xenpv check``, and ``p2m`` of a running domain: nothing is paused, nothing is changed."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from xenpv.cli.terminal import JSON, print_json, size
from xenpv.domain.live import LiveDomain, check_physmap
from xenpv.errors import RequestError
from xenpv.findings import Findings
from xenpv.frames import NO_FRAME, PAGE_SIZE
from xenpv.host import find
from xenpv.host.xen import XenHost
from xenpv.memory.physmap import FOREIGN, IDENTITY, is_own


def open_pv(host: XenHost, target: str) -> LiveDomain:
    """The PV domain that people mean by its id, uuid or name."""
    info = find(host, target)
    if info.hvm:
        raise RequestError(f"dom{info.domid} is HVM or PVH: Xen keeps its p2m, the guest publishes none")
    return LiveDomain(host, info)


@click.command()
@click.argument("domain", metavar="DOM")
@click.option("--keep", type=click.IntRange(min=0), default=20, show_default=True, metavar="N",
              help="Findings to show of each rule; all are counted.")  # fmt: skip
@JSON
def check(domain: str, keep: int, as_json: bool) -> int:
    """Hold a running domain's p2m against Xen's m2p, entry by entry, by every way that the guest exposes.

    DOM is an id, a uuid or a name. Says which pfn has a frame that is another pfn's, or not the domain's, or stale;
    exit status 1 on findings. The domain runs on meanwhile: what it changes while we look may show; look again.
    """
    with XenHost() as host:
        live = open_pv(host, domain)
        findings = Findings(keep)
        check_physmap(live, findings)
        names = [way.name for way in live.ways]
    if as_json:
        found = [finding.to_json() for finding in findings]
        print_json({"domid": live.info.domid, "ways": names, "errors": findings.errors, "findings": found})
    else:
        for finding in findings:
            click.echo(f"{click.style('error: ', fg='red', bold=True)}{finding}")
        for rule, n in findings.left_out().items():
            click.echo(f"… and {n} more of [{rule.name}]")
        ways = " and by ".join(names) or "nothing"
        verdict = f"{findings.errors} errors" if findings.errors else "p2m and m2p agree"
        click.echo(f"dom{live.info.domid}: {verdict}, by {ways}, up to pfn {max(live.anchors.max_pfn - 1, 0):#x}")
    return 1 if findings.errors else 0


def print_p2m(target: str, lookup: tuple[int, ...], as_json: bool) -> None:
    """What ``xenpv p2m`` says of a running domain."""
    with XenHost() as host:
        description = describe(open_pv(host, target), lookup)
    if as_json:
        print_json(description)
        return
    d = description
    click.echo(click.style(f"dom{d['domid']}: {' and '.join(d['forms']) or 'exposes no p2m'}", bold=True))
    click.echo(f"  max_pfn      {d['max_pfn']:#x} entries ({size(d['max_pfn'] * PAGE_SIZE)})")
    click.echo(f"  anchors      frame list list {d['frame_list_list_mfn']:#x}, p2m_cr3 {d['p2m_cr3']:#x}", nl=False)
    click.echo(f", p2m_vaddr {d['p2m_vaddr']:#x}, generation {d['p2m_generation']}" if d["p2m_cr3"] else "")
    if "leaves" in d:
        click.echo(
            f"  leaves       {d['leaves']} frames in {d['places']} places; {d['shared']} frames shared by several"
        )
        kinds = f"{d['foreign']} foreign, {d['identity']} identity, {d['invalid']} without a frame"
        click.echo(f"  entries      {d['populated']} populated, {kinds}")
    for found in d.get("lookup", []):
        mfn = "INVALID_MFN" if found["mfn"] is None else f"{found['mfn']:#x}"
        click.echo(f"pfn={found['pfn']:#x} ==> mfn={mfn}")


def describe(live: LiveDomain, lookup: tuple[int, ...] = ()) -> dict[str, Any]:
    """The p2m of a running domain as plain values."""
    anchors, there = live.anchors, live.ways
    out: dict[str, Any] = {
        "domid": live.info.domid,
        "name": live.info.name,
        "forms": [way.name for way in there],
        "max_pfn": anchors.max_pfn,
        "frame_list_list_mfn": anchors.frame_list_list,
        "p2m_cr3": anchors.p2m_cr3,
        "p2m_vaddr": anchors.p2m_vaddr,
        "p2m_generation": anchors.p2m_generation,
    }
    if not there:
        return out
    physmap = live.physmap()
    frames, _, places = physmap.distinct()
    counts = dict.fromkeys(("populated", "foreign", "identity"), 0)
    for first, times, mfns in physmap.content():
        inside = (first * physmap.per_leaf)[:, None] + np.arange(physmap.per_leaf) < physmap.entries
        valid = inside & (mfns != NO_FRAME)
        counts["populated"] += int((np.count_nonzero(is_own(mfns) & inside, axis=1) * times).sum())
        counts["foreign"] += int((np.count_nonzero(valid & (mfns & FOREIGN != 0), axis=1) * times).sum())
        counts["identity"] += int(
            (np.count_nonzero(valid & (mfns & FOREIGN == 0) & (mfns & IDENTITY != 0), axis=1) * times).sum()
        )
    out |= {"leaves": len(frames), "places": int(places.sum()), "shared": int(np.count_nonzero(places > 1)), **counts}
    out["invalid"] = anchors.max_pfn - sum(counts.values())
    if lookup:
        mfns_of = physmap.lookup(list(lookup))
        out["lookup"] = [{"pfn": pfn, "mfn": mfn} for pfn, mfn in zip(lookup, mfns_of, strict=True)]
    return out
