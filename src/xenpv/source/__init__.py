"""Domains to look at: running, saved or dumped."""
