"""Comparing two domains or two streams."""
