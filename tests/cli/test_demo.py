"""``xenpv demo``: with a small domain, in two forms of p2m, and where it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command import xenpv
from xenpv.memory.digest import Digest


@pytest.mark.parametrize(
    ("form", "name"),
    [("linear", "linear virtual list"), ("rooted4", "rooted tree of 4 levels")],
    ids=["linear", "rooted4"],
)
def test_demo_saves_verifies_and_migrates_the_domain(form: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "large.save"
    ran = xenpv("demo", "--memory", "64M", "--p2m", form, "-o", file)
    assert (ran.code, ran.err) == (0, "")
    assert f"dom1 (demo): {name}" in ran.out
    assert " pages are the same on both hosts" in ran.out
    assert "p2m and m2p agree" in ran.out
    for saved in ("large.save", "demo.save"):
        assert f"\n  {saved}: " in ran.out
    assert xenpv("show", "--json", file).json["config"]["name"] == "demo"
    assert xenpv("verify", "-q", file).code == 0
    assert file.stat().st_size < 40 << 20  # the kernel writes to half of its pages; the others are not stored


def test_demo_of_a_kernel_without_a_p2m_is_refused(tmp_path: Path) -> None:
    ran = xenpv("demo", "--memory", "64M", "--p2m", "none", "-o", tmp_path / "none.save")
    assert ran.code == 1
    assert "\n  refused: dom1 " in ran.out
    assert not list(tmp_path.iterdir())


def test_demo_fails_if_the_memory_differs_after_the_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = iter(range(9))
    monkeypatch.setattr("xenpv.cli.demo.digest", lambda *_: Digest(1, 1, str(next(digests))))
    ran = xenpv("demo", "--memory", "64M")
    assert ran.code == 1
    assert "pages are NOT the same" in ran.out
