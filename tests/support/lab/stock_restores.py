"""Restores broken domains with stock xl, in dom0, and holds verify against it.

Usage: python3 -m tests.support.lab.stock_restores RULE...
Prints, as its last line, JSON: for each case whether `xl restore -p` ends with 0, and what verify says.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from tests.support.breakage import CASES, as_stream
from tests.support.configurations import BAD, IGNORED, SOUND, with_config
from tests.support.saved_files import verify_pipe
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.envelopes import config_json
from tests.support.writers.stream import L1TAB, NOTAB, PAGE, Stream, Wire
from tests.verify import cases_page_tables, cases_vcpus
from xenpv.frames import IS_POPULATED

assert cases_page_tables
assert cases_vcpus
WIRE = Wire()
TIMEOUT = 100.0  # seconds; xl itself gives a console 10


def streams(rule_names: set[str]) -> Iterator[tuple[str, Stream]]:
    """Yield the cases of some rules, of configurations, and of tables that are sent again."""
    yield "sound", as_stream(_domain())
    for case in CASES:
        if case.rule.name in rule_names and case.make.get("width", 8) == 8:  # a lab without 32-bit PV
            domain = _domain(**case.make)
            if case.prepare:
                case.prepare(domain)
            case.spoil(domain)
            stream = as_stream(domain, case.config)
            if case.rewrite:
                case.rewrite(stream)
            yield case.id, stream
    for name, (envelope, config) in {key: value[:2] for key, value in (BAD | IGNORED | SOUND).items()}.items():
        if envelope.startswith("xl"):
            yield f"configuration: {name}", with_config(_domain(), envelope, config)
    for missing in (256, 257):
        yield f"target of {missing} pages less", _with_target(_domain(pfns=range(600)), missing)
    for name, again in {"data": [], "the same record": [(NOTAB, bytes(PAGE))]}.items():
        domain = _domain()
        pfn, table = domain.places.data[0], bytearray(PAGE)
        table[40:48] = (domain.entries << 12 | 1).to_bytes(8, "little")
        sent = [(L1TAB, bytes(table)), *again]
        stream = as_stream(domain)
        stream.before("PAGE_DATA", WIRE.page_data([(pfn, kind) for kind, _ in sent], [page for _, page in sent]))
        yield f"a table that is sent again in {name}", stream


def _domain(**make: Any) -> Domain:
    """A sound domain without the state that only its own host takes back."""
    domain = pv_domain(**make)
    for state in (domain.extended, domain.xsave, domain.msrs):
        state.clear()
    return domain


def _with_target(domain: Domain, missing: int) -> Stream:
    pages = sum(bool(IS_POPULATED[page_type]) for page_type in domain.types.values())
    config = json.loads(config_json(memory_kib=4 * pages))
    config["b_info"]["target_memkb"] = 4 * (pages - missing)
    return domain.to_stream(config=json.dumps(config).encode() + b"\0")


def restores(data: bytes) -> bool:
    """Whether stock xl restores a file. The domain is destroyed."""
    with tempfile.NamedTemporaryFile(suffix=".save") as file:
        file.write(data)
        file.flush()
        ended = subprocess.run(["xl", "restore", "-p", file.name], capture_output=True, timeout=TIMEOUT, check=False)
    sys.stderr.write(ended.stderr.decode(errors="replace"))
    listing = subprocess.run(["xl", "list"], capture_output=True, text=True, check=True).stdout
    for line in listing.splitlines()[2:]:
        subprocess.run(["xl", "destroy", line.split()[1]], capture_output=True, check=True)
    return ended.returncode == 0


def main() -> None:
    outcomes = {}
    for name, stream in streams(set(sys.argv[1:])):
        for record in ("X86_CPUID_POLICY", "X86_MSR_POLICY"):  # the host's own will do
            stream.pop(stream.find(record))
        data = bytes(stream)
        outcomes[name] = {"stock": restores(data), "verify": verify_pipe(data).report.ok}
        print(name, outcomes[name], flush=True)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
