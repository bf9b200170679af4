"""Names of domains: those that are valid, and suffixes during a migration."""

from __future__ import annotations

from xenpv.errors import RequestError

NAME_MAX = 255  # bytes
# As with xl:

INCOMING = "--incoming"  # on the receiving side, until the domain is committed there
AWAY = "--migratedaway"  # on the sending side, from the commit until the receiver has confirmed it


def check_name(name: str) -> str:
    """Return a domain's name, or raise RequestError for one that no domain should get.

    A name becomes a value in xenstore, is printed, and names the domain on xl's command line: empty names and those of
    digits only lead to another domain there.
    """
    if not name or not name.isprintable() or len(name.encode(errors="replace")) > NAME_MAX:
        raise RequestError(f"a name has 1 to {NAME_MAX} printable bytes, not {name!a:.100}; choose another with --name")
    if name.isdecimal():
        raise RequestError(f"the name {name!a} would be mistaken for a domain id; choose another with --name")
    return name
