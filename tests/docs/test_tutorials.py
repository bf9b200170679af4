"""Every command of the tutorials is run, and prints what the page says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.console_page import matches, run_page, steps_of

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorial"
PAGES = sorted(page.stem for page in TUTORIALS.glob("*.md") if page.stem != "index")


@pytest.mark.parametrize("page", PAGES)
def test_tutorial_run_as_written_prints_what_it_says(page: str, tmp_path: Path) -> None:
    for file in (*TUTORIALS.glob("*.py"), *TUTORIALS.glob("*.map")):
        shutil.copy(file, tmp_path)
    run_page(TUTORIALS / f"{page}.md", tmp_path)


def test_steps_of_splits_blocks_into_commands_and_output() -> None:
    block = "```console\n$ echo a\na\n$ cat << E\n> b\n>\n> E\nb\n```\n"
    page = f"text\n\n{block}\n<!-- not run: no -->\n```console\n$ rm\n```\n"
    steps = steps_of(page)
    assert [(step.line, step.command, step.expected) for step in steps] == [
        (4, "echo a", "a"),
        (6, "cat << E\nb\n\nE", "b"),
    ]


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        pytest.param("a\nb", "a  \nb\n", True, id="spaces-at-line-end"),
        pytest.param("a", "b", False, id="other-text"),
        pytest.param("a…c", "abbc", True, id="within-a-line"),
        pytest.param("a…c", "a\nc", False, id="not-across-lines"),
        pytest.param("…\nc", "a\nb\nc", True, id="lines-before"),
        pytest.param("a\n…", "a", True, id="no-line-after"),
        pytest.param("", "a", False, id="output-that-is-not-told"),
    ],
)
def test_matches_ellipsis(expected: str, printed: str, same: bool) -> None:
    assert matches(expected, printed) is same
