"""The migration stream, sans-IO: bytes in, records out. Nothing here opens a file."""
