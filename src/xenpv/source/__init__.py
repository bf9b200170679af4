"""Domains under one protocol: running, saved or dumped."""
