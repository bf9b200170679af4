"""How hard the property tests try: little and the same each time; `HYPOTHESIS_PROFILE=deep` tries long and anew."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]  # a busy machine is no finding

settings.register_profile("quick", max_examples=40, deadline=None, derandomize=True, suppress_health_check=SLOW)
settings.register_profile("deep", max_examples=3000, deadline=None, suppress_health_check=SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
