"""Checking whether a saved domain would restore."""
