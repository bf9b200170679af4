"""Directives that write parts of pages from the code itself: commands, rules, records, rooms, and what the tool prints.

They are used in MyST pages as ```` ```{verbs} ```` and the like. A public name without a docstring is a warning, which
fails `make docs`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import lzma
import os
import pkgutil
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeGuard

import click
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from xenpv.cli.main import main
from xenpv.findings import RULES, Rule
from xenpv.stream import record_order

logger = logging.getLogger(__name__)

DEMO_FILES = {"web.save": "demo.save.xz", "kernel.elf": "demo.elf.xz"}  # what `xenpv demo` is made of
HELP_WIDTH = 100


class Room(SphinxDirective):
    """`{room} memory`: every module of a room, or of a single module, from the docstrings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a section for each module."""
        lines: list[str] = []
        for name in _modules(f"xenpv.{self.arguments[0]}"):
            for missing in _undocumented(name):
                logger.warning("no docstring: %s", missing, type="docstring", location=self.get_location())
            lines += [name, "-" * len(name), "", f".. automodule:: {name}", ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def _modules(name: str) -> Iterator[str]:
    """Yield the name of a module and of those in it, at any depth; `__main__` runs when it is imported."""
    module = importlib.import_module(name)
    yield name
    for info in pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}."):
        if not info.name.endswith("__main__"):
            yield info.name


def _undocumented(name: str) -> Iterator[str]:
    """Yield the public classes, functions and methods of a module that have no docstring, not even an inherited one."""
    module = importlib.import_module(name)
    for node in ast.parse(inspect.getsource(module)).body:
        if not _is_public(node):
            continue
        if not ast.get_docstring(node):
            yield f"{name}.{node.name}"
        if isinstance(node, ast.ClassDef):
            cls = getattr(module, node.name)
            methods = (member for member in node.body if _is_public(member))
            yield from (f"{name}.{node.name}.{m.name}" for m in methods if not inspect.getdoc(getattr(cls, m.name)))


def _is_public(node: ast.stmt) -> TypeGuard[ast.ClassDef | ast.FunctionDef]:
    if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
        return False
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    return "overload" not in decorators and f"{node.name}.setter" not in decorators


class Verbs(SphinxDirective):
    """`{verbs}`: click's help of every verb, each under a heading of its own."""

    def run(self) -> list[nodes.Node]:
        """Return a section for each verb."""
        parent = click.Context(main, info_name="xenpv")
        sections: list[nodes.Node] = []
        for name in main.list_commands(parent):
            command = main.get_command(parent, name)
            assert command is not None
            title = f"xenpv {name}"
            section = nodes.section(ids=[nodes.make_id(title)], names=[title])
            section += nodes.title(title, title)
            section += _literal(_help(command, parent, name))
            sections.append(section)
        return sections


class Help(SphinxDirective):
    """`{click-help} xenpv.plugins.drgn:main python -m xenpv.plugins.drgn`: click's help of one more command."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return the help as a literal block."""
        place, name = self.arguments[0].split(maxsplit=1)
        module, attribute = place.split(":")
        return [_literal(_help(getattr(importlib.import_module(module), attribute), None, name))]


def _help(command: click.Command, parent: click.Context | None, name: str) -> str:
    context = click.Context(command, info_name=name, parent=parent, terminal_width=HELP_WIDTH)
    return command.get_help(context)


class Rules(SphinxDirective):
    """`{rules} xenpv.verify.rules`: the rules of a module as a table, in the order in which it declares them.

    With `:prefix: physmap-`: all rules whose name begins so.
    """

    required_arguments = 1
    option_spec = {"prefix": directives.unchanged}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        module = importlib.import_module(self.arguments[0])
        if "prefix" in self.options:
            rules = [rule for name, rule in RULES.items() if name.startswith(self.options["prefix"])]
        else:
            rules = [value for value in vars(module).values() if isinstance(value, Rule)]
        rows = [[f"`{rule.name}`", str(rule.severity), rule.text, f"`{rule.source}`"] for rule in rules]
        return _table(self, ["rule", "severity", "what must hold", "who demands it"], rows)


class Records(SphinxDirective):
    """`{records}`: the table of order, by which reader, writer, verifier and restorer go."""

    def run(self) -> list[nodes.Node]:
        """Return one row for each type of record."""
        rows = []
        for kind, place in record_order.PLACES.items():
            guests = " and ".join(sorted((guest.name for guest in place.guests), reverse=True)) or "none"
            rows.append([
                f"`{kind.value:#04x}`",
                f"`{kind.name}`",
                guests,
                "3" if place.min_version == 3 else "2, 3",
                ", ".join(f"`{other.name}`" for other in place.after) or "-",
                ", ".join(f"`{other.name}`" for other in place.not_after) or "-",
                "once" if place.once else "any",
                " and ".join(sorted(guest.name for guest in place.mandatory_for)) or "-",
            ])  # fmt: skip
        header = ["number", "record", "guests", "version", "after", "not after", "how often", "mandatory for"]
        return _table(self, header, rows)


def _table(directive: SphinxDirective, header: list[str], rows: list[list[str]]) -> list[nodes.Node]:
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in [header, *rows]]
    lines.insert(1, "|---" * len(header) + "|")
    return directive.parse_text_to_nodes("\n".join(lines))


class Drawn(SphinxDirective):
    """`{drawn} layout kernel.elf --memory 640G -o plan.svg`: a command run while the page is built.

    It runs beside the files of `xenpv demo` (web.save, kernel.elf). Its output is shown; or, with `:picture: plan.svg`,
    the picture that it wrote; or, with `:page: web.html`, a link to the page that it wrote.
    """

    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"picture": directives.unchanged, "page": directives.unchanged, "alt": directives.unchanged}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Run the command and return what it printed or drew."""
        written = self.options.get("picture") or self.options.get("page")
        with _demo_folder() as folder:
            command = [sys.executable, "-c", "from xenpv.cli.main import run; run()", *shlex.split(self.arguments[0])]
            done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
            if done.returncode:
                raise self.error(f"xenpv {self.arguments[0]}: exit status {done.returncode}: {done.stderr}")
            if not written:
                return [_literal(f"$ xenpv {self.arguments[0]}\n{done.stdout}", "console")]
            target = Path(self.env.app.outdir) / "drawn" / written
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((folder / written).read_bytes())
            target.chmod(0o644)
        up = "../" * self.env.docname.count("/")
        alt = self.options.get("alt", written)
        if "picture" in self.options:
            html = f'<p><img src="{up}drawn/{written}" alt="{alt}" style="max-width: 100%"></p>'
        else:
            html = f'<p><a href="{up}drawn/{written}">{alt}</a></p>'
        return [nodes.raw("", html, format="html")]


@contextlib.contextmanager
def _demo_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="xenpv-docs-") as name:
        folder = Path(name)
        for path, packed in DEMO_FILES.items():
            folder.joinpath(path).write_bytes(lzma.decompress(files("xenpv.cli").joinpath(packed).read_bytes()))
        yield folder


def _environment() -> dict[str, str]:
    source = Path(__file__).parents[2] / "src"
    return os.environ | {"PYTHONPATH": str(source), "COLUMNS": "110", "NO_COLOR": "1"}


def _literal(text: str, language: str = "text") -> nodes.Node:
    block = nodes.literal_block(text, text)
    block["language"] = language
    return block


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    for name, directive in {"room": Room, "verbs": Verbs, "click-help": Help, "rules": Rules, "records": Records,
                            "drawn": Drawn}.items():  # fmt: skip
        app.add_directive(name, directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
