"""Migrating a running domain to another host."""
