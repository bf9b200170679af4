"""Reads kernel files and plans domains, without I/O and without trusting the file.

``kernel.KernelImage.parse`` reads a kernel, ``verdict`` says why it cannot boot, ``capacity`` how much memory it can
have, and ``layout.plan`` where everything of its domain goes.
"""
