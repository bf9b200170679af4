"""Settings of all tests: how hard property tests try, and where compiled modules go.

Property tests try little and the same each time; `HYPOTHESIS_PROFILE=deep` tries long and anew. None has a deadline:
a busy machine is no finding.

Parameters that are lists, dicts or bytes get their own text as the id of a test; pytest would number them.

Where Python is told not to write compiled modules beside the sources, they are kept with pytest's own cache.
Otherwise each worker and each process that a test starts compiles all of them anew.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile("quick", max_examples=40, deadline=None, derandomize=True, suppress_health_check=_SLOW)
settings.register_profile("deep", max_examples=3000, deadline=None, suppress_health_check=_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


ID_LENGTH = 50  # characters of one parameter


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Return a readable id for a collection, bytes or an object with a name; None leaves it to pytest."""
    if isinstance(val, str | bytes):
        text = ascii(val)
        return None if len(text) <= ID_LENGTH else f"{text[:20]}...{len(val)}"
    if isinstance(val, dict):
        return " ".join(f"{key}={value}" for key, value in val.items())[:ID_LENGTH] or "empty"
    if isinstance(val, list | tuple):
        return " ".join(str(value) for value in val)[:ID_LENGTH] or "empty"
    name = getattr(val, "name", None)
    return name if isinstance(name, str) else None
