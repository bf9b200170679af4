"""A domain as a page that people look at: what is gathered of it, drawn, and written as one HTML file."""
