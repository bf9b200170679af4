"""Writing a domain's memory in a format that other tools read."""
