"""Xen's public headers as data, without behaviour.

One declaration serves both guest widths.
"""
