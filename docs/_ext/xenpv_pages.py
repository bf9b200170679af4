"""Directives that write pages from the code itself: commands, rules, records, modules and pictures."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)


def _modules(package: str) -> Iterable[str]:
    """Yield a package's name and those of the modules and packages in it, at any depth."""
    module = importlib.import_module(package)
    yield package
    for info in pkgutil.walk_packages(getattr(module, "__path__", []), f"{package}."):
        yield info.name


class Room(SphinxDirective):
    """`{room} memory` documents every module of a room from its docstrings."""

    required_arguments = 1
    has_content = False

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for name in _modules(f"xenpv.{self.arguments[0]}"):
            lines += [name, "-" * len(name), "", f".. automodule:: {name}", ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def _require_docstring(_app: Sphinx, what: str, name: str, *place: Any) -> None:
    lines: list[str] = place[-1]
    if what in {"module", "class", "exception", "function", "method", "property"} and not any(lines):
        logger.warning("no docstring: %s", name, type="docstring", subtype=what)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives and the check that every documented name has a docstring."""
    app.add_directive("room", Room)
    app.connect("autodoc-process-docstring", _require_docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
