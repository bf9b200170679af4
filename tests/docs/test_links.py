"""The links of the documents outside docs/, and of README on a package index. `make docs` checks those within docs/."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "guests/litmus/README.md", "tests/vectors/README.md"]
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)]*)\)")
PATH = re.compile(r"`((?:src|tests|docs|lab|benchmarks|guests)/[a-z0-9_./-]+?\.(?:py|md|c|h|toml))(?:::[\w]+)?`")


def _headings(page: Path) -> set[str]:
    lines = page.read_text(encoding="utf-8").splitlines()
    titles = (line.lstrip("#").strip().lower() for line in lines if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_of_page_lead_to_files_and_headings(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not heading or heading in _headings(target), link


@pytest.mark.parametrize(
    "page", [*PAGES, *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md")))]
)
def test_paths_that_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    missing = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    assert missing == []


def test_readme_for_index_has_no_relative_link() -> None:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    hatch_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = hatch_build.readme_for_index(readme)
    assert LINK.findall(readme)
    assert LINK.findall(text) == []
    assert "the API (`docs/reference/api.md` in the source)" in text
