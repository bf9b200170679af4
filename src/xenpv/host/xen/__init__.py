"""Real Xen: its libraries, domctls and xenstore."""
