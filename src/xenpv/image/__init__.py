"""What will be built, before any memory exists: kernel files, read without I/O and without trust.

``kernel.KernelImage.parse`` reads one, ``verdict`` says whether it can boot and why not, ``capacity`` how much memory
it can be started with.
"""
