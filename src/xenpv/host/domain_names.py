"""What a domain's name ends with while it moves, as xl has it."""

from __future__ import annotations

INCOMING = "--incoming"  # what a domain's name ends with until it is this side's, as xl has it
AWAY = "--migratedaway"  # and once it was given away, until that is known to have gone well
