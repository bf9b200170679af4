"""xenpv: Xen PV domains of any memory size, on real Xen and without it."""

__version__ = "0.1.0"
