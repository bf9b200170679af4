"""Plug-ins by which debuggers open a domain through xenpv.

Each module needs the tool that it is named for.
"""
