"""Reports: all facts of a domain, read, drawn and written as one HTML file."""
