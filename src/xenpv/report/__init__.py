"""Reports: reading all that a report shows of a domain, drawing it, and writing one HTML file."""
