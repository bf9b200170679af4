"""The public API: which names it has, and that nothing that is imported before them hides them."""

from __future__ import annotations

import subprocess
import sys

import pytest

import xenpv

NAMES = {
    "Domain", "DomainMemory", "Finding", "Reader", "Report", "Rule", "Writer",
    "build", "convert", "diff", "export", "migrate", "open_domain", "restore", "save", "verify",
    "Fault", "GuestError", "HostError", "ImageError", "Malformed", "OutOfOrder", "RequestError", "StreamError",
    "Truncated", "Unsupported", "XenPVError",
}  # fmt: skip
MODULES = {
    "build": "build", "convert": "convert", "diff": "diff", "export": "export", "migrate": "sender",
    "restore": "restore", "save": "save", "verify": "stream",
}  # fmt: skip
ORDERS = {
    "package first": "import xenpv.{verb}",
    "module of the package first": "import xenpv.{verb}.{module}",
    "function first": "import xenpv; xenpv.{verb}; import xenpv.{verb}.{module}",
    "from-import first": "from xenpv import {verb}; import xenpv.{verb}.{module}",
    "all names first": "from xenpv import *; import xenpv.{verb}.{module}",
    "package imported twice": "import sys, xenpv.{verb}; del sys.modules['xenpv.{verb}']; import xenpv.{verb}",
}


def run(code: str) -> str:
    """What a new Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_all_is_the_list_of_public_names() -> None:
    assert set(xenpv.__all__) == NAMES
    assert set(dir(xenpv)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_public_name_loads_and_has_a_docstring(name: str) -> None:
    value = getattr(xenpv, name)
    assert callable(value)
    assert value.__name__ == name
    assert value.__doc__


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError):
        xenpv.no_such_name  # noqa: B018


@pytest.mark.parametrize("verb", MODULES)
@pytest.mark.parametrize("order", ORDERS)
def test_verb_in_any_order_of_imports_is_the_function(order: str, verb: str) -> None:
    imports = ORDERS[order].format(verb=verb, module=MODULES[verb])
    assert run(f"{imports}; import types, xenpv; print(type(xenpv.{verb}) is types.FunctionType)") == "True"


@pytest.mark.parametrize("verb", MODULES)
def test_module_of_a_verb_is_found_by_from_import(verb: str) -> None:
    module = MODULES[verb]
    code = f"import xenpv; xenpv.{verb}; from xenpv.{verb} import {module}; print({module}.__name__)"
    assert run(code) == f"xenpv.{verb}.{module}"


def test_import_loads_no_other_module_of_ours_and_no_numpy() -> None:
    loaded = "sorted(n for n in sys.modules if n.startswith(('xenpv.', 'numpy', 'typing', 'click')))"
    assert run(f"import sys, xenpv; print({loaded})") == "[]"
