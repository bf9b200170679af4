"""Restores a domain from a stream."""
