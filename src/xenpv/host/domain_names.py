"""Suffixes that a domain's name has while it migrates, as with xl."""

from __future__ import annotations

INCOMING = "--incoming"  # on the receiving side, until the domain is committed there
AWAY = "--migratedaway"  # on the sending side, from the commit until the receiver has confirmed it
