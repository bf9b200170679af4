"""Domains, running, saved or dumped, behind one protocol."""
