"""Every option that a document names is one of some command."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from xenpv.cli.main import main
from xenpv.plugins.drgn import main as drgn_main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"\bxenpv ([a-z]+)\b([^\n`|]*)")
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]+|-[a-zA-Z])(?![\w-])")


def _options(command: click.Command) -> set[str]:
    names = (param.opts + param.secondary_opts for param in command.params if isinstance(param, click.Option))
    return {name for group in names for name in group} | {"--help", "-h"}


CONTEXT = click.Context(main)
VERBS = {name: main.get_command(CONTEXT, name) for name in main.list_commands(CONTEXT)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_in_commands_of_page_exist(page: Path) -> None:
    unknown = []
    for verb, rest in COMMAND.findall(page.read_text(encoding="utf-8")):
        command = VERBS.get(verb)
        if command is not None:
            own = rest.split("&&")[0].split(" #")[0].split("    ")[0]
            own = re.sub(r"'[^']*'|\"[^\"]*\"", "", own)  # what is quoted is for another program
            unknown += [f"xenpv {verb} {option}" for option in OPTION.findall(own) if option not in _options(command)]
    assert unknown == []


def test_options_of_plugin_in_documents_exist() -> None:
    known = _options(drgn_main)
    for page in PAGES:
        for rest in re.findall(r"python3? -m xenpv\.plugins\.drgn ([^\n`|]*)", page.read_text(encoding="utf-8")):
            own = re.sub(r"'[^']*'", "", rest).split("web")[0]
            assert set(OPTION.findall(own)) <= known, rest
