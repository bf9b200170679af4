"""A model of Xen in process, which keeps Xen's memory rules."""
