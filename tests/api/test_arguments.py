"""Arguments of the public API: paths of either kind, and names that do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

import xenpv
from tests.support.writers.build import pv_domain


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "web.save"
    path.write_bytes(pv_domain().to_bytes())
    return path


def test_verify_takes_a_path_object(saved: Path) -> None:
    assert xenpv.verify(saved).ok
    assert xenpv.verify(saved, deep=False).ok
    assert xenpv.verify(str(saved)).ok


def test_export_unknown_format_is_refused_before_the_file_is_opened(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "web.core"
    with xenpv.open_domain(saved) as domain, pytest.raises(xenpv.RequestError):
        xenpv.export(domain, str(out), "foo")
    assert not out.exists()
