"""The hypervisor: the protocols that xenpv needs, a model of Xen in process, and the real Xen below."""
