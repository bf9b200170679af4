"""Rules for all sources: short first lines of docstrings; tests import no test module and have readable ids."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src/xenpv"
FIRST_LINE_MAX = 80  # characters of a docstring's first line


def imported_names(module: Path) -> set[str]:
    """Return the dotted names that a module imports, and those with each imported member appended."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def test_modules_import_no_test_module() -> None:
    test_modules = {module.stem for module in TESTS.rglob("test_*.py")}
    importers = {
        f"{module.relative_to(TESTS)}: {name}"
        for module in TESTS.rglob("*.py")
        for name in imported_names(module)
        if name.startswith("tests.") and test_modules.intersection(name.split("."))
    }
    assert importers == set()


def test_parameter_ids_are_readable(request: pytest.FixtureRequest) -> None:
    """pytest numbers a parameter that has no id and no text of its own: ``case0``. Covers the tests of this run."""
    numbered = {
        f"{item.nodeid} ({name})"
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        for name, value in item.callspec.params.items()
        if not isinstance(value, str | int | float) and re.search(rf"(^|-){name}\d+(-|$)", item.callspec.id)
    }
    assert numbered == set()


def test_docstrings_begin_with_a_short_line() -> None:
    long = {
        f"{module.relative_to(SOURCE)}:{node.body[0].lineno}"
        for module in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(module.read_bytes()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if len((ast.get_docstring(node) or "").partition("\n")[0]) > FIRST_LINE_MAX
    }
    assert long == set()
