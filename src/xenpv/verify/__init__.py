"""Verifies saved domains offline, and the physmap of running ones."""
