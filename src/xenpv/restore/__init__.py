"""Restoring a domain from a stream."""
