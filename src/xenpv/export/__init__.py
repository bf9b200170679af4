"""Export: a domain's memory in formats that other tools read."""
