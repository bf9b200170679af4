"""Building a PV domain: on a host, and into a save file without one."""
