"""What Xen accepts of vcpu state, TSC and CPU policy.

One set of checks for verify, restore and the model of Xen.
"""
