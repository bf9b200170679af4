"""The formats of exported memory: each module makes the bytes, and does no I/O."""
