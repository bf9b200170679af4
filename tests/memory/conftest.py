"""The property tests here try as hard as those of tests/property, and HYPOTHESIS_PROFILE=deep is for them, too."""

from __future__ import annotations

import tests.property.conftest  # noqa: F401  it loads the profile
