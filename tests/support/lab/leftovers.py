"""What is there on a host before a fault and after it, and what came of many, counted: in dom0."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from xenpv.host.xen.host import XenHost

PATIENCE = 30.0  # seconds in which Xen frees a domain: when its daemons have let go of it
XENS_OWN = 16  # pages that Xen may keep for itself; a leak of one page at each fault would be more in the end


class Left:
    """What there was on a host, and what differs."""

    def __init__(self, host: XenHost) -> None:
        self.host = host
        self.before = self._now()
        self.free = host.free_pages()

    def _now(self) -> dict[str, list[str]]:
        domids = [info.domid for info in self.host.domains()]
        nodes = said("xenstore-ls", "-f").splitlines()
        return {
            "domains": [str(domid) for domid in domids],
            "nodes": sorted(line.split(" = ")[0] for line in nodes),
            "files": sorted(path.name for path in Path("/var/lib/xen").iterdir()),
            "event channels": [f"dom{domid}: {len(said('lsevtchn', str(domid)).splitlines())}" for domid in domids],
        }

    def over(self) -> list[str]:
        """What is there and was not, or the other way round, once Xen has had time to free it: nothing is good."""
        deadline = time.monotonic() + PATIENCE
        while True:
            now = self._now()
            differ = [f"{kind}: {one}" for kind, was in self.before.items() for one in sorted({*was} ^ {*now[kind]})]
            lacking = self.free - self.host.free_pages()
            if lacking >= XENS_OWN:
                differ.append(f"{lacking} pages")
            if not differ or time.monotonic() > deadline:
                return differ
            time.sleep(0.05)


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Tally:
    """What came of each fault, by its kind; and what was left, told with the fault."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.left: list[str] = []
        self.said: dict[str, str] = {}  # the first of each outcome

    def add(self, kind: str, outcome: str, words: str, where: str, left: list[str]) -> None:
        self.counts.setdefault(kind, Counter())[outcome] += 1
        self.said.setdefault(f"{kind}: {outcome}", f"{where}: {words}")
        if outcome not in {"went well", "restored"} and not words.strip():
            left = [*left, "no words"]
        self.left += [f"{kind} at {where}: {one}" for one in left]
        print(kind, where, outcome, words, left, file=sys.stderr, flush=True)

    def to_json(self) -> dict[str, Any]:
        return {"counts": self.counts, "left": self.left, "said": self.said}
