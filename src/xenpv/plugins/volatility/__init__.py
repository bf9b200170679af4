"""Volatility 3 on save files and cores, without converting them first.

    python3 -m xenpv.plugins.volatility -f web.save linux.pslist

is Volatility's own command line with this folder among its plug-ins, like `vol -p THIS/FOLDER …`.
"""
