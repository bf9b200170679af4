"""Hypothesis as tests/property has it, also when this folder runs alone: without deadlines, which busy hosts miss."""

import tests.property.conftest  # noqa: F401
