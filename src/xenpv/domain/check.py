"""All checks of what a saved PV domain describes, beyond its framing."""

from __future__ import annotations

from xenpv.domain.check_p2m import check_p2m
from xenpv.domain.check_tables import TableChecks, gdt_frames
from xenpv.domain.check_vcpus import check_start_info, check_vcpus
from xenpv.domain.config import config_of
from xenpv.domain.input import Progress
from xenpv.domain.likeness import check_resume
from xenpv.domain.source import SavedDomain
from xenpv.findings import Findings


def check_domain(saved: SavedDomain, findings: Findings, progress: Progress | None = None) -> None:
    """Check vcpus, start info, p2m and every page table of a PV domain; ``findings`` takes what is wrong."""
    config = config_of(saved.contents)
    check_vcpus(saved, findings, config)
    check_start_info(saved, findings)
    check_resume(saved, findings)
    check_p2m(saved, findings, config)
    TableChecks(saved, findings, gdt_frames(saved)).run(progress)
