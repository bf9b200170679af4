"""Saving a domain to a stream, while it runs or after it has suspended."""
