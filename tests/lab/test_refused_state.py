"""Stock `xl restore` of a save file with one change that Xen may refuse: it fails where verify says so, and else works.

One file, of a small guest that stock xl saved; the changes are those of tests/support/lab/record_edits.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import lab
from tests.support.lab.guest import boot
from tests.support.lab.record_edits import EDITS, SaveFile, has_xsave
from xenpv.verify.stream import verify

NAME = "edited"


@pytest.mark.deep
def test_xl_restores_an_edited_file_as_verify_says(host: lab.Host, tmp_path: Path) -> None:
    boot(host, NAME, "", memory=16)
    saved = host.run(f"xl save {NAME} /tmp/saved && mv /tmp/saved .", timeout=300).check().outputs / "saved"
    file = SaveFile(saved)
    lines, wrong = list[str](), list[str]()
    for name, edit in EDITS.items():
        path = tmp_path / "edited.save"
        path.write_bytes(edit(file))
        report = verify(str(path))
        there = host.put(path, "edited.save")
        result = host.run(f"xl restore -p {there}", timeout=300)
        error = next((line for line in result.stderr.decode().splitlines() if "Failed" in line or "Unable" in line), "")
        host.run(f"xl destroy {NAME}; rm -f {there}")
        rules = ", ".join(sorted({finding.rule.name for finding in report.findings if finding.severity == "error"}))
        lines.append(f"{name} | verify: {rules or 'restores'} | xl: {error[-90:] if result.status else 'restores'}")
        print(lines[-1], flush=True)
        if report.ok != (result.status == 0):
            wrong.append(lines[-1])
    assert wrong == []
    assert has_xsave(file), "a host without XSAVE refuses every area: its rules were not shown"
