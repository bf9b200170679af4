"""The hypervisor: protocols, a model of Xen in process, and real Xen."""
