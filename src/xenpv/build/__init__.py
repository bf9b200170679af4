"""Builds domains: on Xen, or into a save file."""
