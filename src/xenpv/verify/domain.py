"""Runs all checks of a saved PV domain that go beyond framing."""

from __future__ import annotations

from xenpv.findings import Findings
from xenpv.io.progress import ProgressCallback
from xenpv.source.config import Config
from xenpv.source.saved import SavedDomain
from xenpv.verify.heuristics import check_resume
from xenpv.verify.p2m import check_p2m
from xenpv.verify.page_tables import PageTableChecks
from xenpv.verify.vcpus import check_descriptors, check_domain_state, check_start_info, check_vcpus


def check_domain(saved: SavedDomain, findings: Findings, progress: ProgressCallback | None = None) -> None:
    """Check the state, start info, p2m and every page table of a PV domain.

    Args:
        saved: The domain.
        findings: Gets the findings.
        progress: Called after each batch of page tables.
    """
    config = Config.from_contents(saved.contents)
    check_domain_state(saved, findings)
    check_vcpus(saved, findings, config)
    check_descriptors(saved, findings)
    check_start_info(saved, findings)
    check_resume(saved, findings)
    check_p2m(saved, findings, config)
    PageTableChecks(saved, findings, saved.gdt_pfns()).run(progress)
